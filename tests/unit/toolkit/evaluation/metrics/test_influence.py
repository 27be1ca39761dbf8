"""Who decides the false match rate, who looks like one person under two names, and what more people would buy."""

from __future__ import annotations

import numpy as np
import pytest

from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.evaluation.metrics.bootstrap import bootstrap
from pkd.toolkit.evaluation.metrics.error_rates import fmr_at
from pkd.toolkit.evaluation.metrics.influence import MULTIPLES, influential, suspects
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores, score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing

INFO = describe("tiny", "teacher", "0" * 64, Preprocess(), 16)
PEOPLE = 80
NAMES = [f"person {i}" for i in range(PEOPLE)]


def drawn(seed: int, *, twice: bool = False, wolf: bool = False) -> PairScores:
    """Score 80 people with 4 images each. ``twice``: 78 and 79 are one person; ``wolf``: everyone looks like 0."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(PEOPLE, 16)) + 0.3
    if twice:
        centres[79] = centres[78]
    if wolf:
        centres[0] = 0.6
    labels = np.repeat(np.arange(PEOPLE), 4)
    vectors = centres[labels] + 0.45 * random.normal(size=(len(labels), 16))
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    files = np.arange(len(labels))
    return score_pairs(Pairing(labels, labels, files, files, PEOPLE, unordered=True), unit, unit)


def test_two_names_of_one_person_are_found_with_what_they_cost() -> None:
    scores = drawn(0, twice=True)
    comparison, _ = measure(scores, "T–T", INFO, INFO, fmrs=(0.1, 0.01), resamples=100, seed=0)
    found = suspects(scores, comparison.points, NAMES)
    assert found and found.count == 1 and found.people == (("person 78", "person 79"),)
    assert found.fmr == 0.01 and found.share == pytest.approx(1 / (0.01 * PEOPLE * (PEOPLE - 1) / 2), rel=0.1)
    assert 0 <= found.tar_gain < 0.05
    assert suspects(drawn(0), comparison.points, NAMES) is None


def test_who_takes_part_in_most_false_matches_is_named_first() -> None:
    scores = drawn(1, wolf=True)
    comparison, _ = measure(scores, "T–T", INFO, INFO, fmrs=(0.01,), resamples=100, seed=0)
    people = influential(scores, comparison.points[0], NAMES)
    assert people[0].identity == "person 0" and people[0].share > 1.2 * people[1].share
    assert [one.share for one in people] == sorted((one.share for one in people), reverse=True)
    alike, _ = measure(drawn(1), "T–T", INFO, INFO, fmrs=(0.01,), resamples=100, seed=0)
    assert comparison.effective_people[0] < alike.effective_people[0]


def test_more_people_make_intervals_as_much_narrower_as_planned() -> None:
    comparison, _ = measure(drawn(2), "T–T", INFO, INFO, fmrs=(0.01,), resamples=200, seed=0)
    (plan,), (point,) = comparison.planned, comparison.points
    here = MULTIPLES.index(1.0)
    assert plan.people[here] == PEOPLE and plan.people == tuple(sorted(plan.people))
    assert plan.fmr_high[here] * 0.01 == pytest.approx(point.fmr_ci95[1], rel=0.02)
    assert plan.tar_width[here] == pytest.approx(point.tar_balanced_ci95[1] - point.tar_balanced_ci95[0])
    assert list(plan.fmr_high) == sorted(plan.fmr_high, reverse=True) and plan.fmr_high[-1] < 1.2
    assert list(plan.tar_width) == sorted(plan.tar_width, reverse=True)


def test_as_a_bound_the_true_rate_is_kept_and_as_a_point_on_average() -> None:
    """The true rate is that of ten other sets."""
    others = [drawn(seed) for seed in range(100, 110)]
    kept, ratios = 0, []
    for seed in range(8):
        comparison, _ = measure(drawn(seed), "T–T", INFO, INFO, fmrs=(0.02,), resamples=2, seed=0)
        (point,) = comparison.points
        assert point.as_point and point.as_bound and point.threshold < point.as_point.threshold
        thresholds = np.array([point.as_point.threshold, point.as_bound.threshold])
        rate, bound = np.mean([fmr_at(other, thresholds) for other in others], axis=0)
        ratios.append(rate / 0.02)
        kept += bound <= 0.02
    assert kept >= 6 and np.mean(ratios) < 1.15


def test_the_variance_of_resamples_is_that_of_pairs_twice() -> None:
    scores = drawn(3)
    seen = bootstrap(scores, np.empty(0), np.array([0.6]), resamples=400, seed=0)
    assert seen.fmr[:, 0].var() == pytest.approx(float(seen.variance.resampled[0]), rel=0.25)
    assert seen.variance.total[0] < seen.variance.resampled[0]
