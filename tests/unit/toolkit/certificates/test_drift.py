"""The sequential test of certificates: what it bets, that it keeps its promise, and that it notices."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pkd.toolkit.certificates import drift
from pkd.toolkit.certificates.certificate import Certificate
from tests.support.serving_bundles import certificate, encoder, weights


@pytest.fixture(scope="module")
def certified() -> Certificate:
    """Thresholds 0.5, 0.6 and 0.7 at FMR 1e-2, 1e-3 and 1e-4."""
    teacher = encoder("teacher", weights(1))
    return certificate(teacher.info, teacher.info, identities=2000, identity_pairs=1_999_000, impostor_pairs=4_000_000)


def test_a_bet_is_fair_at_the_promise_and_loses_below_it() -> None:
    for promised in (1e-5, 0.01, 0.3, 0.89):
        yes, no = (drift.Observation(1e-3, reached, promised, promised).logs for reached in (True, False))
        for gain, loss in zip(yes, no, strict=True):
            assert promised * math.exp(gain) + (1 - promised) * math.exp(loss) == pytest.approx(1)
            less = promised / 2
            assert less * math.exp(gain) + (1 - less) * math.exp(loss) < 1


def test_few_people_are_allowed_more(certified: Certificate) -> None:
    point = certified.points[1]
    rates = [drift.widened(certified, point, people) for people in (5, 50, 500, 5000)]
    assert rates == sorted(rates, reverse=True) and rates[-1] > point.fmr
    assert rates[-1] < 30 * point.fmr < rates[0]


def test_a_search_is_held_to_as_many_comparisons_as_it_made(certified: Certificate) -> None:
    seen = drift.searched(certified, 0.65, 10, 1000)
    assert [(one.fmr, one.exceeded) for one in seen] == [(1e-2, True), (1e-3, True), (1e-4, False)]
    few, many = (drift.searched(certified, 0.65, n, 1000)[-1] for n in (10, 100))
    assert many.promised == pytest.approx(10 * few.promised)
    assert drift.searched(certified, 0.65, 10**9, 1000) == []  # somebody always reaches it: nothing is told


def test_a_refused_verification_counts_between_point_and_threshold(certified: Certificate) -> None:
    def reached(score: float, threshold: float = 0.6) -> list[bool]:
        return [one.exceeded for one in drift.verified(certified, score, threshold, 1, 1000)]

    assert (reached(0.55), reached(0.45), reached(0.65)) == ([True], [False], [False])
    assert reached(0.55, 0.5) == [] and reached(0.55, 0.8) == []
    one, several = (drift.verified(certified, 0.55, 0.6, n, 1000)[0].promised for n in (1, 3))
    assert one < several


def run(random: np.random.Generator, certified: Certificate, rate: float, count: int = 3000) -> float:
    """Return the largest evidence while ``count`` searches of 10 templates reach the first point with this rate."""
    logs: dict[float, list[float]] = {}
    top = 0.0
    for reached in random.random(count) < rate:
        for one in drift.searched(certified, 0.55 if reached else 0.0, 10, 1000):
            sums = logs.setdefault(one.fmr, [0.0] * len(drift.RATIOS))
            logs[one.fmr] = [a + b for a, b in zip(sums, one.logs, strict=True)]
        top = max(top, drift.evidence(certified, list(logs.values())))
    return top


def test_nothing_is_reported_at_the_very_edge_of_the_promise(certified: Certificate) -> None:
    (edge, *_) = (one.promised for one in drift.searched(certified, 0.0, 10, 1000))
    alarms = [run(np.random.default_rng(i), certified, edge, 300) >= drift.alarm_at() for i in range(40)]
    assert np.mean(alarms) <= drift.ALPHA
    assert run(np.random.default_rng(0), certified, 3 * edge) >= drift.alarm_at()


def test_what_was_never_observed_keeps_its_share(certified: Certificate) -> None:
    assert drift.evidence(certified, []) == 1
    assert drift.evidence(certified, [[0.0] * len(drift.RATIOS)]) == pytest.approx(1)
    assert drift.evidence(certified, [[1e6] * len(drift.RATIOS)]) > 1e100
