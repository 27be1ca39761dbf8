"""Paint synthetic faces: anti-aliased polygons and lines on a planar float canvas in crop units.

Crop units are pixels of the 112×112 crop; the canvas reaches beyond it, because a turned head shows what lies there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

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


class Canvas:
    """Hold ``rgb`` float32 3×GRID×GRID, and ``alpha`` float32 GRID×GRID: where the head hides the scene."""

    def __init__(self, colour: Colour) -> None:
        self.rgb: Plane = np.empty((3, GRID, GRID), np.float32)
        self.rgb[:] = _planes(colour)
        self.alpha: Plane = np.zeros((GRID, GRID), np.float32)

    def fill(self, shapes: Points | Sequence[Points], colour: Colour, weight: float = 1.0, soft: float = 0.0) -> None:
        """Paint polygons into the canvas; ``soft`` is the edge's blur in crop units."""
        self._blend(_several(shapes), 0.0, colour, weight, soft)

    def stroke(
        self, lines: Points | Sequence[Points], width: float, colour: Colour, weight: float = 1.0, soft: float = 0.0
    ) -> None:
        """Paint open lines of ``width`` crop units into the canvas."""
        self._blend(_several(lines), width, colour, weight, soft)

    def cover(self, shape: Points, colour: Colour, texture: Plane | None = None) -> None:
        """Fill a polygon and make the head opaque there; ``texture`` GRID×GRID scales the colour."""
        rows, columns = window([shape], 2)
        covered = mask([shape], rows, columns)
        paint = _planes(colour) if texture is None else _planes(colour) * texture[rows, columns]
        part = self.rgb[:, rows, columns]
        part += covered * (paint - part)
        np.maximum(self.alpha[rows, columns], covered, out=self.alpha[rows, columns])

    def mix(self, paint: Plane, weight: Plane) -> None:
        """Mix 3×GRID×GRID ``paint`` in with a weight per pixel."""
        paint = paint - self.rgb
        paint *= weight
        self.rgb += paint

    def _blend(self, shapes: Sequence[Points], width: float, colour: Colour, weight: float, soft: float) -> None:
        rows, columns = window(shapes, 2 + width + 2.5 * soft)
        covered = mask(shapes, rows, columns, width)
        if soft:
            covered = np.asarray(cv2.GaussianBlur(covered, (0, 0), soft * UNIT), np.float32)
        covered *= np.float32(weight)
        part = self.rgb[:, rows, columns]
        part += covered * (_planes(colour) - part)


WHOLE = slice(0, GRID)


def window(shapes: Sequence[Points], margin: float) -> tuple[slice, slice]:
    """Find rows and columns of the canvas that hold the shapes and ``margin`` crop units around them."""
    points = shapes[0] if len(shapes) == 1 else np.concatenate(shapes)
    (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
    slices = []
    for low, high in ((y0, y1), (x0, x1)):
        start = min(max(int((low - margin - LOW) * UNIT), 0), GRID - 2)
        slices.append(slice(start, max(min(int((high + margin - LOW) * UNIT) + 1, GRID), start + 1)))
    return slices[0], slices[1]


def mask(shapes: Sequence[Points], rows: slice = WHOLE, columns: slice = WHOLE, width: float = 0.0) -> Plane:
    """Draw an anti-aliased 0…1 mask of polygons, or of open lines where ``width`` is given, on a part of the canvas."""
    canvas = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.uint8)
    origin = np.array([LOW + columns.start / UNIT, LOW + rows.start / UNIT])
    fixed = [np.rint((s - origin) * (16 * UNIT)).astype(np.int32) for s in shapes]
    if not width:
        cv2.fillPoly(canvas, fixed, 255, cv2.LINE_AA, 4)
        return _scaled(canvas, 1 / 255)
    thickness = max(1, round(width * UNIT))
    cv2.polylines(canvas, fixed, False, 255, thickness, cv2.LINE_AA, 4)
    return _scaled(canvas, min(width * UNIT / thickness, 1.0) / 255)


def fixed_point(x: float, y: float, rows: slice = WHOLE, columns: slice = WHOLE) -> tuple[int, int]:
    """Convert a point in crop units → OpenCV's coordinates with 4 fractional bits on a part of the canvas."""
    return round(((x - LOW) * UNIT - columns.start) * 16), round(((y - LOW) * UNIT - rows.start) * 16)


def fixed_radius(radius: float) -> int:
    """Convert a radius in crop units → OpenCV's, with 4 fractional bits."""
    return round(radius * UNIT * 16)


def curve(a: Point, b: Point, c: Point) -> Points:
    """Draw a quadratic curve that starts at a, passes b half-way and ends at c → 9×2."""
    return np.asarray(_bezier() @ np.array([a, b, c]))


def smooth(points: Points) -> Points:
    """Draw a closed Catmull-Rom curve through N points → 6·N points."""
    around = np.stack([np.roll(points, k, axis=0) for k in (1, 0, -1, -2)])
    return np.asarray(np.einsum("tk,knd->ntd", _catmull(), around).reshape(-1, 2))


def mirrored(right: Sequence[Point]) -> Points:
    """Close an outline whose right half is given, as (distance from the middle line, y)."""
    points = np.array([*right, *((-x, y) for x, y in right[:0:-1])])
    points[:, 0] += MIDDLE
    return points


def both(right: Points) -> list[Points]:
    """Put a shape given by (distance from the middle line, y), on either side."""
    return [right * [side, 1] + [MIDDLE, 0] for side in (-1, 1)]


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> Points:
    """Return 24 points of an ellipse; ``angle`` in radians."""
    circle = _circle() * [rx, ry]
    if angle:
        cos, sin = np.cos(angle), np.sin(angle)
        circle = circle @ np.array([[cos, sin], [-sin, cos]])
    return np.asarray(circle + np.array([x, y]))


def bumps(shapes: Sequence[tuple[float, float, float, float, float]]) -> Plane:
    """Sum separable Gaussians (x, y, σx, σy, height; crop units) → GRID×GRID."""
    x, y, sx, sy, height = np.array(shapes).T[..., None]
    across = np.exp(-0.5 * ((axis()[None, :] - x) / sx) ** 2)
    down = np.exp(-0.5 * ((axis()[None, :] - y) / sy) ** 2) * height
    field: Plane = (down.T @ across).astype(np.float32)
    return field


def ramp(stops: NDArray[np.float64], value: float) -> Colour:
    """Return the colour at −1…1 along N×3 stops."""
    position = (min(max(value, -1.0), 1.0) + 1) / 2 * (len(stops) - 1)
    low = min(int(position), len(stops) - 2)
    return np.asarray(stops[low] + (position - low) * (stops[low + 1] - stops[low]))


@cache
def axis() -> NDArray[np.float64]:
    """Return the crop units of the canvas's columns, and of its rows."""
    return np.asarray(LOW + (np.arange(GRID) + 0.5) / UNIT, np.float64)


def _scaled(canvas: NDArray[np.uint8], factor: float) -> Plane:
    plane: Plane = canvas.astype(np.float32)
    plane *= np.float32(factor)
    return plane


def _several(shapes: Points | Sequence[Points]) -> Sequence[Points]:
    return [shapes] if isinstance(shapes, np.ndarray) else shapes


def _planes(colour: Colour) -> Plane:
    return colour.astype(np.float32).reshape(3, 1, 1)


@cache
def _bezier() -> NDArray[np.float64]:
    t = np.linspace(0, 1, 9)
    middle = 2 * t * (1 - t)  # the control point is 2b − (a + c) / 2
    return np.stack([(1 - t) ** 2 - middle / 2, 2 * middle, t**2 - middle / 2], 1)


@cache
def _catmull() -> NDArray[np.float64]:
    t = np.arange(6)[:, None] / 6
    weights = [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3]
    return np.asarray(np.concatenate(weights, 1) / 2, np.float64)


@cache
def _circle() -> Points:
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack([np.cos(t), np.sin(t)], 1)
