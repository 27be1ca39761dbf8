"""Give a synthetic face light, pose and background: from the flat painted head to the crop.

The relief's normals give the light; pose moves every pixel by its depth, so that nose and cheeks shift against each
other as in a head that turns; the turned head is then aligned by its own five points, as a detector would do it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from pkd.toolkit.images.alignment import TEMPLATE, similarity
from pkd.toolkit.synthetic.canvas import LOW, MIDDLE, UNIT, Plane, Points

if TYPE_CHECKING:
    from pkd.toolkit.synthetic.faces import Conditions
    from pkd.toolkit.synthetic.head import Head

AXLE = np.array([MIDDLE, 60.0])
"""Point about which the head turns and nods, crop units."""


def photograph(head: Head, c: Conditions, size: int) -> Plane:
    """Return the lit, turned and aligned head before its background → float32 size×size×3 RGB, about 0…255."""
    columns, rows = _pose(head, c, size)
    layer, alpha = (
        cv2.remap(flat, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        for flat in (cv2.merge(list(_light(head, c))), head.canvas.alpha)
    )
    random = np.random.default_rng([c.scene, 4])
    grey, tint = random.uniform(35, 205), random.normal(0, 22, 3)
    coarse = (grey + tint + random.normal(0, 22, (6, 6, 1)) + random.normal(0, 9, (6, 6, 3))).astype(np.float32)
    behind = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.asarray(cv2.blendLinear(layer, behind, alpha, 1 - alpha), np.float32)


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

    halfway, strength = light + np.array([0, 0, 1]), c.light_strength
    gloss = cv2.pow(facing(halfway / np.linalg.norm(halfway)), 32)
    diffuse = facing(light) * np.float32(1.2 * strength) + np.float32(1 - 0.88 * strength)
    lit: Plane = head.canvas.rgb * diffuse + gloss * np.float32(30 * strength)
    return lit


def _pose(head: Head, c: Conditions, size: int) -> tuple[Plane, Plane]:
    """Find the columns and rows of the canvas from which each crop pixel comes."""
    turn = np.deg2rad([c.yaw, c.pitch])
    sin, cos = np.sin(turn), np.cos(turn)
    cells = np.rint((head.five_points - LOW) * UNIT).astype(int)
    turned = (head.five_points - AXLE) * cos + head.depth[cells[:, 1], cells[:, 0], None] * sin
    error = cv2.getRotationMatrix2D(TEMPLATE.mean(0), -c.roll, c.zoom)
    error[:, 2] += np.array([c.shift_x, c.shift_y])
    back = cv2.invertAffineTransform(error @ np.vstack([similarity(turned), [0, 0, 1]]))
    grid = np.arange(size, dtype=np.float64)
    u, v = ((b[0] * grid[None, :] + b[1] * grid[:, None] + b[2]).astype(np.float32) for b in back)
    depth: Plane = np.full((size, size), 20, np.float32)
    scale, shift = (UNIT / cos).astype(np.float32), ((AXLE - LOW) * UNIT).astype(np.float32)
    for _ in range(5):  # the depth is that of the source pixel: iterate to it
        columns = (u - depth * np.float32(sin[0])) * scale[0] + shift[0]
        rows = (v - depth * np.float32(sin[1])) * scale[1] + shift[1]
        there = cv2.remap(head.depth, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        depth = np.asarray(there, np.float32)
    return columns, rows
