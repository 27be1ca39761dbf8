"""Paired differences, their p-values, and what several comparisons do to them."""

from __future__ import annotations

import numpy as np
import pytest

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.metrics.bootstrap import bootstrap
from pkd.toolkit.evaluation.metrics.error_rates import rates
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores, score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing
from pkd.toolkit.evaluation.metrics.resamples import holm, paired_difference

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


def difference(a: PairScores, b: PairScores) -> tuple[float, tuple[float, float], float]:
    drawn = [bootstrap(s, FMR, FMR, resamples=200, seed=0).tar_balanced[:, 0] for s in (a, b)]
    observed = float((rates(a, FMR).tar_balanced - rates(b, FMR).tar_balanced)[0])
    found = paired_difference(drawn[0], drawn[1], observed=observed)
    return found.difference, found.ci95, found.p


def test_a_worse_encoder_is_told_from_a_better_one() -> None:
    size, (low, high), p = difference(*two_encoders(0, 0.8))
    assert 0 < low <= size <= high and p == pytest.approx(2 / 201)
    other, (_, top), q = difference(*reversed(two_encoders(0, 0.8)))
    assert other == -size and top < 0 and q == p


def test_equal_encoders_are_told_apart_no_more_often_than_the_level_says() -> None:
    """Twenty pairs of encoders of one quality: of 5 % levels one false claim is expected; four would be 1.6 %."""
    claims = sum(difference(*two_encoders(seed, 0.0))[2] <= 0.05 for seed in range(20))
    assert claims <= 4


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
