"""Intervals, resolution and pair-list accuracy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.stats import beta

from pkd.toolkit.core.errors import UnsupportedFmr
from pkd.toolkit.evaluation.metrics import bootstrap as bootstrap_module
from pkd.toolkit.evaluation.metrics import error_rates
from pkd.toolkit.evaluation.metrics.bootstrap import (
    accuracy_interval,
    accuracy_variance,
    bootstrap,
    fmr_variance,
    interval,
    resampled_accuracies,
)
from pkd.toolkit.evaluation.metrics.error_rates import (
    fmr_at,
    impostor_cumulative,
    rates,
    raw_impostor_cumulative,
    require_resolved,
    smallest_fmr,
)
from pkd.toolkit.evaluation.metrics.intervals import proportion_interval
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores, score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing
from pkd.toolkit.evaluation.protocols.pair_list import best_threshold, out_of_fold

FMR = np.array([0.05])


def people(identities: int, per: int, seed: int) -> PairScores:
    """Faces as vectors: a centre per person plus noise that differs from person to person."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(identities), per)
    spread = random.uniform(0.4, 2.0, identities)
    centres = random.normal(size=(identities, 12)) + 0.5
    vectors = centres[labels] + spread[labels, None] * random.normal(size=(len(labels), 12))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    files = np.arange(len(labels))
    return score_pairs(Pairing(labels, labels, files, files, identities, unordered=True), vectors, vectors)


def width(ends: tuple[float, float]) -> float:
    return ends[1] - ends[0]


def test_intervals_repeat_with_the_seed_and_change_with_another() -> None:
    scores = people(40, 4, 0)
    first, again, other = (bootstrap(scores, FMR, FMR, resamples=50, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.tar, again.tar)
    np.testing.assert_array_equal(first.fmr, again.fmr)
    assert (first.tar != other.tar).any()


@pytest.mark.parametrize(("at_once", "block"), [(1, 1 << 15), (10_000, 100), (1 << 18, 4096)])
def test_resamples_are_to_the_bit_those_of_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, at_once: int, block: int
) -> None:
    """However many are measured at once, and in however long blocks their pairs are summed up."""
    monkeypatch.setattr(bootstrap_module, "AT_ONCE", at_once)
    monkeypatch.setattr(error_rates, "BLOCK", block)
    scores = people(30, 3, 1)
    fmrs, thresholds = np.array([0.2, 0.05, 0.02, 0.003]), np.array([-2.0, 0.3, 0.8, 2.0])
    found = bootstrap(scores, fmrs, thresholds, resamples=11, seed=5)
    random = np.random.default_rng(5)
    query, gallery = scores.impostor_identities
    last = [(scores.impostor >= t).sum() for t in thresholds]
    for r in range(11):
        drawn = random.multinomial(30, np.full(30, 1 / 30)).astype(np.float64)
        weight = drawn[query] + drawn[gallery] - 1
        own = drawn[scores.genuine_identity]
        for part, total, tar, full, accepted in (
            (scores.share, 435 + (drawn - 1).sum() * 29, found.tar_balanced, impostor_cumulative, own / 3),
            (scores.weight, 9 * (435 + (drawn - 1).sum() * 29), found.tar, raw_impostor_cumulative, own),
        ):
            fmr, everyone = np.cumsum(weight * part) / total, full(scores, np.ones(30))
            spread = fmr_variance(scores, np.searchsorted(everyone, fmrs, "right"), raw=tar is found.tar)
            shrink = np.nan_to_num(np.sqrt(spread.total / spread.resampled), nan=1.0)
            for k, target in enumerate(fmrs * (1 + 1e-9)):
                low, high = 0, len(fmr)
                while low < high:
                    middle = (low + high) // 2
                    within = shrink[k] * fmr[middle] + (1 - shrink[k]) * everyone[middle] <= target
                    low, high = (middle + 1, high) if within else (low, middle)
                matched = (scores.genuine > np.append(scores.impostor, -np.inf)[low]).sum()
                sums = np.append(0.0, np.cumsum(accepted))
                assert tar[r, k] == sums[matched] / sums[-1]
            if tar is found.tar_balanced:
                np.testing.assert_array_equal(found.fmr[r], np.clip(np.append(0.0, fmr)[last], 0, 1))


def test_identity_level_interval_is_wider_than_one_that_draws_pairs() -> None:
    """Pairs that share a person are not independent: drawing pairs pretends to know too much."""
    scores = people(40, 8, 3)
    threshold = rates(scores, FMR).threshold
    ours = bootstrap(scores, FMR, threshold, resamples=400, seed=0)
    random = np.random.default_rng(0)
    accepted, false = scores.genuine >= threshold, scores.impostor >= threshold
    pair_tar = np.array([random.choice(accepted, len(accepted)).mean() for _ in range(400)])
    pair_fmr = np.array([random.choice(false, len(false)).mean() for _ in range(400)])
    assert width(interval(ours.tar[:, 0])) > 2 * width(interval(pair_tar))
    assert width(interval(ours.fmr[:, 0])) > 1.5 * width(interval(pair_fmr))


def test_interval_of_the_fmr_covers_the_truth_about_as_often_as_it_says() -> None:
    """FMR at a fixed threshold over fresh draws of 40 people, against that of 900 people. Loose: 80 trials."""
    threshold = np.array([0.55])
    truth = np.mean([fmr_at(people(300, 3, 900 + s), threshold)[0] for s in range(3)])
    covered = 0
    for trial in range(80):
        low, high = bootstrap(people(40, 3, trial), FMR, threshold, resamples=1, seed=trial).fmr_interval(0)
        covered += bool(low <= truth <= high)
    assert 0.85 <= covered / 80 <= 1.0


def test_the_noise_of_pairs_is_counted_once() -> None:
    """Of people who are all alike only pairs vary: the spread over fresh sets is what the interval says, and the plain
    percentiles of the resamples are about √2 as wide.
    """

    def alike(seed: int) -> PairScores:
        random = np.random.default_rng(seed)
        vectors = random.normal(size=(120, 12))
        unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        labels, files = np.arange(120) // 2, np.arange(120)
        return score_pairs(Pairing(labels, labels, files, files, 60, unordered=True), unit, unit)

    threshold = np.array([0.62])
    fresh = np.array([fmr_at(alike(seed), threshold)[0] for seed in range(200)])
    ours, plain = [], []
    for seed in range(20):
        drawn = bootstrap(alike(seed), FMR, threshold, resamples=150, seed=seed)
        low, high = drawn.fmr_interval(0)
        ours.append(np.sqrt(drawn.variance.total[0]))
        assert np.log(high / low) / (2 * 1.96) * drawn.observed_fmr[0] > ours[-1]
        plain.append(drawn.fmr[:, 0].std())
        assert width(drawn.prediction(0)) > 1.3 * width((low, high))
    assert np.mean(ours) == pytest.approx(fresh.std(), rel=0.25)
    assert np.mean(plain) > 1.2 * fresh.std()


def test_of_no_match_the_interval_says_what_so_many_pairs_of_people_can() -> None:
    scores = people(20, 2, 0)
    drawn = bootstrap(scores, FMR, np.array([2.0]), resamples=50, seed=0)
    assert drawn.fmr_interval(0) == (0.0, pytest.approx(-np.log(0.025) / 190))


def test_smallest_fmr_follows_the_pairs_of_people_and_not_of_images() -> None:
    few, many = people(46, 2, 0).pairing, people(46, 9, 0).pairing
    assert few.impostor_pairs * 15 < many.impostor_pairs
    assert smallest_fmr(few) == smallest_fmr(many) == pytest.approx(10 / (46 * 45 / 2))
    require_resolved(few, 0.01)
    with pytest.raises(UnsupportedFmr, match=r"FMR 0.001 is not resolved.*1,035 pairs of different .*0.00967"):
        require_resolved(many, 1e-3)


def test_a_draw_without_genuine_pairs_is_drawn_again() -> None:
    scores = people(2, 2, 0)
    drawn = bootstrap(scores, np.array([0.5]), np.array([0.0]), resamples=60, seed=0)
    assert np.isfinite(drawn.tar).all() and np.isfinite(drawn.fmr).all()


def test_best_threshold_separates_and_keeps_equal_scores_together() -> None:
    scores = np.array([0.9, 0.8, 0.4, 0.3], np.float32)
    assert best_threshold(scores, np.array([True, True, False, False])) == pytest.approx(0.6)
    tied = np.array([0.9, 0.5, 0.5, 0.5, 0.1], np.float32)
    threshold = best_threshold(tied, np.array([True, True, True, False, False]))
    assert 0.1 < threshold < 0.5
    assert best_threshold(tied, np.array([False] * 5)) > 0.9
    assert best_threshold(tied, np.array([True] * 5)) < 0.1


def test_a_fold_is_decided_at_the_threshold_of_the_others() -> None:
    """Fold 2's scores lie elsewhere: its own best threshold would give 1.0, the others' gives 0.5."""
    scores = np.array([0.9, 0.1, 0.8, 0.2, 0.45, 0.35], np.float32)
    same = np.array([True, False] * 3)
    fold = np.array([0, 0, 1, 1, 2, 2])
    right, thresholds = out_of_fold(scores, same, fold)
    assert thresholds[2] == pytest.approx(0.5)
    assert right.tolist() == [True, True, True, True, False, True]


def test_accuracy_interval_holds_the_accuracy_and_knows_certainty() -> None:
    random = np.random.default_rng(0)
    same = np.repeat([True, False], 150)
    first = random.integers(0, 100, 300)
    second = np.where(same, first, (first + 1 + random.integers(0, 98, 300)) % 100)
    right = random.random(300) < 0.9
    low, high = accuracy_interval(right, same, first, second)
    assert low < right.mean() < high and 0.03 < high - low < 0.2
    everything = np.ones(300, bool)
    assert (resampled_accuracies(everything, same, first, second, resamples=100, seed=0) == 1).all()
    low, high = accuracy_interval(everything, same, first, second)
    assert low == pytest.approx(0.025 ** (1 / 100), abs=0.02) and high == 1


def test_the_noise_of_a_listed_pair_is_counted_once_and_people_together() -> None:
    """Of independent decisions the variance is binomial; of people who always or never match it is that of people."""
    random = np.random.default_rng(1)
    same = np.repeat([True, False], 1500)
    first = random.integers(0, 300, 3000)
    second = np.where(same, first, (first + 1 + random.integers(0, 298, 3000)) % 300)
    right = random.random(3000) < 0.8
    deviation = np.sqrt(accuracy_variance(right, same, first, second))
    assert deviation == pytest.approx(np.sqrt(0.8 * 0.2 / 3000), rel=0.15)
    drawn = resampled_accuracies(right, same, first, second, resamples=400, seed=0)
    assert drawn.std() == pytest.approx(deviation) and drawn.mean() == pytest.approx(right.mean(), abs=1e-3)
    always = (random.random(300) < 0.8)[first] | ~same
    assert np.sqrt(accuracy_variance(always, same, first, second)) > 1.8 * np.sqrt(always.var() / 3000)


def test_where_nobody_fails_an_interval_is_that_of_as_many_people() -> None:
    assert proportion_interval(1.0, 0.0, 100) == (pytest.approx(0.025 ** (1 / 100)), 1.0)
    assert proportion_interval(0.0, 0.0, 100) == (0.0, pytest.approx(1 - 0.025 ** (1 / 100)))
    scores = people(60, 3, 0)
    every = dataclasses.replace(scores, genuine=np.ones_like(scores.genuine))
    low, high = bootstrap(every, FMR, FMR, resamples=50, seed=0).tar_balanced_interval(0)
    assert low == pytest.approx(0.025 ** (1 / 60)) and high == 1.0


def test_the_binomial_interval_is_that_of_scipy() -> None:
    hits, trials = 37.0, 80.0
    rate, people_count = hits / trials, 1e6
    low, high = proportion_interval(rate, rate * (1 - rate) / trials, people_count)
    assert (low, high) == pytest.approx(
        (beta.ppf(0.025, hits, trials - hits + 1), beta.ppf(0.975, hits + 1, trials - hits)), abs=1e-5
    )
