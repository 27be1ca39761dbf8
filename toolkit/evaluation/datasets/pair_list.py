"""Hold pairs of images that a published list names, each said to be of one person or of two."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.data.face_set import FaceSet

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PairList:
    """Hold P pairs of images of ``faces``. All arrays have one entry per pair."""

    faces: FaceSet
    """Each image that occurs, once."""
    first: Ints
    """Index of the first image in ``faces``: the query."""
    second: Ints
    """Index of the second image: the gallery's."""
    same: NDArray[np.bool_]
    """True where the list says that both show one person."""
    fold: Ints
    """Fold of each pair, counted from 0."""
    sides_differ: bool = False
    """First and second images may be of different kinds, so that T–S is not S–T with other pairs."""
    notes: tuple[str, ...] = ()
    """Remarks that a reader must know of the list."""

    @property
    def folds(self) -> int:
        """Return the number of folds."""
        return int(self.fold.max()) + 1

    def digest(self) -> str:
        """Return the SHA-256 over which pairs there are, in which order: two lists may have their images in common."""
        return hashlib.sha256(np.stack([self.first, self.second, self.same, self.fold]).tobytes()).hexdigest()


def linked(count: int, first: Ints, second: Ints) -> Ints:
    """Label the connected components of ``count`` items under the links ``first[i]``–``second[i]``: int64, from 0.

    Union-find with path halving (Tarjan and van Leeuwen 1984); labels ascend with the first item of each group.
    """
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return np.unique(np.array([root(item) for item in range(count)], np.int64), return_inverse=True)[1].astype(np.int64)
