"""Any similarity transform is recovered from five points, and its inverse undoes it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pkd.toolkit.images.alignment import TEMPLATE, similarity

finite = st.floats(-500, 500)


@given(st.floats(0.01, 50), st.floats(-np.pi, np.pi), finite, finite)
def test_recovers_any_similarity_exactly(scale: float, angle: float, x: float, y: float) -> None:
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    placed = TEMPLATE @ turn.T + [x, y]
    matrix = similarity(placed)
    np.testing.assert_allclose(placed @ matrix[:, :2].T + matrix[:, 2], TEMPLATE, atol=1e-6)


@given(st.integers(0, 2**32 - 1), st.floats(-0.05, 0.05), st.floats(-0.05, 0.05), st.floats(-2, 2), st.floats(-2, 2))
def test_no_other_similarity_fits_better(seed: int, grow: float, turn: float, x: float, y: float) -> None:
    """Least squares: any small change of scale, angle or shift leaves a larger or equal error."""
    points = np.random.default_rng(seed).normal(0, 40, (5, 2)) + 100

    def error(matrix: np.ndarray) -> float:
        return float(((points @ matrix[:, :2].T + matrix[:, 2] - TEMPLATE) ** 2).sum())

    best = similarity(points)
    change = (1 + grow) * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    other = np.column_stack([change @ best[:, :2], change @ best[:, 2] + [x, y]])
    assert error(best) <= error(other) * (1 + 1e-9)
