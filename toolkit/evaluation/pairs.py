"""Which pairs of images an evaluation compares.

Every pair of a query image and a gallery image counts, except an image with itself or with a byte-identical copy.
Where both sides are one encoder over one set, (i, j) and (j, i) have the same score and count once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Pairing:
    """Query × gallery images, by identity and file. Needs no embedding, so bad sets are found before any work.

    ``query``, ``gallery``: int64 identity of each image, indices into one list of ``identities`` names' count.
    ``query_file``, ``gallery_file``: int64, equal where two images are the same bytes.
    ``unordered``: both sides are one encoder over one set, so each pair counts once.
    """

    query: Ints
    gallery: Ints
    query_file: Ints
    gallery_file: Ints
    identities: int
    unordered: bool = False

    @cached_property
    def left_out(self) -> tuple[Ints, Ints]:
        """Query and gallery index of every pair that is the same file twice (i < j where unordered)."""
        order = np.argsort(self.gallery_file, kind="stable")
        known = self.gallery_file[order]
        first = np.searchsorted(known, self.query_file, "left")
        many = np.searchsorted(known, self.query_file, "right") - first
        i = np.repeat(np.arange(len(self.query)), many)
        j = order[np.arange(len(i)) - np.repeat(np.cumsum(many) - many, many) + np.repeat(first, many)]
        keep = i < j if self.unordered else np.ones(len(i), bool)
        return i[keep], j[keep]

    @cached_property
    def per_query(self) -> Doubles:
        """Query images of each identity."""
        return np.bincount(self.query, minlength=self.identities).astype(np.float64)

    @cached_property
    def per_gallery(self) -> Doubles:
        """Gallery images of each identity."""
        return np.bincount(self.gallery, minlength=self.identities).astype(np.float64)

    @cached_property
    def genuine_per_identity(self) -> Doubles:
        """Genuine pairs of each identity."""
        n, m = self.per_query, self.per_gallery
        i, j = self.left_out
        a = self.query[i]
        dropped = np.bincount(a[a == self.gallery[j]], minlength=self.identities)
        return (n * (n - 1) / 2 if self.unordered else n * m) - dropped

    def impostor_weight(self, weight: Doubles) -> float:
        """Σ weight[a]·weight[b] over all impostor pairs of identities a ≠ b, in closed form. ``weight``: one each."""
        query, gallery = weight * self.per_query, weight * self.per_gallery
        total = query.sum() * gallery.sum() - query @ gallery
        i, j = self.left_out
        a, b = self.query[i], self.gallery[j]
        dropped = (weight[a] * weight[b])[a != b].sum()
        return float(total / 2 - dropped if self.unordered else total - dropped)

    @cached_property
    def genuine_pairs(self) -> int:
        """Number of genuine pairs."""
        return round(float(self.genuine_per_identity.sum()))

    @cached_property
    def impostor_pairs(self) -> int:
        """Number of impostor pairs."""
        return round(self.impostor_weight(np.ones(self.identities)))

    @cached_property
    def identity_pairs(self) -> int:
        """Number of unordered pairs of different identities that are compared."""
        in_query, in_gallery = self.per_query > 0, self.per_gallery > 0
        q, g, both = (int(np.count_nonzero(x)) for x in (in_query, in_gallery, in_query & in_gallery))
        return q * g - both - both * (both - 1) // 2

    @cached_property
    def impostor_squares(self) -> float:
        """Σ n² over the pairs of different identities, n impostor pairs of images each; copies counted."""
        query, gallery = self.per_query, self.per_gallery
        once = (query**2).sum() * (gallery**2).sum() - (query**2 * gallery**2).sum()
        twice = (query @ gallery) ** 2 - (query**2 * gallery**2).sum()
        return float(once / 2 if self.unordered else once + twice)
