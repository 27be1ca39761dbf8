"""Score all pairs of a pairing, streamed in tiles over one pass, never as an N×M array.

What is kept of the impostors thins out downwards. The ``KEEP`` highest are kept one by one; below them every stratum,
four times as many pairs each, is sampled at a quarter of the rate of the one above. So a false match rate of 1e-5 and
one of 1e-1 rest on about as many kept pairs, and memory grows with the logarithm of the number of pairs. A histogram
counts every pair, for rates in which every pair of images weighs the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats, Ints, Pairing

Ids = NDArray[np.int32]

BINS = 1 << 17
"""Bins of the impostor histogram over [−1, 1], 1.5e-5 each: a power of two, so that every edge is a float32."""
KEEP = 200_000
"""About this many of the highest impostor scores are kept one by one; all where there are at most twice as many."""
PILOT = 2048
"""Images a side whose scores say, before the pass, about where the strata begin."""
TILE = 1024
FEW = 1 / 64
"""A stratum that keeps fewer is found by drawing positions; one that keeps more, by looking at every score."""
_NO_PAIR = np.float32(-2)
_MARGIN = 10
"""Bins beyond −1 and 1, for the rounding of float32."""


@dataclass(frozen=True)
class PairScores:
    """Hold the scores of one pairing: all genuine ones, and a stratified sample of the impostors."""

    pairing: Pairing
    genuine: Floats
    """All genuine scores, descending."""
    genuine_query: Ids
    """Query image of each genuine pair."""
    genuine_gallery: Ids
    """Gallery image of each genuine pair."""
    impostor: Floats
    """Impostor scores that were kept, descending."""
    impostor_query: Ids
    """Query image of each kept impostor pair."""
    impostor_gallery: Ids
    """Gallery image of each kept impostor pair."""
    weight: Doubles
    """Number of impostor pairs that each kept one stands for: 1 at and above ``cut``."""
    cut: float
    """At and above this score every impostor pair is kept; −inf where all are."""
    histogram: Ints
    """All impostor pairs in ``BINS`` equal bins over [−1, 1]."""

    @cached_property
    def genuine_identity(self) -> Ints:
        """Return the identity of each genuine pair."""
        return self.pairing.query[self.genuine_query]

    @cached_property
    def impostor_identities(self) -> tuple[Ints, Ints]:
        """Return the identities on the query and on the gallery side of each kept impostor pair."""
        return self.pairing.query[self.impostor_query], self.pairing.gallery[self.impostor_gallery]

    @cached_property
    def share(self) -> Doubles:
        """Return the part of its pair of people that each kept impostor pair stands for: their parts add up to 1."""
        return self.weight / self.pairing.pairs_between(*self.impostor_identities)


def score_pairs(
    pairing: Pairing,
    query: Floats,
    gallery: Floats,
    *,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> PairScores:
    """Score every pair by its cosine. ``query``, ``gallery``: float32 N×D and M×D unit rows.

    Memory: the kept pairs, a tile, and a copy of each side whose identities are not in ascending order. ``advance`` is
    told how many query images are done.
    """
    random = np.random.default_rng(seed)
    strata = _strata(pairing, query, gallery, random)
    few = np.flatnonzero(strata.rate <= FEW)
    looked_at = np.float32(strata.lowest[few[0] - 1] if len(few) else -1.5)  # −1.5: every score but no pair
    drawn_rate = strata.rate[few[0]] if len(few) else 0.0

    histogram = np.zeros(BINS + 2 * _MARGIN, np.int64)
    genuine, impostor = _Kept(), _Kept()
    for tile in _tiles(pairing, query, gallery):
        flat = tile.scores.ravel()
        genuine.add(tile, tile.genuine, flat[tile.genuine])
        flat[tile.genuine] = _NO_PAIR
        flat[tile.left_out] = _NO_PAIR
        histogram += count_bins(tile.scores)
        candidates = np.flatnonzero(flat >= looked_at)
        inclusion = np.ones(len(candidates))
        if drawn_rate:
            starts = np.arange(0, len(flat), round(1 / drawn_rate))
            places = starts + random.integers(0, round(1 / drawn_rate), len(starts))
            places = places[places < len(flat)]
            below = flat[places]
            places = places[(below < looked_at) & (below > _NO_PAIR)]
            candidates = np.concatenate([candidates, places])
            inclusion = np.concatenate([inclusion, np.full(len(places), drawn_rate)])
        scores = flat[candidates]
        chosen = random.random(len(scores)) * inclusion < strata.rate[strata.of(scores)]
        impostor.add(tile, candidates[chosen], scores[chosen])
        if tile.ends_rows:
            advance(len(tile.rows))

    counted = fold_margins(histogram)
    kept, kept_query, kept_gallery = impostor.descending()
    scored, scored_query, scored_gallery = genuine.descending()
    return PairScores(
        pairing=pairing,
        genuine=scored,
        genuine_query=scored_query,
        genuine_gallery=scored_gallery,
        impostor=kept,
        impostor_query=kept_query,
        impostor_gallery=kept_gallery,
        weight=strata.weights(kept, counted),
        cut=float(strata.lowest[0]) if len(strata.lowest) > 1 else -np.inf,
        histogram=counted,
    )


def bin_of(scores: Floats) -> Ints:
    """Return the histogram bin of each score; scores outside [−1, 1] (rounding) count in the outermost bins."""
    return np.clip(np.floor((scores.astype(np.float64) + 1) * (BINS / 2)).astype(np.int64), 0, BINS - 1)


def bin_edges() -> Doubles:
    """Return the lower edge of each histogram bin."""
    return np.arange(BINS) / (BINS / 2) - 1


@dataclass(frozen=True)
class Strata:
    """Divide scores into ranges from high to low. ``lowest``: smallest score of each; ``rate``: what is kept."""

    lowest: Doubles
    rate: Doubles

    def of(self, scores: Floats) -> Ints:
        """Return the stratum of each score."""
        edge = bin_of(scores) / (BINS / 2) - 1
        return np.minimum(np.searchsorted(-self.lowest, -edge, "left"), len(self.rate) - 1)

    def weights(self, descending: Floats, histogram: Ints) -> Doubles:
        """Return the pairs that each kept one stands for: its stratum's count over those that were kept."""
        if len(self.rate) == 1:
            return np.ones(len(descending))
        stratum = self.of(descending)
        kept = np.bincount(stratum, minlength=len(self.rate))
        there = np.bincount(self.of(bin_edges().astype(np.float32)), histogram, minlength=len(self.rate))
        each = there / np.maximum(kept, 1)
        each[0] = 1.0  # all of the highest are kept
        weight: Doubles = each[stratum]
        return weight


def _strata(pairing: Pairing, query: Floats, gallery: Floats, random: np.random.Generator) -> Strata:
    total = pairing.impostor_pairs
    if total <= 2 * KEEP:
        return Strata(np.array([-1.0]), np.ones(1))
    rows, columns = (random.permutation(len(side))[:PILOT] for side in (query, gallery))
    scores = query[rows] @ gallery[columns].T
    scores[pairing.query[rows][:, None] == pairing.gallery[columns]] = _NO_PAIR
    return strata_of(np.sort(scores[scores > -1.5])[::-1], total)


def strata_of(sample: Floats, total: int) -> Strata:
    """Choose strata of ``total`` impostor pairs from a descending sample of their scores."""
    count = max(1, int(np.log(total / KEEP) / np.log(4)))  # the last stratum holds most of all pairs, never few
    ranks = KEEP * 4.0 ** np.arange(count)
    places = np.minimum(ranks / total * len(sample), len(sample) - 1).astype(np.int64)
    lowest = np.append(bin_edges()[bin_of(sample[places])], -1.0)
    return Strata(lowest, np.append(KEEP / ranks, KEEP / ranks[-1] / 4))


@dataclass(frozen=True)
class _Tile:
    """Hold scores of some query against some gallery images, and the flat places of those that are no impostors."""

    rows: Ints
    columns: Ints
    scores: Floats
    genuine: Ints
    left_out: Ints
    ends_rows: bool


class _Kept:
    """Collect the kept pairs of all tiles."""

    def __init__(self) -> None:
        self._parts: list[tuple[Floats, Ids, Ids]] = []

    def add(self, tile: _Tile, places: Ints, scores: Floats) -> None:
        row, column = np.divmod(places, len(tile.columns))
        self._parts.append((scores, tile.rows[row].astype(np.int32), tile.columns[column].astype(np.int32)))

    def descending(self) -> tuple[Floats, Ids, Ids]:
        scores, query, gallery = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        self._parts.clear()
        order = np.argsort(-scores, kind="stable")
        return scores[order], query[order], gallery[order]


def _tiles(pairing: Pairing, query: Floats, gallery: Floats) -> Iterator[_Tile]:
    """Cut both sides into tiles in the order of their identities, so that genuine pairs lie together.

    Unordered pairs need the tiles on and right of the diagonal, and there the pairs right of it.
    """
    by_query, by_gallery = (np.argsort(side, kind="stable") for side in (pairing.query, pairing.gallery))
    query, gallery = _in_order(query, by_query), _in_order(gallery, by_gallery)
    owners = pairing.gallery[by_gallery]
    first, end = (np.searchsorted(owners, pairing.query[by_query], side) for side in ("left", "right"))
    place = np.empty(len(by_query), np.int64), np.empty(len(by_gallery), np.int64)
    place[0][by_query], place[1][by_gallery] = np.arange(len(by_query)), np.arange(len(by_gallery))
    same_file = np.stack([place[0][pairing.left_out[0]], place[1][pairing.left_out[1]]])
    if pairing.unordered:
        same_file.sort(axis=0)
    same_file = same_file[:, np.argsort(same_file[0], kind="stable")]

    buffer = np.empty(TILE * TILE, np.float32)
    for top in range(0, len(query), TILE):
        bottom = min(top + TILE, len(query))
        here = slice(*np.searchsorted(same_file[0], (top, bottom)))
        for left in range(top if pairing.unordered else 0, len(gallery), TILE):
            right = min(left + TILE, len(gallery))
            width = right - left
            scores = buffer[: (bottom - top) * width].reshape(bottom - top, width)
            np.matmul(query[top:bottom], gallery[left:right].T, out=scores)
            diagonal = pairing.unordered and left == top
            from_, to = np.clip(first[top:bottom], left, right), np.clip(end[top:bottom], left, right)
            if diagonal:
                scores[np.tril_indices(bottom - top)] = _NO_PAIR
                from_ = np.maximum(from_, np.arange(top, bottom) + 1)
            genuine = _ranges(np.arange(bottom - top) * width + from_ - left, np.maximum(to - from_, 0))
            i, j = same_file[:, here]
            inside = (j >= left) & (j < right)
            left_out = (i[inside] - top) * width + j[inside] - left
            if len(left_out):
                genuine = genuine[~np.isin(genuine, left_out)]
            yield _Tile(by_query[top:bottom], by_gallery[left:right], scores, genuine, left_out, right == len(gallery))


def _in_order(vectors: Floats, order: Ints) -> Floats:
    return vectors if (order[1:] > order[:-1]).all() else vectors[order]


def _ranges(start: Ints, length: Ints) -> Ints:
    """Concatenate ranges: start[0], start[0]+1, … (length[0] of them), start[1], and so on."""
    return np.repeat(start - np.cumsum(length) + length, length) + np.arange(length.sum())


def count_bins(scores: Floats) -> Ints:
    """Count a histogram with ``_MARGIN`` bins more at either end."""
    beyond = 1 + _MARGIN / (BINS / 2)
    counts = cv2.calcHist([scores], [0], None, [BINS + 2 * _MARGIN], [-beyond, beyond])
    whole: Ints = counts.ravel().astype(np.int64)
    return whole


def fold_margins(histogram: Ints) -> Ints:
    """Add what lies beyond −1 and 1 to the outermost bins."""
    inner: Ints = histogram[_MARGIN:-_MARGIN].copy()
    inner[0] += histogram[:_MARGIN].sum()
    inner[-1] += histogram[-_MARGIN:].sum()
    return inner
