"""Say which pairs of images an evaluation compares.

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
    """Hold query × gallery images, by identity and file. Needs no embedding, so bad sets are found before any work.

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
        """Return query and gallery index of every pair that is the same file twice (i < j where unordered)."""
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
        """Count the query images of each identity."""
        return np.bincount(self.query, minlength=self.identities).astype(np.float64)

    @cached_property
    def per_gallery(self) -> Doubles:
        """Count the gallery images of each identity."""
        return np.bincount(self.gallery, minlength=self.identities).astype(np.float64)

    @cached_property
    def genuine_per_identity(self) -> Doubles:
        """Count the genuine pairs of each identity."""
        n, m = self.per_query, self.per_gallery
        i, j = self.left_out
        a = self.query[i]
        dropped = np.bincount(a[a == self.gallery[j]], minlength=self.identities)
        return (n * (n - 1) / 2 if self.unordered else n * m) - dropped

    def impostor_weight(self, multiplicity: Doubles) -> float:
        """Sum multiplicity[a]·multiplicity[b] over all impostor pairs of identities a ≠ b, in closed form."""
        query, gallery = multiplicity * self.per_query, multiplicity * self.per_gallery
        total = query.sum() * gallery.sum() - query @ gallery
        i, j = self.left_out
        a, b = self.query[i], self.gallery[j]
        dropped = (multiplicity[a] * multiplicity[b])[a != b].sum()
        return float(total / 2 - dropped if self.unordered else total - dropped)

    @cached_property
    def genuine_pairs(self) -> int:
        """Count the genuine pairs."""
        return round(float(self.genuine_per_identity.sum()))

    @cached_property
    def impostor_pairs(self) -> int:
        """Count the impostor pairs."""
        return round(self.impostor_weight(np.ones(self.identities)))

    def identity_pair_weight(self, multiplicity: Doubles) -> float:
        """Sum multiplicity[a]·multiplicity[b] over the unordered pairs of identities a ≠ b that are compared."""
        query, gallery = np.where(self.per_query > 0, multiplicity, 0), np.where(self.per_gallery > 0, multiplicity, 0)
        both = np.minimum(query, gallery)
        twice = (both.sum() ** 2 - both @ both) / 2
        a, b = self._never_compared
        return float(query.sum() * gallery.sum() - query @ gallery - twice - multiplicity[a] @ multiplicity[b])

    @cached_property
    def identity_pairs(self) -> int:
        """Count the unordered pairs of different identities that are compared."""
        return round(self.identity_pair_weight(np.ones(self.identities)))

    @cached_property
    def identity_pairs_per_identity(self) -> Doubles:
        """Count for each identity the others that it is compared with."""
        query, gallery = self.per_query > 0, self.per_gallery > 0
        either = int(np.count_nonzero(query | gallery)) - 1
        count = np.where(query & gallery, either, np.where(query, gallery.sum(), np.where(gallery, query.sum(), 0)))
        a, b = self._never_compared
        never = np.bincount(np.concatenate([a, b]), minlength=self.identities)
        counted: Doubles = (count - never).astype(np.float64)
        return counted

    @cached_property
    def impostor_pairs_per_identity(self) -> Doubles:
        """Count the impostor pairs of each identity, on either side."""
        n, m = self.per_query, self.per_gallery
        count = n * (m.sum() - m) + (0 if self.unordered else m * (n.sum() - n))
        i, j = self.left_out
        a, b = self.query[i], self.gallery[j]
        for side in (a[a != b], b[a != b]):
            count = count - np.bincount(side, minlength=self.identities)
        counted: Doubles = count.astype(np.float64)
        return counted

    def pairs_between(self, a: Ints, b: Ints) -> Doubles:
        """Count the pairs of images that are compared of each two identities a ≠ b, either way round."""
        codes, dropped = self._dropped
        found = self._all_between(a, b)
        if len(codes):
            code = self._code(a, b)
            place = np.minimum(np.searchsorted(codes, code), len(codes) - 1)
            found -= np.where(codes[place] == code, dropped[place], 0)
        return found

    def _all_between(self, a: Ints, b: Ints) -> Doubles:
        pairs: Doubles = self.per_query[a] * self.per_gallery[b]
        return pairs if self.unordered else pairs + self.per_query[b] * self.per_gallery[a]

    def _code(self, a: Ints, b: Ints) -> Ints:
        code: Ints = np.minimum(a, b) * self.identities + np.maximum(a, b)
        return code

    @cached_property
    def _dropped(self) -> tuple[Ints, Ints]:
        """List pairs of identities that share a file, as ascending codes, and how many of their pairs are left out."""
        a, b = (side[index] for side, index in zip((self.query, self.gallery), self.left_out, strict=True))
        codes, counts = np.unique(self._code(a, b)[a != b], return_counts=True)
        return codes, counts

    @cached_property
    def _never_compared(self) -> tuple[Ints, Ints]:
        """List pairs of identities whose every pair is one file twice."""
        codes, dropped = self._dropped
        a, b = np.divmod(codes, self.identities)
        none = self._all_between(a, b) <= dropped
        return a[none], b[none]
