"""Linear maps between spaces, against scikit-learn and closed forms, and what they do to scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import Embeddings, unit_rows
from pkd.toolkit.encoders.linear_maps import (
    LinearMapEncoder,
    describe_mapped,
    fit_procrustes,
    fit_ridge,
    moments,
)
from pkd.toolkit.evaluation.metrics.error_rates import rates
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Pairing
from pkd.toolkit.images.codec import Rgb


def unit(random: np.random.Generator, n: int, d: int) -> Embeddings:
    return unit_rows(random.normal(size=(n, d)).astype(np.float32))


def orthogonal(random: np.random.Generator, d: int) -> Doubles:
    q, r = np.linalg.qr(random.normal(size=(d, d)))
    turned: Doubles = q * np.sign(np.diag(r))
    return turned


@settings(max_examples=25)
@given(st.integers(2, 12), st.integers(0, 10_000))
def test_procrustes_recovers_any_rotation(d: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x, turn = unit(random, 4 * d + 3, d), orthogonal(random, d)
    weight, bias = fit_procrustes(moments(x, (x @ turn).astype(np.float32)))
    np.testing.assert_allclose(weight, turn, atol=1e-5)
    assert not bias.any()


@pytest.mark.parametrize(("d", "big"), [(5, 9), (9, 5)])
def test_procrustes_between_sizes_is_orthonormal_and_no_other_such_map_agrees_more(d: int, big: int) -> None:
    random = np.random.default_rng(0)
    x = unit(random, 200, d)
    y = unit_rows((x @ random.normal(size=(d, big)) + 0.3 * random.normal(size=(200, big))).astype(np.float32))
    weight, _ = fit_procrustes(moments(x, y))
    short = weight @ weight.T if d < big else weight.T @ weight
    np.testing.assert_allclose(short, np.eye(min(d, big)), atol=1e-10)
    best = ((x @ weight) * y).sum()
    for _ in range(50):
        other = orthogonal(random, max(d, big))[:d, :big]
        assert ((x @ other) * y).sum() < best
        if d < big:
            assert ((x @ other - y) ** 2).sum() > ((x @ weight - y) ** 2).sum()


@pytest.mark.parametrize("penalty", [1e-6, 1e-3, 0.1])
def test_ridge_is_scikit_learn_s(penalty: float) -> None:
    random = np.random.default_rng(1)
    x = unit(random, 300, 7)
    y = unit_rows((x @ random.normal(size=(7, 4)) + 0.5 + 0.2 * random.normal(size=(300, 4))).astype(np.float32))
    weight, bias = fit_ridge(moments(x, y), penalty)
    oracle = Ridge(alpha=penalty * len(x)).fit(x.astype(np.float64), y.astype(np.float64))
    np.testing.assert_allclose(weight, oracle.coef_.T, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(bias, oracle.intercept_, rtol=1e-8, atol=1e-10)


def test_moments_are_the_same_in_blocks_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(2)
    x, y = unit(random, 101, 6), unit(random, 101, 3)
    whole = moments(x, y)
    monkeypatch.setattr("pkd.toolkit.encoders.linear_maps.BLOCK", 7)
    for other in (moments(x, y), moments(x[:40], y[:40]) + moments(x[40:], y[40:])):
        assert other.n == 101
        np.testing.assert_allclose(other.xy, whole.xy, rtol=1e-12)
        np.testing.assert_allclose(other.xx, whole.xx, rtol=1e-12)
        np.testing.assert_allclose(other.y, whole.y, rtol=1e-12)


class Fixed:
    """An encoder whose embedding is the crop's first numbers."""

    def __init__(self, d: int) -> None:
        self.info = describe("fixed", "teacher", "0" * 64, Preprocess(), d)

    def embed(self, crops: Rgb) -> Embeddings:
        return unit_rows(crops.reshape(len(crops), -1)[:, : self.info.space.dim].astype(np.float32) + 1)


def test_a_mapped_encoder_is_one_more_encoder_with_an_id_of_its_own() -> None:
    base = Fixed(4)
    space = describe("teacher", "teacher", "1" * 64, Preprocess(), 6).space
    weight, bias = np.random.default_rng(0).normal(size=(4, 6)), np.full(6, 0.1)
    mapped = LinearMapEncoder(base, weight, bias, describe_mapped(base.info, "ridge", weight, bias, space))
    crops = np.random.default_rng(1).integers(0, 256, (3, 112, 112, 3)).astype(np.uint8)
    found = mapped.embed(crops)
    expected = base.embed(crops) @ weight + bias
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    assert found.dtype == np.float32 and mapped.info.space == space and mapped.info.name == "fixed-ridge"
    ids = {describe_mapped(base.info, "ridge", w, bias, space).id for w in (weight, 2 * weight)}
    assert len(ids | {base.info.id}) == 3


def test_two_spaces_are_at_chance_before_a_map_and_well_above_after_it() -> None:
    """People as points; two encoders see them through different random matrices."""
    random = np.random.default_rng(3)
    labels = np.repeat(np.arange(120), 4)
    faces = random.normal(size=(120, 10))[labels] + 0.25 * random.normal(size=(len(labels), 10))
    control = unit_rows((faces @ random.normal(size=(10, 16))).astype(np.float32))
    teacher = unit_rows((faces @ random.normal(size=(10, 16))).astype(np.float32))
    fit, test = labels < 60, labels >= 60
    files = np.arange(test.sum())
    pairing = Pairing(labels[test] - 60, labels[test] - 60, files, files, 60)

    def accepted(query: Embeddings) -> float:
        return float(rates(score_pairs(pairing, query, teacher[test]), np.array([0.01])).tar_balanced[0])

    before = accepted(control[test])
    seen = moments(control[fit], teacher[fit])
    ridge, bias = fit_ridge(seen, 1e-6)
    turn, _ = fit_procrustes(seen)
    assert before < 0.1
    assert accepted(unit_rows((control[test] @ ridge + bias).astype(np.float32))) > 0.8
    assert accepted(unit_rows((control[test] @ turn).astype(np.float32))) > 3 * max(before, 0.03)
