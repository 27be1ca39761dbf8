"""Certificate: threshold and fmr_at fall and rise as they should and undo one another, for measured curves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pkd.toolkit.certificate import Calibration, Certificate
from pkd.toolkit.errors import BadVector, UnsupportedFmr
from pkd.toolkit.evaluation.measure import certify, measure
from pkd.toolkit.evaluation.pairs import Pairing
from pkd.toolkit.evaluation.results import Data
from pkd.toolkit.evaluation.scores import score_pairs
from pkd.toolkit.preprocess import Preprocess
from pkd.toolkit.space import describe

ENCODER = describe("tiny", "teacher", "0" * 64, Preprocess(), 6)
DATA = Data(name="drawn", content_digest="0" * 64, images=1, identities=1, single_image_identities=0)


def measured(seed: int, coarse: bool) -> Certificate:
    """A certificate as pkd-evaluate makes it, from 60 drawn people; ``coarse``: with many equal scores."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(60), random.integers(1, 4, 60))
    vectors = random.normal(size=(60, 6))[labels] + 0.7 * random.normal(size=(len(labels), 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = (np.round(vectors * 4) / 4 if coarse else vectors).astype(np.float32)
    files = np.arange(len(labels))
    scores = score_pairs(Pairing(labels, labels, files, files, 60, unordered=True), vectors, vectors)
    found = measure(scores, "T–T", ENCODER, ENCODER, fmrs=(0.1, 0.03, 0.01, 1e-3), resamples=100, seed=0)
    assert [r.fmr for r in found.refused] == [1e-3]
    return certify(found, ENCODER.space, DATA, synthetic=True)


CERTIFICATES = [measured(seed, coarse) for seed in range(3) for coarse in (False, True)]
FINE = [c for i, c in enumerate(CERTIFICATES) if i % 2 == 0]


@given(st.sampled_from(CERTIFICATES), st.floats(-1.5, 1.5), st.floats(-1.5, 1.5))
@settings(deadline=None)
def test_the_rate_never_rises_with_the_score(certificate: Certificate, a: float, b: float) -> None:
    low, high = sorted((a, b))
    rate, (bottom, top) = certificate.fmr_at(low)
    assert rate >= certificate.fmr_at(high)[0] >= certificate.min_fmr * (1 - 1e-9)
    assert 0 <= bottom <= rate * (1 + 1e-9) and rate <= top * (1 + 1e-9) and top <= 1 + 1e-9


@given(st.sampled_from(CERTIFICATES), st.floats(0.01, 0.1), st.floats(0.01, 0.1))
@settings(deadline=None)
def test_the_threshold_never_falls_as_the_target_falls(certificate: Certificate, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert certificate.threshold(low) >= certificate.threshold(high)


@given(st.sampled_from(CERTIFICATES), st.floats(0.01, 0.1))
@settings(deadline=None)
def test_the_threshold_keeps_the_target(certificate: Certificate, fmr: float) -> None:
    assert certificate.fmr_at(certificate.threshold(fmr))[0] <= fmr * (1 + 1e-6)


@given(st.sampled_from(FINE), st.floats(0.01, 0.1))
@settings(deadline=None)
def test_threshold_and_rate_undo_one_another(certificate: Certificate, fmr: float) -> None:
    step = 2 / certificate.impostor_pairs  # knots closer than one impostor pair share a score
    assert certificate.fmr_at(certificate.threshold(fmr))[0] == pytest.approx(fmr, rel=1e-6, abs=step)


@pytest.mark.parametrize("certificate", CERTIFICATES)
def test_at_a_measured_point_the_threshold_is_the_measured_one(certificate: Certificate) -> None:
    for point in certificate.points:
        assert certificate.threshold(point.fmr) == point.threshold
        assert certificate.fmr_at(point.threshold)[0] <= point.fmr * (1 + 1e-9)
    assert certificate.fmr_at(-2.0)[0] == 1.0
    assert certificate.fmr_at(math.inf)[0] == certificate.calibration.fmr[-1]
    assert Certificate.model_validate_json(certificate.model_dump_json()) == certificate


@pytest.mark.parametrize("fmr", [0.0099, 0.11, 0.0, -1.0, math.nan, math.inf])
def test_a_rate_outside_the_points_is_refused(fmr: float) -> None:
    with pytest.raises(UnsupportedFmr, match=r"supports 0\.01 to 0\.1"):
        CERTIFICATES[0].threshold(fmr)


def test_nan_is_not_the_best_score_there_is() -> None:
    with pytest.raises(BadVector, match="NaN"):
        CERTIFICATES[0].fmr_at(math.nan)


def test_a_curve_that_ends_in_zero_is_straight_there() -> None:
    curve = Calibration(score=(0.0, 0.5, 1.0), fmr=(1.0, 0.2, 0.0), low=(1.0, 0.1, 0.0), high=(1.0, 0.3, 0.1))
    certificate = CERTIFICATES[0].model_copy(update={"calibration": curve})
    assert certificate.fmr_at(0.75)[0] == pytest.approx(0.1)
    assert curve.score_at(0.1) == pytest.approx(0.75)


@pytest.mark.parametrize(
    "change",
    [
        {"score": (0.0, 0.2, 0.1)},
        {"fmr": (0.5, 0.6, 0.1)},
        {"low": (0.1, 0.1)},
        {"score": (), "fmr": (), "low": (), "high": ()},
        {"score": (0.0, 0.1, math.nan)},
    ],
)
def test_a_curve_that_cannot_be_measured_is_refused(change: dict[str, tuple[float, ...]]) -> None:
    columns = {"score": (0.0, 0.1, 0.2), "fmr": (0.5, 0.2, 0.1), "low": (0.4, 0.1, 0.1), "high": (0.6, 0.3, 0.2)}
    Calibration(**columns)
    with pytest.raises(ValidationError):
        Calibration(**{**columns, **change})


def test_points_in_a_wrong_order_are_refused() -> None:
    fields = CERTIFICATES[0].model_dump()
    with pytest.raises(ValidationError, match="largest FMR to the smallest"):
        Certificate(**{**fields, "points": fields["points"][::-1]})
