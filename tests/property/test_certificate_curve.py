"""Certificate: threshold and fmr_at fall and rise as they should and undo one another, for measured curves."""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pkd.toolkit.certificates.certificate import Calibration, Certificate
from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.errors import BadVector, UnsupportedFmr
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.evaluation.metrics.error_rates import fmr_at
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing
from pkd.toolkit.evaluation.protocols.all_pairs import certify
from pkd.toolkit.evaluation.results.schema import Data, Evaluation

ENCODER = describe("tiny", "teacher", "0" * 64, Preprocess(), 6)
EVALUATION = Evaluation(
    tool="pkd test",
    created="2026-01-01T00:00:00+00:00",
    protocol="all pairs of one set",
    data=Data(name="drawn", content_digest="0" * 64, images=120, identities=60, single_image_identities=0),
    synthetic=True,
    flip=False,
    resamples=100,
    seed=0,
    teacher=ENCODER,
    student=None,
)


@cache
def measured(seed: int, coarse: bool) -> Certificate:
    """Make a certificate as pkd-evaluate does, from 60 drawn people; ``coarse``: with many equal scores."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(60), random.integers(1, 4, 60))
    vectors = random.normal(size=(60, 6))[labels] + 0.7 * random.normal(size=(len(labels), 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = (np.round(vectors * 4) / 4 if coarse else vectors).astype(np.float32)
    files = np.arange(len(labels))
    scores = score_pairs(Pairing(labels, labels, files, files, 60, unordered=True), vectors, vectors)  # type: ignore[arg-type]
    found, _ = measure(scores, "T–T", ENCODER, ENCODER, fmrs=(0.1, 0.03, 0.01, 1e-3), resamples=100, seed=0)
    assert [r.fmr for r in found.refused] == [1e-3]
    return certify(found, EVALUATION)


CASES = [(seed, coarse) for seed in range(3) for coarse in (False, True)]
CERTIFICATES = st.sampled_from(CASES).map(lambda case: measured(*case))
FINE = st.sampled_from([case for case in CASES if not case[1]]).map(lambda case: measured(*case))


@given(CERTIFICATES, st.floats(-1.5, 1.5), st.floats(-1.5, 1.5))
def test_the_rate_never_rises_with_the_score(certificate: Certificate, a: float, b: float) -> None:
    low, high = sorted((a, b))
    rate, (bottom, top), bound = certificate.fmr_at(low)
    assert rate >= certificate.fmr_at(high).fmr >= certificate.min_fmr * (1 - 1e-9)
    assert bound == (low > certificate.resolved_scores[1]) <= certificate.fmr_at(high).is_upper_bound
    assert 0 <= bottom <= rate * (1 + 1e-9) and rate <= top * (1 + 1e-9) and top <= 1 + 1e-9


@given(CERTIFICATES, st.floats(0.01, 0.1), st.floats(0.01, 0.1))
def test_the_threshold_never_falls_as_the_target_falls(certificate: Certificate, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert certificate.threshold(low) >= certificate.threshold(high)


@given(CERTIFICATES, st.floats(0.01, 0.1))
def test_the_threshold_keeps_the_target(certificate: Certificate, fmr: float) -> None:
    assert certificate.fmr_at(certificate.threshold(fmr))[0] <= fmr * (1 + 1e-6)


@given(FINE, st.floats(0.01, 0.1))
def test_threshold_and_rate_undo_one_another(certificate: Certificate, fmr: float) -> None:
    threshold, curve = certificate.threshold(fmr), certificate.calibration
    first, last = curve.score.index(threshold), bisect_right(curve.score, threshold) - 1  # scores may be there twice
    assert certificate.fmr_at(threshold).fmr <= fmr * (1 + 1e-9)
    assert curve.point[last] <= fmr * (1 + 1e-9) < curve.point[first - 1]


@pytest.mark.parametrize(("seed", "coarse"), CASES)
def test_at_a_measured_point_the_threshold_is_the_stated_one(seed: int, coarse: bool) -> None:
    certificate = measured(seed, coarse)
    for point in certificate.points:
        assert point.as_point and certificate.threshold(point.fmr) == point.as_point.threshold >= point.threshold
        assert point.as_point.tar_balanced <= point.tar_balanced
        if point.as_bound:
            assert certificate.threshold(point.fmr, "bound") == point.as_bound.threshold >= point.as_point.threshold
            assert point.as_bound.tar_balanced <= point.as_point.tar_balanced
        else:
            with pytest.raises(UnsupportedFmr, match="with 95 % confidence"):
                certificate.threshold(point.fmr, "bound")
        assert certificate.fmr_at(point.threshold)[0] <= point.fmr * (1 + 1e-9)
    first, last = certificate.resolved_scores
    assert certificate.fmr_at(-2.0) == certificate.fmr_at(first)
    assert certificate.fmr_at(first).fmr == 1.0
    resolved, beyond = certificate.fmr_at(last), certificate.fmr_at(math.nextafter(last, 2))
    assert not resolved.is_upper_bound and resolved.fmr == certificate.calibration.fmr[-1]
    assert beyond.is_upper_bound and beyond.fmr == resolved.fmr and beyond == certificate.fmr_at(math.inf)
    assert beyond.ci95 == (0.0, resolved.ci95[1])
    assert Certificate.model_validate_json(certificate.model_dump_json()) == certificate


@pytest.mark.parametrize("fmr", [0.0099, 0.11, 0.0, -1.0, math.nan, math.inf])
def test_a_rate_outside_the_points_is_refused(fmr: float) -> None:
    with pytest.raises(UnsupportedFmr, match=r"supports 0\.01 to 0\.1"):
        measured(0, False).threshold(fmr)


def test_nan_is_not_the_best_score_there_is() -> None:
    with pytest.raises(BadVector, match="NaN"):
        measured(0, False).fmr_at(math.nan)


RATES = {"point": (1.0, 0.3, 0.1), "bound": (1.0, 0.5, 0.1)}


def test_between_two_scores_the_rate_is_that_of_the_lower_one() -> None:
    curve = Calibration(score=(0.0, 0.5, 1.0), fmr=(1.0, 0.2, 0.0), low=(1.0, 0.1, 0.0), high=(1.0, 0.3, 0.1), **RATES)
    certificate = measured(0, False).model_copy(update={"calibration": curve})
    assert certificate.fmr_at(0.75) == (0.2, (0.0, 0.3), False) and certificate.fmr_at(0.5) == (0.2, (0.1, 0.3), False)
    assert curve.score_at(0.1) == 1.0


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2, 8]), st.floats(0.02, 0.9), st.integers(0, 4000))
@settings(max_examples=30)
def test_the_rate_of_a_score_is_never_below_the_measured_one(seed: int, levels: int, fmr: float, place: int) -> None:
    """Continuous scores (0 levels), tied ones (1: binary codes) and coarse ones; at every score and between."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(40), 2)
    vectors = random.normal(size=(40, 6))[labels] + 0.5 * random.normal(size=(80, 6))
    if levels:
        vectors = np.clip(np.round(vectors * levels), -levels, levels) + 1e-3
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    scores = score_pairs(Pairing(labels, labels, np.arange(80), np.arange(80), 40, unordered=True), vectors, vectors)
    found, _ = measure(scores, "T–T", ENCODER, ENCODER, fmrs=(0.9, 0.02), resamples=100, seed=0)
    certificate = certify(found, EVALUATION)
    at = float(scores.impostor[place % len(scores.impostor)])
    for score in (at, np.nextafter(at, 2), np.nextafter(at, -2), at + random.normal() * 0.05):
        rate = certificate.fmr_at(float(score))
        measured_rate = float(fmr_at(scores, np.array([score]))[0])
        assert rate.is_upper_bound or rate.fmr >= measured_rate * (1 - 1e-9)
    assert fmr_at(scores, np.array([certificate.threshold(fmr)]))[0] <= fmr * (1 + 1e-9)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2]), st.sampled_from([6, 64, 512]), st.integers(0, 4000))
@settings(max_examples=15)
def test_a_server_with_float64_scores_matches_no_more_than_was_certified(
    seed: int, levels: int, dim: int, place: int
) -> None:
    """Binary (1 level), coarse and continuous embeddings: scores that tie in float64 part in float32."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(40), 2)
    vectors = random.normal(size=(40, dim))[labels] + 0.7 * random.normal(size=(80, dim))
    if levels:
        vectors = np.clip(np.round(vectors * levels), -levels, levels) + 1e-3
    exact = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = exact.astype(np.float32)
    scores = score_pairs(Pairing(labels, labels, np.arange(80), np.arange(80), 40, unordered=True), rows, rows)
    found, _ = measure(scores, "T–T", ENCODER, ENCODER, fmrs=(0.3, 0.1, 0.02), resamples=100, seed=0)
    certificate = certify(found, EVALUATION)
    first, second = np.triu_indices(80, 1)
    served = np.einsum("nd,nd->n", exact[first], exact[second])[labels[first] != labels[second]]
    for point in certificate.points:  # of every two people as many pairs, so that both rates are one
        for threshold in (point.threshold, *(a.threshold for a in (point.as_point, point.as_bound) if a)):
            assert (served >= threshold).mean() <= point.fmr * (1 + 1e-9)
    score = float(served[place % len(served)])
    said = certificate.fmr_at(score)
    assert said.is_upper_bound or said.fmr >= (served >= score).mean() * (1 - 1e-9)


@pytest.mark.parametrize(
    "change",
    [
        {"score": (0.0, 0.2, 0.1)},
        {"fmr": (0.5, 0.6, 0.1)},
        {"low": (0.1, 0.1)},
        {"score": (), "fmr": (), "low": (), "high": (), "point": (), "bound": ()},
        {"point": (0.5, 0.6, 0.1)},
        {"bound": (0.5, 0.6)},
        {"score": (0.0, 0.1, math.nan)},
    ],
)
def test_a_curve_that_cannot_be_measured_is_refused(change: dict[str, tuple[float, ...]]) -> None:
    columns = {
        "score": (0.0, 0.1, 0.2),
        "fmr": (0.5, 0.2, 0.1),
        "low": (0.4, 0.1, 0.1),
        "high": (0.6, 0.3, 0.2),
    } | RATES
    Calibration(**columns)
    with pytest.raises(ValidationError):
        Calibration(**{**columns, **change})


def test_points_in_a_wrong_order_are_refused() -> None:
    fields = measured(0, False).model_dump()
    with pytest.raises(ValidationError, match="largest FMR to the smallest"):
        Certificate(**{**fields, "points": fields["points"][::-1]})


@pytest.mark.parametrize(
    ("change", "said"), [({"threshold": 0.987654321}, "not on the calibration"), ({"fmr": 1e-9}, "below min_fmr")]
)
def test_a_changed_point_contradicts_the_calibration(change: dict[str, float], said: str) -> None:
    fields = measured(0, False).model_dump()
    points = fields["points"]
    with pytest.raises(ValidationError, match=said):
        Certificate(**{**fields, "points": (*points[:-1], {**points[-1], **change})})


def test_a_threshold_moved_to_a_lower_score_of_the_calibration_is_refused() -> None:
    """As a patient forger would: the number is on the curve, and the curve says what it leads to."""
    fields = measured(0, False).model_dump()
    lower = next(s for s, rate in zip(*(fields["calibration"][c] for c in ("score", "fmr")), strict=True) if rate < 0.5)
    changed = {**fields["points"][0], "threshold": lower}
    with pytest.raises(ValidationError, match="the calibration says"):
        Certificate(**{**fields, "points": (changed, *fields["points"][1:])})


def test_resolved_scores_are_the_ends_of_the_calibration() -> None:
    fields = measured(0, False).model_dump()
    with pytest.raises(ValidationError, match="first score, and its first"):
        Certificate(**{**fields, "resolved_scores": (-1.0, 1.0)})
