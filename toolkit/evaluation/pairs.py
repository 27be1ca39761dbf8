"""Which pairs of images an evaluation compares, and their scores: streamed in blocks, never as an N×N array.

Every pair of a query image and a gallery image counts, except an image with itself or with a byte-identical copy.
Where both sides are one encoder over one set, (i, j) and (j, i) have the same score and count once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

BINS = 200_000
"""Bins of the impostor histogram over [−1, 1]: 1e-5 cosine each."""
TAIL = 0.03
"""Fraction of the impostor pairs, those with the highest scores, that is kept one by one."""
KEEP = 200_000
"""Where there are at most this many impostor pairs, all of them are kept."""
BODY = 50_000
"""Number of impostor pairs sampled from below the kept tail, for intervals at high false match rates."""
_BLOCK = 1 << 20


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


@dataclass(frozen=True)
class PairScores:
    """Scores of one pairing: all genuine ones, and of the impostors the high tail plus a sample of the rest."""

    pairing: Pairing
    genuine: Floats
    """All genuine scores, descending."""
    genuine_identity: Ints
    """Identity of each genuine pair."""
    impostor: Floats
    """Impostor scores that were kept, descending."""
    impostor_query: Ints
    """Identity on the query side of each kept impostor pair."""
    impostor_gallery: Ints
    """Identity on the gallery side of each kept impostor pair."""
    mass: Doubles
    """How many impostor pairs each kept one stands for: 1 in the tail, more in the sample below it."""
    cut: float
    """At and above this score every impostor pair is kept; −inf where all are."""
    histogram: Ints
    """All impostor pairs in ``BINS`` equal bins over [−1, 1]."""


def score_pairs(
    pairing: Pairing,
    query: Floats,
    gallery: Floats,
    *,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> PairScores:
    """Cosine of every pair. ``query``, ``gallery``: float32 N×D and M×D unit rows.

    Two passes over the same blocks: the first counts (histogram) and finds where the tail begins, the second collects
    it. Memory: one block and the kept pairs. ``advance`` is told how many query images are done (each counts twice).
    """
    histogram = np.zeros(BINS, np.int64)
    genuine: list[Floats] = []
    genuine_identity: list[Ints] = []
    for rows, scores, same, wanted in _blocks(pairing, query, gallery):
        histogram += np.bincount(bin_of(scores[wanted & ~same]), minlength=BINS)
        row, column = np.nonzero(wanted & same)
        genuine.append(scores[row, column])
        genuine_identity.append(pairing.query[rows.start + row])
        advance(len(rows))

    keep = max(TAIL * pairing.impostor_pairs, KEEP)
    cut, chance = -np.inf, 0.0
    if pairing.impostor_pairs > keep:
        above = np.cumsum(histogram[::-1])[::-1]
        cut = float(bin_edges()[np.flatnonzero(above >= keep)[-1]])
        chance = min(1.0, BODY / pairing.impostor_pairs)

    random = np.random.default_rng(seed)
    impostor: list[Floats] = []
    sides: list[NDArray[np.int64]] = []
    for rows, scores, same, wanted in _blocks(pairing, query, gallery):
        chosen = scores >= cut
        if chance:
            chosen |= random.random(scores.shape, np.float32) < chance
        row, column = np.nonzero(chosen & wanted & ~same)
        impostor.append(scores[row, column])
        offset = len(pairing.gallery) - scores.shape[1]
        sides.append(np.stack([pairing.query[rows.start + row], pairing.gallery[offset + column]]))
        advance(len(rows))

    kept = np.concatenate(impostor)
    order = np.argsort(-kept, kind="stable")
    kept, side = kept[order], np.concatenate(sides, axis=1)[:, order]
    exact = int(np.searchsorted(-kept, -cut, "right"))
    sampled = len(kept) - exact
    mass = np.ones(len(kept))
    if sampled:
        mass[exact:] = (pairing.impostor_pairs - exact) / sampled
    scored = np.concatenate(genuine)
    down = np.argsort(-scored, kind="stable")
    return PairScores(
        pairing, scored[down], np.concatenate(genuine_identity)[down], kept, side[0], side[1], mass, cut, histogram
    )


def bin_of(scores: Floats) -> Ints:
    """Histogram bin of each score; scores outside [−1, 1] (rounding) count in the outermost bins."""
    return np.clip(((scores.astype(np.float64) + 1) * (BINS / 2)).astype(np.int64), 0, BINS - 1)


def bin_edges() -> Doubles:
    """Lower edge of each histogram bin."""
    return np.arange(BINS) / (BINS / 2) - 1


def _blocks(pairing: Pairing, query: Floats, gallery: Floats) -> Iterator[tuple[range, Floats, Mask, Mask]]:
    """Yield (query rows, scores, same identity, pair is wanted) for consecutive blocks of query images.

    Where pairs are unordered a block's columns begin at its own first row; else they are all gallery images.
    """
    step = max(1, _BLOCK // max(1, len(gallery)))
    for start in range(0, len(query), step):
        rows = range(start, min(start + step, len(query)))
        first = start if pairing.unordered else 0
        here = slice(rows.start, rows.stop)
        wanted = pairing.query_file[here, None] != pairing.gallery_file[None, first:]
        if pairing.unordered:
            wanted = np.triu(wanted, 1)
        same = pairing.query[here, None] == pairing.gallery[None, first:]
        yield rows, query[here] @ gallery[first:].T, same, wanted
