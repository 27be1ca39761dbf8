"""Paint synthetic faces: anti-aliased polygons and lines on a planar float canvas in crop units.

Crop units are pixels of the 112×112 crop; the canvas reaches beyond it, because a turned head shows what lies there.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Plane = NDArray[np.float32]
"""float32 rows×columns, or 3×rows×columns for colour: planes keep numpy's inner loops long."""
Points = NDArray[np.float64]
"""N×2 points (x, y) in crop units."""
Colour = NDArray[np.float64]
"""RGB, 0…255."""
Point = tuple[float, float]

LOW, SPAN, GRID = -16.0, 144.0, 160
"""The canvas covers crop units LOW … LOW + SPAN both ways with GRID×GRID pixels."""
UNIT = GRID / SPAN
MIDDLE = 56.0
"""The middle line of an average face, crop units."""
AXIS = LOW + (np.arange(GRID) + 0.5) / UNIT
"""Crop units of the canvas's columns, and of its rows."""

_T, _S = np.linspace(0, 1, 9)[:, None], np.arange(6)[:, None] / 6
_CURVE = np.hstack([(1 - _T) * (1 - 2 * _T), 4 * _T * (1 - _T), _T * (2 * _T - 1)])
_CATMULL = np.hstack(
    [-_S + 2 * _S**2 - _S**3, 2 - 5 * _S**2 + 3 * _S**3, _S + 4 * _S**2 - 3 * _S**3, _S**3 - _S**2]
) / 2  # fmt: skip
_CIRCLE = np.stack([np.cos(np.arange(24) * np.pi / 12), np.sin(np.arange(24) * np.pi / 12)], 1)


class Canvas:
    """Hold ``rgb`` float32 3×GRID×GRID, and ``alpha`` float32 GRID×GRID: where the head hides the scene."""

    def __init__(self, colour: Colour) -> None:
        self.rgb: Plane = np.tile(planes(colour), (1, GRID, GRID))
        self.alpha: Plane = np.zeros((GRID, GRID), np.float32)

    def paint(
        self, shapes: Points | Sequence[Points], colour: Colour | Plane, weight: float = 1.0, soft: float = 0.0,
        width: float = 0.0, *, inside: Sequence[Points] = (), opaque: bool = False,
    ) -> None:  # fmt: skip
        """Paint polygons, or open lines of ``width``, in one colour or 3×GRID×GRID.

        ``soft``: standard deviation by which edges are blurred. Lengths are in crop units.
        ``inside``: polygons beyond which nothing is painted. ``opaque``: the head hides the scene there.
        """
        shapes = [shapes] if isinstance(shapes, np.ndarray) else shapes
        rows, columns = box = _window(shapes, 2 + width + 2.5 * soft)
        covered = mask(shapes, box, width)
        if soft:
            covered = np.asarray(cv2.GaussianBlur(covered, (0, 0), soft * UNIT), np.float32)
        if inside:
            covered *= mask(inside, box)
        if opaque:
            np.maximum(self.alpha[box], covered, out=self.alpha[box])
        part, paint = self.rgb[:, rows, columns], planes(colour)
        part += covered * np.float32(weight) * ((paint if paint.shape[1] == 1 else paint[:, rows, columns]) - part)


def mask(
    shapes: Sequence[Points], box: tuple[slice, slice] = (slice(0, GRID), slice(0, GRID)), width: float = 0.0
) -> Plane:
    """Draw an anti-aliased 0…1 mask of polygons, or of open lines where ``width`` is given, on a part of the canvas."""
    rows, columns = box
    canvas = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.uint8)
    origin = np.array([LOW + columns.start / UNIT, LOW + rows.start / UNIT])
    fixed = [np.rint((s - origin) * (16 * UNIT)).astype(np.int32) for s in shapes]
    thickness = max(1, round(width * UNIT))
    if width:
        cv2.polylines(canvas, fixed, False, 255, thickness, cv2.LINE_AA, 4)
    else:
        cv2.fillPoly(canvas, fixed, 255, cv2.LINE_AA, 4)
    covered: Plane = canvas * np.float32((min(width * UNIT / thickness, 1.0) if width else 1.0) / 255)
    return covered


def planes(colour: ArrayLike) -> Plane:
    """Give a colour the shape 3×1×1; planes stay as they are."""
    colour = np.asarray(colour, np.float32)
    return colour if colour.ndim == 3 else colour.reshape(3, 1, 1)


def curve(a: Point, b: Point, c: Point) -> Points:
    """Draw a quadratic curve that starts at a, passes b half-way and ends at c → 9×2."""
    return np.asarray(_CURVE @ np.array([a, b, c]))


def smooth(points: Points) -> Points:
    """Draw a closed Catmull-Rom curve through N points → 6·N points."""
    around = np.stack([np.roll(points, k, axis=0) for k in (1, 0, -1, -2)])
    return np.asarray(np.einsum("tk,knd->ntd", _CATMULL, around).reshape(-1, 2))


def mirrored(right: Sequence[Point]) -> Points:
    """Close an outline whose right half is given, as (distance from the middle line, y)."""
    return np.asarray(np.add([*right, *((-x, y) for x, y in right[:0:-1])], [MIDDLE, 0]))


def both(right: Points) -> list[Points]:
    """Put a shape given by (distance from the middle line, y), on either side."""
    return [right * [side, 1] + [MIDDLE, 0] for side in (-1, 1)]


def between(x: Colour, top: Colour, bottom: Colour) -> Points:
    """Return the polygon between two lines over the same x."""
    return np.concatenate([np.stack([x, top], 1), np.stack([x, bottom], 1)[::-1]])


def ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    """Return 24 points of an ellipse."""
    return np.asarray(_CIRCLE * [rx, ry] + [x, y])


def bumps(shapes: Sequence[tuple[float, float, float, float, float]]) -> Plane:
    """Sum separable Gaussians (x, y, σx, σy, height; crop units) → GRID×GRID."""
    x, y, sx, sy, height = np.array(shapes).T[..., None]
    down, across = np.exp(-0.5 * ((AXIS - y) / sy) ** 2) * height, np.exp(-0.5 * ((AXIS - x) / sx) ** 2)
    return np.asarray(down.T @ across, np.float32)


def _window(shapes: Sequence[Points], margin: float) -> tuple[slice, slice]:
    """Find rows and columns of the canvas that hold the shapes and ``margin`` crop units around them."""
    points = shapes[0] if len(shapes) == 1 else np.concatenate(shapes)
    slices = []
    for low, high in zip(points.min(0).tolist(), points.max(0).tolist(), strict=True):
        start = min(max(int((low - margin - LOW) * UNIT), 0), GRID - 2)
        slices.append(slice(start, max(min(int((high + margin - LOW) * UNIT) + 1, GRID), start + 1)))
    return slices[1], slices[0]
