"""Measure what the false non-match rate falls to where the photographs of least quality are discarded.

These are error-versus-discard characteristics (ISO/IEC 29794-1; Grother and Tabassi 2007, error-reject curves): the
threshold stays, the genuine pairs whose worse image has the lowest quality go first. A measure that says nothing leaves
the rate where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkd.toolkit.encoders.base import Embeddings
from pkd.toolkit.evaluation.metrics.bootstrap import interval
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Ints, Mask, Pairing

FRACTIONS = tuple(round(0.05 * step, 2) for step in range(11))
"""Shares of the genuine pairs, every identity weighing the same, that are discarded."""


@dataclass(frozen=True)
class GenuinePairs:
    """Hold every genuine pair: its score, whose it is, and its two images (rows of query and gallery)."""

    score: Doubles
    identity: Ints
    query: Ints
    gallery: Ints


@dataclass(frozen=True)
class Curve:
    """Hold the rate at each of FRACTIONS, its 95 % interval over identities, and how it differs from the first."""

    fnmr: Doubles
    low: Doubles
    high: Doubles
    change: Doubles
    change_low: Doubles
    change_high: Doubles
    cut: Doubles
    """Quality of the pair at which each fraction ends."""


def genuine_pairs(pairing: Pairing, query: Embeddings, gallery: Embeddings) -> GenuinePairs:
    """Score all genuine pairs by their cosine. ``query``, ``gallery``: float32 N×D and M×D unit rows."""
    scores, owners, rows, columns = [], [], [], []
    by_query, by_gallery = (np.argsort(side, kind="stable") for side in (pairing.query, pairing.gallery))
    for identity in np.unique(pairing.query):
        i = by_query[slice(*np.searchsorted(pairing.query[by_query], (identity, identity + 1)))]
        j = by_gallery[slice(*np.searchsorted(pairing.gallery[by_gallery], (identity, identity + 1)))]
        keep = pairing.query_file[i][:, None] != pairing.gallery_file[j][None]
        if pairing.unordered:
            keep &= i[:, None] < j[None]
        a, b = np.nonzero(keep)
        scores.append((query[i] @ gallery[j].T)[a, b].astype(np.float64))
        owners.append(np.full(len(a), identity, np.int64))
        rows.append(i[a])
        columns.append(j[b])
    return GenuinePairs(*(np.concatenate(parts) for parts in (scores, owners, rows, columns)))


def discard_curve(missed: Mask, identity: Ints, quality: Doubles, *, resamples: int = 200, seed: int = 0) -> Curve:
    """Discard genuine pairs by ``quality`` (the higher the better), every identity weighing the same.

    ``missed``: whether each pair scores below the threshold. Pairs of equal quality go together, each by the same
    share. Intervals are percentiles over ``resamples`` of the identities.
    """
    owners, of = np.unique(identity, return_inverse=True)
    weight = (1 / np.bincount(of))[of]
    steps, step = np.unique(quality, return_inverse=True)

    def rates(weights: Doubles) -> Doubles:
        total = np.concatenate([[0], np.cumsum(np.bincount(step, weights, len(steps)))])
        wrong = np.concatenate([[0], np.cumsum(np.bincount(step, weights * missed, len(steps)))])
        gone = np.array(FRACTIONS) * total[-1]
        left: Doubles = (wrong[-1] - np.interp(gone, total, wrong)) / (total[-1] - gone)
        return left

    fnmr = rates(weight)
    random = np.random.default_rng(seed)
    drawn = np.empty((resamples, len(FRACTIONS)))
    for row in drawn:
        row[:] = rates(weight * random.multinomial(len(owners), np.full(len(owners), 1 / len(owners)))[of])
    reached = np.cumsum(np.bincount(step, weight, len(steps))) / weight.sum()
    cut = steps[np.minimum(np.searchsorted(reached, FRACTIONS, "right"), len(steps) - 1)]
    low, high = np.array([interval(column) for column in drawn.T]).T
    less, more = np.array([interval(column) for column in (drawn - drawn[:, :1]).T]).T
    return Curve(fnmr, low, high, fnmr - fnmr[0], less, more, cut)
