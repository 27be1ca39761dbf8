"""Load batches of augmented crops in a fixed order: image and augmentation depend on seed and step alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.parallel import in_order
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.images.codec import Rgb

BATCHES_AHEAD = 6
"""Batches prepared before they are asked for."""
WHOLE_BATCH = slice(None)
"""The part of every batch that one process alone works on."""


@dataclass(frozen=True)
class CropBatch:
    """Hold one batch: ``crops`` uint8 B×H×W×3 RGB, ``indices`` int64 B into the face set, ``mirrored`` bool B."""

    crops: Rgb
    indices: NDArray[np.int64]
    mirrored: NDArray[np.bool_]


class Loader:
    """Yield endless batches of a face set; batch number ``step`` is the same in every run with the same seed.

    ``share``: the part of every batch to yield; the parts of all processes together are the batch of a single one.
    """

    def __init__(
        self,
        faces: FaceSet,
        batch: int,
        size: int,
        *,
        augment: float,
        seed: int,
        mirror: bool = True,
        share: slice = WHOLE_BATCH,
        workers: int = 2,
    ) -> None:
        self.faces = faces
        self.batch = batch
        self.steps_per_epoch = len(faces) // batch
        self._size = size
        self._augment = augment
        self._mirror = mirror
        self._seed = seed
        self._share = share
        self._workers = workers
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def run(self, start: int, stop: int) -> Iterator[CropBatch]:
        """Yield batches ``start`` … ``stop − 1`` in order; threads prepare them."""
        drawn = ((step, self._indices(step)[self._share]) for step in range(start, stop))
        return in_order(lambda each: self.make(*each), drawn, workers=self._workers, ahead=BATCHES_AHEAD)

    def make(self, step: int, indices: NDArray[np.int64]) -> CropBatch:
        """Decode and augment one batch."""
        crops = self.faces.load(indices, self._size)
        mirrored = np.empty(len(indices), np.bool_)
        for row in range(len(indices)):
            random = np.random.default_rng((self._seed, step, (self._share.start or 0) + row))
            mirrored[row] = (random.random() < 0.5) and self._mirror
            image = crops[row, :, ::-1] if mirrored[row] else crops[row]
            crops[row] = augment(np.ascontiguousarray(image), self._augment, random)
        return CropBatch(crops, indices, mirrored)

    def _indices(self, step: int) -> NDArray[np.int64]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self.faces)))
        return self._order[1][position * self.batch : (position + 1) * self.batch]


def augment(image: Rgb, strength: float, random: np.random.Generator) -> Rgb:
    """Change a crop as cameras do: small misalignment, light, colour, low resolution, blur, occlusion.

    ``image``: uint8 H×W×3. ``strength``: 0 (unchanged) to 1. Mirroring is decided by the caller, since the teacher's
    embedding of the mirrored image exists.
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
