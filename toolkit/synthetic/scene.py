"""Give a synthetic face light, pose and background: from the flat painted head to the crop.

The relief's normals give the light; pose moves every pixel by its depth, so that nose and cheeks shift against each
other as in a head that turns; the turned head is then aligned by its own five points, as a detector would do it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.images.alignment import TEMPLATE
from pkd.toolkit.synthetic.canvas import LOW, MIDDLE, UNIT, Plane, Points

if TYPE_CHECKING:
    from pkd.toolkit.synthetic.faces import Conditions
    from pkd.toolkit.synthetic.head import Head

AXLE_Y = 60.0
"""Height about which the head nods, crop units."""


def photograph(head: Head, c: Conditions, size: int) -> NDArray[np.float32]:
    """Return the lit, turned and aligned head before its background → float32 size×size×3 RGB, about 0…255."""
    lit = cv2.merge(list(_light(head, c)))
    columns, rows = _pose(head, c, size)
    layer = cv2.remap(lit, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    alpha = cv2.remap(head.canvas.alpha, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    image: NDArray[np.float32] = cv2.blendLinear(layer, _background(c, size), alpha, 1 - alpha).astype(
        np.float32, copy=False
    )
    if c.occlusion == "block":
        _block(image, c)
    return image


def _light(head: Head, c: Conditions) -> Plane:
    """Put diffuse and glancing light on the painted head; the light stays with the camera while the head turns."""
    azimuth, elevation = np.deg2rad([c.light_azimuth - c.yaw, c.light_elevation + c.pitch])
    light = np.array([np.sin(azimuth) * np.cos(elevation), -np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
    slope_x = cv2.Sobel(head.relief, cv2.CV_32F, 1, 0, ksize=3, scale=UNIT / 8)
    slope_y = cv2.Sobel(head.relief, cv2.CV_32F, 0, 1, ksize=3, scale=UNIT / 8)
    length = np.sqrt(slope_x * slope_x + slope_y * slope_y + 1)

    def facing(direction: Points) -> Plane:
        """Compute the cosine between the relief's normal and a unit direction, 0 where it faces away."""
        x, y, z = direction.astype(np.float32)
        cosine: Plane = np.maximum((z - x * slope_x - y * slope_y) / length, 0)
        return cosine

    halfway = light + np.array([0, 0, 1])
    gloss = facing(halfway / np.linalg.norm(halfway))
    for _ in range(5):  # to the power of 32
        gloss *= gloss
    strength = c.light_strength
    diffuse = facing(light) * np.float32(1.2 * strength) + np.float32(1 - 0.88 * strength)
    lit: Plane = head.canvas.rgb * diffuse
    lit += gloss * np.float32(30 * strength)
    return lit


def _pose(head: Head, c: Conditions, size: int) -> tuple[Plane, Plane]:
    """Find the columns and rows of the canvas from which each crop pixel comes."""
    yaw, pitch, roll = np.deg2rad([c.yaw, c.pitch, c.roll])
    turn, nod = (np.sin(yaw), np.cos(yaw)), (np.sin(pitch), np.cos(pitch))
    flat = head.five_points
    cells = np.rint((flat - LOW) * UNIT).astype(int)
    depth_there = head.depth[cells[:, 1], cells[:, 0]]
    x = (flat[:, 0] - MIDDLE) * turn[1] + depth_there * turn[0]
    y = (flat[:, 1] - AXLE_Y) * nod[1] + depth_there * nod[0]
    linear, offset = _similarity(np.stack([x, y], 1), TEMPLATE)
    error = c.zoom * np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
    centre = TEMPLATE.mean(0)
    linear, offset = error @ linear, error @ (offset - centre) + centre + [c.shift_x, c.shift_y]
    back = np.linalg.inv(linear)
    across, down = np.arange(size) - offset[0], np.arange(size) - offset[1]
    u = ((back[0, 0] * across)[None, :] + (back[0, 1] * down)[:, None]).astype(np.float32)
    v = ((back[1, 0] * across)[None, :] + (back[1, 1] * down)[:, None]).astype(np.float32)

    def source(depth: Plane | float) -> tuple[Plane, Plane]:
        columns = (u - depth * np.float32(turn[0])) * np.float32(UNIT / turn[1]) + np.float32((MIDDLE - LOW) * UNIT)
        rows = (v - depth * np.float32(nod[0])) * np.float32(UNIT / nod[1]) + np.float32((AXLE_Y - LOW) * UNIT)
        return columns, rows

    columns, rows = source(np.float32(20))
    for _ in range(4):  # the depth is that of the source pixel: iterate to it
        there = cv2.remap(head.depth, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        columns, rows = source(np.asarray(there, np.float32))
    return columns, rows


def _similarity(source: Points, target: Points) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Find the least-squares rotation with scale (2×2) and shift (2) that takes N×2 points to N×2 points."""
    a, b = source - source.mean(0), target - target.mean(0)
    cos, sin = (a * b).sum(), (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum()
    linear = np.array([[cos, -sin], [sin, cos]]) / (a * a).sum()
    return linear, target.mean(0) - linear @ source.mean(0)


def _background(c: Conditions, size: int) -> NDArray[np.float32]:
    random = np.random.default_rng([c.scene, 4])
    grey, tint = random.uniform(35, 205), random.normal(0, 22, 3)
    coarse = (grey + tint + random.normal(0, 22, (6, 6, 1)) + random.normal(0, 9, (6, 6, 3))).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC), np.float32)


def _block(image: NDArray[np.float32], c: Conditions) -> None:
    """Put something flat before the face, in place."""
    random = np.random.default_rng([c.occlusion_seed, 9])
    width, height = (int(n) for n in random.integers(28, 62, 2))
    x, y = int(random.integers(8, 104 - width)), int(random.integers(14, 106 - height))
    coarse = (random.uniform(20, 230, 3) + random.normal(0, 14, (4, 4, 1))).astype(np.float32)
    image[y : y + height, x : x + width] = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
