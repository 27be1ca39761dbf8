"""Load batches of augmented crops in a fixed order: image and augmentation depend on seed and step alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.parallel import in_order
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.training.frozen import FrozenFeatures
from pkd.toolkit.distill.training.views import Int, StoredViews, Teaching, ViewMaker, Views, mirrored

BATCHES_AHEAD = 6
"""Batches prepared before they are asked for."""
WHOLE_BATCH = slice(None)
"""The part of every batch that one process alone works on."""


@dataclass(frozen=True)
class CropBatch:
    """Hold one batch: ``crops`` uint8 B×S×S×3 RGB, ``indices`` int64 B into the face set, bool B ``mirrored``.

    ``mixed``: bool B, blended with another image, so that the crop shows nobody. ``teacher``: B×D, the teacher's unit
    embeddings for these crops; None without a teacher. Crops and embeddings may lie on the device already.
    ``features``: ``crops`` are float16 B×C×H×W, what the frozen layers give for the crops.
    """

    crops: Tensor
    indices: Int
    mirrored: NDArray[np.bool_]
    mixed: NDArray[np.bool_]
    teacher: Tensor | None = None
    features: bool = False


class Loader:
    """Yield endless batches of a face set; batch number ``step`` is the same in every run with the same seed.

    ``augment``, ``mirror``, ``mix``: as ``ViewMaker``. ``teaching``: gives each batch its teacher embeddings; with
    stored views every image shows them in turn, one an epoch. ``memory``: device that keeps stored views decoded;
    without it they are made again whenever they are shown. ``frozen``: features that are read instead of crops.
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
        mix: float = 0.0,
        teaching: Teaching | None = None,
        memory: torch.device | None = None,
        frozen: FrozenFeatures | None = None,
        share: slice = WHOLE_BATCH,
        workers: int = 2,
    ) -> None:
        self.faces = faces
        self.batch = batch
        self.steps_per_epoch = len(faces) // batch
        self._maker = ViewMaker(faces, size, augment=augment, mirror=mirror, mix=mix)
        self._teaching = teaching or Teaching()
        self._memory = memory
        self._mirror = mirror
        self._frozen = frozen
        self._seed = seed
        self._share = share
        self._workers = workers
        self._order: tuple[int, Int] = (-1, np.empty(0, np.int64))

    def run(self, start: int, stop: int) -> Iterator[CropBatch]:
        """Yield batches ``start`` … ``stop − 1`` in order; threads prepare them."""
        drawn = ((step, self._indices(step)[self._share]) for step in range(start, stop))
        if self._memory is not None and self._teaching.views is not None:
            kept = KeptViews(self._maker, self._teaching.views, self._memory, self._workers)
            return (kept.batch(indices, self._numbers(step, indices)) for step, indices in drawn)
        return in_order(lambda each: self.make(*each), drawn, workers=self._workers, ahead=BATCHES_AHEAD)

    def make(self, step: int, indices: Int) -> CropBatch:
        """Decode and augment one batch, and look up or compute what the teacher says of it."""
        numbers = self._numbers(step, indices)
        if stored := self._teaching.views:
            seeds = stored.seeds(indices, numbers)
        else:
            first = self._share.start or 0
            seeds = [(self._seed, step, first + row) for row in range(len(indices))]
        if self._frozen is not None:
            turned = mirrored(seeds) & self._mirror
            nobody, as_is = np.empty((len(indices), 0), np.uint8), np.zeros(len(indices), np.bool_)
            taught = self._teaching.embed(Views(nobody, turned, as_is), indices, numbers)
            teacher = None if taught is None else torch.from_numpy(taught)
            return CropBatch(self._frozen.batch(indices, turned), indices, turned, as_is, teacher, features=True)
        shown = self._maker.make(indices, seeds)
        taught = self._teaching.embed(shown, indices, numbers)
        teacher = None if taught is None else torch.from_numpy(taught)
        return CropBatch(torch.from_numpy(shown.crops), indices, shown.mirrored, shown.mixed, teacher)

    def _numbers(self, step: int, indices: Int) -> Int:
        """Choose the stored view that each image shows in a step."""
        stored = self._teaching.views
        shown: Int = (step // self.steps_per_epoch + indices) % (stored.count if stored else 1)
        return shown

    def _indices(self, step: int) -> Int:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self.faces)))
        return self._order[1][position * self.batch : (position + 1) * self.batch]


class KeptViews:
    """Keep all stored views on a device, decoded, with the teacher's embeddings as half floats.

    3·S²·K bytes an image: 10,000 crops of 112 pixels with 8 views are 3 GB. Raises InputError where they do not fit.
    """

    def __init__(self, maker: ViewMaker, stored: StoredViews, device: torch.device, workers: int) -> None:
        count, size = len(maker.faces), maker.size
        try:
            self._crops = torch.empty((stored.count, count, size, size, 3), dtype=torch.uint8, device=device)
        except (RuntimeError, MemoryError):
            needed = stored.count * count * size**2 * 3 / 2**30
            raise InputError(
                f"--views-in-memory: {stored.count} views of {count:,} images are {needed:.1f} GiB, more than {device} "
                "has free. Give fewer --views, or leave it out."
            ) from None
        dim = stored.rows[0].shape[1]
        self._teacher = torch.empty((stored.count, count, dim), dtype=torch.float16, device=device)
        self._mirrored, self._mixed = (np.zeros((stored.count, count), np.bool_) for _ in range(2))

        def make(part: tuple[int, Int]) -> None:
            view, indices = part
            numbers = np.full(len(indices), view)
            shown = maker.make(indices, stored.seeds(indices, numbers))
            self._crops[view, indices[0] : indices[-1] + 1] = torch.from_numpy(shown.crops).to(device)
            taught = torch.from_numpy(stored.teacher(indices, numbers))
            self._teacher[view, indices[0] : indices[-1] + 1] = taught.to(device, torch.float16)
            self._mirrored[view, indices], self._mixed[view, indices] = shown.mirrored, shown.mixed

        parts = ((v, np.arange(i, min(i + 256, count))) for v in range(stored.count) for i in range(0, count, 256))
        for _ in in_order(make, parts, workers=workers):
            pass

    def batch(self, indices: Int, numbers: Int) -> CropBatch:
        """Pick the views ``numbers`` of the images ``indices``."""
        at = torch.from_numpy(numbers).to(self._crops.device), torch.from_numpy(indices).to(self._crops.device)
        teacher = torch.nn.functional.normalize(self._teacher[at].float())
        mirrored, mixed = self._mirrored[numbers, indices], self._mixed[numbers, indices]
        return CropBatch(self._crops[at], indices, mirrored, mixed, teacher)
