"""Make augmented views of images from seeds, and give the teacher's embedding of exactly the view that is shown.

A student that sees augmented crops but is taught the embedding of the clean one learns a wrong answer (Beyer et al.
2022, Knowledge distillation: A good teacher is patient and consistent, arXiv 2106.05237). Stored views (dataset
reinforcement, Faghri et al. 2023, arXiv 2303.08983) and a live teacher repair it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.row_store import Rows
from pkd.toolkit.distill.training.augment import augment
from pkd.toolkit.encoders.base import Embeddings, Encoder, unit_rows
from pkd.toolkit.encoders.embed import embed_keyed
from pkd.toolkit.images.codec import Rgb

AUGMENTATION = 1
"""Version of what a seed makes of an image; raise it when that changes: stored embeddings are then made anew."""
Int = NDArray[np.int64]
Seed = tuple[int, ...]


@dataclass(frozen=True)
class Views:
    """Hold views of B images: ``crops`` uint8 B×S×S×3 RGB, bool B ``mirrored`` and ``mixed`` (blended with another)."""

    crops: Rgb
    mirrored: NDArray[np.bool_]
    mixed: NDArray[np.bool_]


def mirrored(seeds: Sequence[Seed]) -> NDArray[np.bool_]:
    """Tell which seeds mirror their image, bool B."""
    return np.array([np.random.default_rng(seed).random() < 0.5 for seed in seeds], np.bool_)


class ViewMaker:
    """Mirror, mix and augment images as a seed says: the same seed makes the same view of an image.

    ``augment``: strength 0 to 1. ``mix``: share of views that are blended with another image (mixup with a uniform
    share, as in the patient and consistent teacher).
    """

    def __init__(self, faces: FaceSet, size: int, *, augment: float, mirror: bool = True, mix: float = 0.0) -> None:
        self.faces = faces
        self.size = size
        self._augment = augment
        self._mirror = mirror
        self._mix = mix

    def make(self, indices: Int, seeds: Sequence[Seed]) -> Views:
        """Decode ``indices`` and make one view of each."""
        crops = self.faces.load(indices, self.size)
        mirrored, mixed = np.zeros(len(indices), np.bool_), np.zeros(len(indices), np.bool_)
        for row, seed in enumerate(seeds):
            random = np.random.default_rng(seed)
            mirrored[row] = bool(random.random() < 0.5) and self._mirror  # the first draw, as in ``mirrored``
            image = crops[row, :, ::-1] if mirrored[row] else crops[row]
            partner, share = self.partner(seed)
            if partner is not None:
                mixed[row] = True
                other = self.faces.load([partner], self.size)[0]
                image = np.rint(share * image.astype(np.float32) + (1 - share) * other).astype(np.uint8)
            crops[row] = augment(np.ascontiguousarray(image), self._augment, random)
        return Views(crops, mirrored, mixed)

    def partner(self, seed: Seed) -> tuple[int | None, float]:
        """Draw the image to mix with, None for most, and the share of the image itself."""
        if not self._mix:
            return None, 1.0
        random = np.random.default_rng((*seed, 1))
        if random.random() >= self._mix:
            return None, 1.0
        return int(random.integers(len(self.faces))), float(random.random())

    def describe(self) -> str:
        """Name everything but image and seed that a view depends on."""
        return f"v{AUGMENTATION} size {self.size} augment {self._augment} mirror {self._mirror} mix {self._mix}"


class StoredViews:
    """Hold K views of every image: their seeds, and the teacher's embeddings of them on disk as half floats.

    A view is drawn from the run's seed, the image's digest and its number, so that only embeddings are kept: 2·D bytes
    each.
    """

    def __init__(self, maker: ViewMaker, count: int, seed: int, cache: Path) -> None:
        self.count = count
        self.rows: list[Rows] = []
        self._maker = maker
        self._seed = seed
        self._digests = maker.faces.digests(cache)
        self._cache = cache

    def seeds(self, indices: Int, views: Int) -> list[Seed]:
        """Return the seed of each view: of the run, the image's digest (8 bytes) and the view's number."""
        digests = np.ascontiguousarray(self._digests[indices])[:, :8].copy().view(np.uint64)[:, 0]
        return [(self._seed, int(digest), int(view)) for digest, view in zip(digests, views, strict=True)]

    def embed(self, teacher: Encoder, jobs: int | None, advance: Callable[[int], None]) -> None:
        """Embed every view that is not in the cache yet, in threads."""
        everything = np.arange(len(self._maker.faces))
        for view in range(self.count):
            numbers = np.full(len(everything), view)
            keys = np.array([self._key(i, seed) for i, seed in enumerate(self.seeds(everything, numbers))], np.uint64)

            def load(indices: Int, view: int = view) -> Rgb:
                return self._maker.make(indices, self.seeds(indices, np.full(len(indices), view))).crops

            self.rows.append(embed_keyed(teacher, keys, load, cache=self._cache, half=True, jobs=jobs, advance=advance))

    def teacher(self, indices: Int, views: Int) -> Embeddings:
        """Return the teacher's unit embeddings of these views, float32 B×D."""
        found = np.empty((len(indices), self.rows[0].shape[1]), np.float32)
        for view in np.unique(views):
            here = views == view
            found[here] = self.rows[view][indices[here]]
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        return found

    def _key(self, index: int, seed: Seed) -> int:
        """First eight bytes of SHA-256 over all that the view's pixels depend on."""
        partner, _ = self._maker.partner(seed)
        other = "" if partner is None else self._digests[partner].tobytes().hex()
        text = f"{self._digests[index].tobytes().hex()} {other} {seed} {self._maker.describe()}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


class MappedRows:
    """Map stored features, N×width, linearly, and give the rows one length: float32 B×D where indices are asked for."""

    def __init__(
        self, features: Rows, weight: NDArray[np.float64], bias: NDArray[np.float64], *, length: float
    ) -> None:
        self._features = features
        self._weight = weight
        self._bias = bias
        self._length = length

    def __getitem__(self, indices: Int) -> Embeddings:
        rows = self._features[indices] @ self._weight + self._bias
        return np.asarray(self._length * unit_rows(rows.astype(np.float32), "the student"), np.float32)


@dataclass(frozen=True)
class Teaching:
    """Say where the teacher's embedding of a view comes from.

    ``clean``: cached embeddings of the plain and the mirrored images, each N×D; for a view they are those of the image
    before augmentation. ``views``: stored ones, of the very view. ``live``: an encoder that embeds every crop as shown.
    ``own``: what the student is to keep of its own embedding of the clean image; it is added.
    """

    clean: tuple[Rows, Rows] | None = None
    views: StoredViews | None = None
    live: Encoder | None = None
    own: MappedRows | None = None

    def embed(self, shown: Views, indices: Int, numbers: Int) -> Embeddings | None:
        """Return the teacher's unit embeddings of the images ``indices`` as ``shown``, float32 B×D; None without one.

        ``numbers``: int64 B, which stored view each is.
        """
        taught = self._taught(shown, indices, numbers)
        if taught is None or self.own is None:
            return taught
        return unit_rows(taught + self.own[indices], "the teacher")

    def _taught(self, shown: Views, indices: Int, numbers: Int) -> Embeddings | None:
        """Return what the teacher says alone."""
        if self.live is not None:
            return self.live.embed(shown.crops)
        if self.views is not None:
            return self.views.teacher(indices, numbers)
        if self.clean is None:
            return None
        plain, mirrored = self.clean
        found: Embeddings = np.where(shown.mirrored[:, None], mirrored[indices], plain[indices])
        return found
