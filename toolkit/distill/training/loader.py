"""Load batches of augmented crops in a fixed order: image and augmentation depend on seed and step alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.parallel import in_order
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.training.views import CropBatch, Teaching, ViewMaker

BATCHES_AHEAD = 6
"""Batches prepared before they are asked for."""
WHOLE_BATCH = slice(None)
"""The part of every batch that one process alone works on."""


class Loader:
    """Yield endless batches of a face set; batch number ``step`` is the same in every run with the same seed.

    ``augment``, ``mirror``, ``mix``: as ``ViewMaker``. ``teaching``: gives each batch its teacher embeddings; with
    stored views every image shows them in turn, one an epoch. ``share``: the part of every batch to yield; the parts of
    all processes together are the batch of a single one.
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
        mix: float = 0.0,
        teaching: Teaching | None = None,
        share: slice = WHOLE_BATCH,
        workers: int = 2,
    ) -> None:
        self.faces = faces
        self.batch = batch
        self.steps_per_epoch = len(faces) // batch
        self._maker = ViewMaker(faces, size, augment=augment, mirror=mirror, mix=mix)
        self._teaching = teaching or Teaching()
        self._seed = seed
        self._share = share
        self._workers = workers
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def run(self, start: int, stop: int) -> Iterator[CropBatch]:
        """Yield batches ``start`` … ``stop − 1`` in order; threads prepare them."""
        drawn = ((step, self._indices(step)[self._share]) for step in range(start, stop))
        return in_order(lambda each: self.make(*each), drawn, workers=self._workers, ahead=BATCHES_AHEAD)

    def make(self, step: int, indices: NDArray[np.int64]) -> CropBatch:
        """Decode and augment one batch, and look up or compute what the teacher says of it."""
        views = np.zeros(len(indices), np.int64)
        if stored := self._teaching.views:
            views = (step // self.steps_per_epoch + indices) % stored.count
            seeds = stored.seeds(indices, views)
        else:
            first = self._share.start or 0
            seeds = [(self._seed, step, first + row) for row in range(len(indices))]
        batch = self._maker.make(indices, seeds)
        return replace(batch, teacher=self._teaching.embed(batch, views))

    def _indices(self, step: int) -> NDArray[np.int64]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self.faces)))
        return self._order[1][position * self.batch : (position + 1) * self.batch]
