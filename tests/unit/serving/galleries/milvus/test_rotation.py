"""A rotation keeps cosines, hides coordinates, and is no encryption."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pkd.serving.galleries.milvus.records import Rotation, normals

SEED, OTHER = bytes(range(32)), bytes(32)
NORMALS = [0.5103279641181554, 0.0802389320878981, -0.38583706272406115, 1.1715779593847049]


def unit(count: int, dim: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(1).standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("dim", [1, 2, 15, 128])
def test_cosines_stay_and_vectors_come_back(dim: int) -> None:
    vectors = unit(50, dim)
    rotation = Rotation(SEED, dim)
    hidden = rotation.hide(vectors)
    assert hidden.dtype == np.float32
    np.testing.assert_allclose(hidden @ hidden.T, vectors @ vectors.T, atol=1e-6)
    np.testing.assert_allclose(rotation.reveal(hidden), vectors, atol=1e-6)


def test_hidden_vectors_say_nothing_of_their_coordinates() -> None:
    vectors = unit(200, 128)
    hidden = Rotation(SEED, 128).hide(vectors)
    # Of two independent directions in 128 dimensions the cosine has standard deviation 1/√128 = 0.09.
    assert abs((vectors * hidden).sum(1)).mean() < 0.15
    other = Rotation(OTHER, 128).hide(vectors)
    assert abs((hidden * other).sum(1)).mean() < 0.15


def test_a_seed_gives_the_same_rotation_for_ever() -> None:
    vectors = unit(3, 16)
    np.testing.assert_array_equal(Rotation(SEED, 16).hide(vectors), Rotation(SEED, 16).hide(vectors))
    # Computed with `openssl enc -aes-256-ctr` for the stream and Box–Muller by hand: what is stored depends on them.
    np.testing.assert_allclose(normals(SEED, 4), NORMALS, rtol=1e-12)


def test_the_numbers_are_normal() -> None:
    numbers = normals(SEED, 100_001)
    assert len(numbers) == 100_001
    assert abs(numbers.mean()) < 0.02
    assert abs(numbers.std() - 1) < 0.02
    assert abs(np.mean(np.abs(numbers) < 1) - 0.6827) < 0.01


def test_it_is_no_encryption() -> None:
    """As docs/galleries.md says: D known pairs give the rotation away, and with it every other vector."""
    vectors = unit(40, 32)
    hidden = Rotation(SEED, 32).hide(vectors)
    stolen, *_ = np.linalg.lstsq(hidden[:32].astype(np.float64), vectors[:32].astype(np.float64), rcond=None)
    np.testing.assert_allclose(hidden[32:] @ stolen, vectors[32:], atol=1e-3)
