"""Change aligned crops as cameras do."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.images.codec import Rgb


def augment(image: Rgb, strength: float, random: np.random.Generator) -> Rgb:
    """Change a crop as cameras do: small misalignment, light, colour, low resolution, blur, occlusion.

    ``image``: uint8 H×W×3. ``strength``: 0 (unchanged) to 1. Mirroring is not among it: the
    teacher's embedding of the mirrored image is cached.
    """
    if strength == 0:
        return image
    size = image.shape[0]

    def chance(probability: float) -> bool:
        return bool(random.random() < probability * strength)

    if chance(0.6):
        turn = random.uniform(-8, 8) * strength
        zoom = 1 + random.uniform(-0.08, 0.08) * strength
        matrix = cv2.getRotationMatrix2D((size / 2, size / 2), turn, zoom)
        matrix[:, 2] += random.uniform(-4, 4, 2) * strength * size / 112
        image = cv2.warpAffine(image, matrix, (size, size), borderMode=cv2.BORDER_REPLICATE).astype(np.uint8)
    if chance(0.3):
        small = int(size * random.uniform(1 - 0.75 * strength, 1))
        way = cv2.INTER_AREA if random.random() < 0.5 else cv2.INTER_LINEAR
        low = cv2.resize(image, (max(small, 12), max(small, 12)), interpolation=way)
        image = cv2.resize(low, (size, size), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    if chance(0.15):
        image = cv2.GaussianBlur(image, (0, 0), random.uniform(0.3, 1.5) * size / 112).astype(np.uint8)
    if chance(0.8):
        gain = (1 + random.uniform(-0.4, 0.4) * strength) * (1 + random.uniform(-0.08, 0.08, 3) * strength)
        image = light(image, gain, random.uniform(-40, 40) * strength)
    if chance(0.2):
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        image = cv2.merge([grey, grey, grey]).astype(np.uint8)
    if chance(0.15):
        height, width = (random.uniform(0.1, 0.4, 2) * size).astype(int)
        top, left = random.integers(0, size - height), random.integers(0, size - width)
        image[top : top + height, left : left + width] = random.integers(0, 256, 3)
    return image


def light(image: Rgb, gain: NDArray[np.float64], offset: float) -> Rgb:
    """Apply a gain per channel and one offset around mid-grey, by table: uint8 H×W×3 → the same."""
    levels = np.arange(256, dtype=np.float64)[:, None]
    table = np.clip((levels - 127.5) * gain + 127.5 + offset, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table.reshape(1, 256, 3)).astype(np.uint8, copy=False)
