"""Thresholds beyond what a certificate resolves: a straight line in log FMR, marked."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkd.toolkit.certificates.certificate import Calibration
from pkd.toolkit.certificates.extrapolation import extrapolated, threshold_for
from pkd.toolkit.core.errors import UnsupportedFmr
from tests.support import serving_bundles as made

INFO = made.encoder("teacher", made.weights(1)).info
CERTIFICATE = made.certificate(INFO, INFO)
"""0.5, 0.6, 0.7 at FMR 1e-2, 1e-3, 1e-4."""


def curve(scores: Any, rates: Any) -> Any:
    fmr = tuple(rates)
    return Calibration(score=tuple(scores), fmr=fmr, low=fmr, high=fmr, point=fmr, bound=fmr)


def test_by_hand() -> None:
    """The last decade is 0.1 wide, so that every further decade costs 0.1."""
    assert threshold_for(CERTIFICATE, 1e-6).score == pytest.approx(0.9)
    assert not threshold_for(CERTIFICATE, 1e-6).calibrated
    assert threshold_for(CERTIFICATE, 1e-8).score == pytest.approx(1.1), "no pair can reach it, and that is said"


def test_within_the_points_it_is_the_certificates() -> None:
    for fmr in (1e-2, 3e-3, 1e-3, 1e-4):
        assert threshold_for(CERTIFICATE, fmr) == (CERTIFICATE.threshold(fmr), True)


def test_a_bound_is_as_much_stricter_as_at_the_last_resolved_rate() -> None:
    """Each bound is twice the rate, so that it costs what half the rate does."""
    assert threshold_for(CERTIFICATE, 1e-2, "bound") == (0.6, True)
    for fmr in (1e-5, 1e-7):
        assert threshold_for(CERTIFICATE, fmr, "bound").score == pytest.approx(
            threshold_for(CERTIFICATE, fmr / 2).score
        )
        assert not threshold_for(CERTIFICATE, fmr, "bound").calibrated
    assert threshold_for(CERTIFICATE, 1e-4, "bound").score >= threshold_for(CERTIFICATE, 2e-4, "bound").score


def test_a_larger_rate_gets_the_largest_that_was_measured() -> None:
    assert threshold_for(CERTIFICATE, 0.5) == (0.5, True)


def test_an_exponential_tail_is_met_exactly() -> None:
    scores = [-1 + i / 50 for i in range(80)]
    measured = curve(scores, [math.exp(-8 * (score + 1)) for score in scores])
    for fmr in (1e-7, 1e-9, 1e-12):
        assert extrapolated(measured, fmr) == pytest.approx(-1 - math.log(fmr) / 8)


def test_a_normal_tail_makes_it_too_strict_never_too_lax() -> None:
    impostors = NormalDist(0, 0.13)
    scores = [-0.3 + i / 100 for i in range(80)]
    measured = curve(scores, [1 - impostors.cdf(score) for score in scores])
    for fmr in (1e-10, 1e-12):
        found = extrapolated(measured, fmr)
        assert found is not None and 1 - impostors.cdf(found) < fmr


def test_between_the_last_point_and_the_last_resolved_rate_the_curve_is_followed_but_marked() -> None:
    c = CERTIFICATE.calibration
    finer = curve((*c.score, 0.72), (*c.fmr, 5e-5))
    certificate = CERTIFICATE.model_copy(update={"calibration": finer})
    assert threshold_for(certificate, 5e-5) == (pytest.approx(0.72), False)


def test_rates_of_zero_are_no_tail() -> None:
    measured = curve((-1.0, 0.5, 0.6, 0.8), (1.0, 1e-2, 1e-3, 0.0))
    assert extrapolated(measured, 1e-5) == pytest.approx(0.8)


def test_less_than_a_decade_is_followed_as_far_as_it_goes() -> None:
    assert extrapolated(curve((-1.0, 0.0), (1.0, 0.5)), 0.25) == pytest.approx(1.0)


@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.0, 0.0)])
def test_a_flat_curve_leads_nowhere(rates: Any) -> None:
    flat = curve((-1.0, 0.7), rates)
    assert extrapolated(flat, 1e-6) is None
    with pytest.raises(UnsupportedFmr, match="no tail"):
        threshold_for(CERTIFICATE.model_copy(update={"calibration": flat}), 1e-6)


@given(st.lists(st.floats(-9, -0.1), min_size=2, max_size=12))
def test_it_never_falls_as_the_rate_falls(exponents: Any) -> None:
    thresholds = [threshold_for(CERTIFICATE, 10**exponent).score for exponent in sorted(exponents, reverse=True)]
    assert all(a <= b + 1e-12 for a, b in pairwise(thresholds))
