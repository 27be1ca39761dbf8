"""Error against discard: by hand, and where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from pkd.toolkit.evaluation.metrics.discard import FRACTIONS, discard_curve, genuine_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing


def test_genuine_pairs_leave_out_an_image_with_itself_and_its_copies() -> None:
    owner, file = np.array([0, 1, 0, 0, 1]), np.array([7, 1, 2, 7, 3])
    vectors = np.eye(5, dtype=np.float32)
    vectors[2] = vectors[0]
    found = genuine_pairs(Pairing(owner, owner, file, file, 2, unordered=True), vectors, vectors)
    assert sorted(zip(found.query.tolist(), found.gallery.tolist(), found.score.tolist(), strict=True)) == [
        (0, 2, 1.0), (1, 4, 0.0), (2, 3, 0.0),
    ]  # fmt: skip
    assert len(genuine_pairs(Pairing(owner, owner, file, file, 2), vectors, vectors).score) == 6


def test_a_measure_that_knows_the_misses_removes_them_first() -> None:
    """Forty people of one pair each; the ten worst are the misses."""
    quality = np.arange(40.0)
    known = discard_curve(quality < 10, np.arange(40), quality)
    assert known.fnmr == pytest.approx([max(0, 0.25 - f) / (1 - f) for f in FRACTIONS], abs=1e-12)
    assert known.cut[[0, 2, 4]].tolist() == [0, 4, 8] and known.change_high[2] < 0
    against = discard_curve(quality >= 30, np.arange(40), quality)
    assert against.fnmr[10] == pytest.approx(0.5) and against.change_low[2] > 0
    same = discard_curve(quality < 10, np.arange(40), np.ones(40))
    assert same.fnmr == pytest.approx(np.full(len(FRACTIONS), 0.25))


def test_every_identity_weighs_the_same() -> None:
    """One person of a hundred pairs is not worth more than one of a single pair."""
    identity = np.array([0] * 100 + [1, 2, 3])
    missed = np.array([True] * 100 + [False] * 3)
    assert discard_curve(missed, identity, np.arange(103.0)).fnmr[0] == pytest.approx(0.25)


def test_a_measure_that_knows_nothing_is_not_said_to_help() -> None:
    random = np.random.default_rng(5)
    helps = 0
    for seed in range(40):
        identity = np.repeat(np.arange(60), 4)
        missed = random.random(240) < 0.2
        curve = discard_curve(missed, identity, random.random(240), seed=seed, resamples=100)
        helps += curve.change_high[2] < 0 or curve.change_low[2] > 0
    assert helps <= 6  # 2 of 40 are expected at 95 %
