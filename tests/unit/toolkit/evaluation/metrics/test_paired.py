"""Paired differences, their p-values, and what several comparisons do to them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.metrics.bootstrap import bootstrap
from pkd.toolkit.evaluation.metrics.error_rates import rates
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores, score_pairs
from pkd.toolkit.evaluation.metrics.paired import (
    OWN,
    Contributions,
    ScoredList,
    accuracy_contributions,
    compared,
    paired,
    shifted_accuracies,
    tar_contributions,
)
from pkd.toolkit.evaluation.metrics.pairing import Pairing
from pkd.toolkit.evaluation.metrics.resamples import holm, paired_difference
from pkd.toolkit.evaluation.protocols.pair_list import best_threshold

FMR = np.array([0.02])


def two_encoders(seed: int, noise: float) -> tuple[PairScores, PairScores]:
    """Two noisy views of the same images: ``noise`` is how much worse the second is."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(60), 4)
    faces = random.normal(size=(60, 12))[labels] + 0.7 * random.normal(size=(240, 12))
    pairing = Pairing(labels, labels, np.arange(240), np.arange(240), 60, unordered=True)

    def scores(extra: float) -> PairScores:
        vectors = faces + extra * random.normal(size=faces.shape)
        unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        return score_pairs(pairing, unit, unit)

    return scores(0.2), scores(0.2 + noise)


def contributions(scores: PairScores) -> Contributions:
    return tar_contributions(scores, float(FMR[0]), float(rates(scores, FMR).threshold[0]), 0.5)


def difference(a: PairScores, b: PairScores) -> tuple[float, tuple[float, float], float]:
    observed = float((rates(a, FMR).tar_balanced - rates(b, FMR).tar_balanced)[0])
    found = compared(contributions(a), contributions(b), observed=observed)
    return found.difference, found.ci95, found.p


def test_a_worse_encoder_is_told_from_a_better_one() -> None:
    size, (low, high), p = difference(*two_encoders(0, 0.8))
    assert 0 < low <= size <= high and p == pytest.approx(1 / 5000)
    other, (_, top), q = difference(*reversed(two_encoders(0, 0.8)))
    assert other == -size and top < 0 and q == p


def test_equal_encoders_are_told_apart_as_often_as_the_level_says() -> None:
    """Forty pairs of encoders of one quality: of 5 % levels two false claims are expected; six would be 1.4 %."""
    claims = sum(difference(*two_encoders(seed, 0.0))[2] <= 0.05 for seed in range(40))
    assert claims <= 5


def test_what_people_contribute_adds_up_to_the_rate() -> None:
    scores, _ = two_encoders(2, 0.1)
    found = contributions(scores)
    assert found.own.sum() == pytest.approx(rates(scores, FMR).tar_balanced[0])
    assert found.moved.sum() == pytest.approx(0, abs=1e-12)
    assert found.parts.sum() <= FMR[0] and found.slope[0] < 0
    kept = found.named("S–T/tar_balanced/0.02")
    again = Contributions.find(kept, "S–T/tar_balanced/0.02")
    assert again is not None and again.own is found.own
    assert Contributions.find(kept, "S–T/tar_balanced/0.01") is None


@pytest.mark.parametrize(("differ", "p"), [(1, 1.0), (3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_few_people_who_differ_claim_what_a_sign_test_does(differ: int, p: float) -> None:
    """All of them accept more by A: the exact chance that signs agree is 2 / 2^n."""
    own = np.zeros(100)
    own[:differ] = 0.01
    nothing = np.empty(0)
    a, b = (Contributions(x, np.zeros(100), nothing, nothing, np.ones(1), nothing) for x in (own, np.zeros(100)))
    found = compared(a, b, observed=0.01 * differ)
    assert found.p == pytest.approx(p, abs=0.02) and (found.p > 0.05) == (differ < 6)


def test_thresholds_that_move_against_few_people_do_not_make_them_many() -> None:
    own, nothing = np.zeros(100), np.empty(0)
    own[:4] = 0.01
    a = Contributions(own, own, nothing, nothing, np.full(1, -0.2), nothing)
    b = Contributions(np.zeros(100), np.zeros(100), nothing, nothing, np.full(1, -0.2), nothing)
    assert compared(a, b, observed=0.04).p == pytest.approx(0.125, abs=0.02)


def test_the_accuracy_of_a_pair_list_is_compared_with_the_noise_of_its_threshold() -> None:
    """Twenty pairs of equally good encoders: one false claim is expected; five would be 0.3 %."""
    claims = narrower = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        first, second = random.integers(0, 80, 320), random.integers(0, 80, 320)
        second[:160] = first[:160]
        same = first == second
        hidden = same + 0.35 * random.normal(size=320)
        made = []
        for _ in "AB":
            listed = ScoredList((hidden + 0.2 * random.normal(size=320)).astype(np.float32), same, first, second)
            right = (listed.scores >= best_threshold(listed.scores, same)) == same
            shifted = shifted_accuracies(listed, listed, resamples=60, seed=seed)
            fixed = shifted_accuracies(replace(listed), listed, resamples=60, seed=seed)
            assert fixed.max() <= right.mean() + 1e-9, "no other threshold is better"
            assert shifted.var() == pytest.approx(OWN * fixed.var())
            made.append((right, accuracy_contributions(right, first, second, shifted)))
        observed = float(made[0][0].mean() - made[1][0].mean())
        found = compared(made[0][1], made[1][1], observed=observed)
        held, other = (replace(one, shifted=np.empty(0)) for _, one in made)
        narrower += compared(held, other, observed=observed).ci95[1] < found.ci95[1]
        claims += found.p <= 0.05
    assert claims <= 4 and narrower == 20


def test_statistics_without_pairs_of_people_are_compared_by_resamples() -> None:
    random = np.random.default_rng(0)
    a, b = {"x": random.normal(0.5, 0.1, 200)}, {"y": random.normal(0.5, 0.1, 200)}
    assert paired(a, b, ("x", "y"), observed=0.0) == paired_difference(a["x"], b["y"], observed=0.0)
    wide = paired(a, b, ("x", "y"), observed=0.0, level=0.99)
    assert wide.ci95[1] > paired(a, b, ("x", "y"), observed=0.0).ci95[1]


def test_pairing_narrows_the_interval() -> None:
    a, b = two_encoders(1, 0.1)
    drawn = [bootstrap(s, FMR, FMR, resamples=300, seed=0).tar_balanced[:, 0] for s in (a, b)]
    other_people = bootstrap(b, FMR, FMR, resamples=300, seed=9).tar_balanced[:, 0]
    assert np.std(drawn[0] - drawn[1]) < 0.8 * np.std(drawn[0] - other_people)


def test_an_encoder_against_itself_differs_by_nothing() -> None:
    found = paired_difference(np.full(100, 0.5), np.full(100, 0.5), observed=0.0)
    assert found.ci95 == (0.0, 0.0) and found.p == 1.0


def test_different_numbers_of_resamples_are_refused() -> None:
    with pytest.raises(InputError, match="100 resamples against 200"):
        paired_difference(np.zeros(100), np.zeros(200), observed=0.0)


def test_holm_multiplies_the_smallest_most_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
