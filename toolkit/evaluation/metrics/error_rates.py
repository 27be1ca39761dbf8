"""Compute error rates from arrays alone.

A pair matches when its score is at or above the threshold. FMR: how often two different people match. TAR: how often
a person matches himself. Either is balanced, every two people (every person) weighing the same however many images
there are of them, or raw, every pair of images weighing the same. Where few people have most images, raw rates are
about those few, and a threshold that meets a raw FMR on one set of people misses it on another.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from pkd.toolkit.certificates.certificate import no_less
from pkd.toolkit.core.errors import UnsupportedFmr
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores, bin_edges, bin_of
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats, Ints, Pairing

EXPECTED = 10
"""An FMR is resolved where at least this many pairs of different identities are expected above its threshold."""
BLOCK = 1 << 15
"""Pairs that are summed up at a time: what they need stays in the cache."""


@dataclass(frozen=True)
class Rates:
    """Hold what a set of target false match rates leads to: one entry per target."""

    last_rejected: Floats
    """Highest score that must not match for the balanced FMR; −inf where all may."""
    tar_balanced: Doubles
    """Balanced TAR at the threshold of the balanced FMR."""
    raw_last_rejected: Floats
    """Highest score that must not match for the raw FMR."""
    tar: Doubles
    """Raw TAR at the threshold of the raw FMR."""

    @property
    def threshold(self) -> Doubles:
        """Return the smallest float32 threshold whose balanced false match rate is at most the target."""
        return _next(self.last_rejected)

    @property
    def raw_threshold(self) -> Doubles:
        """Return the smallest float32 threshold whose raw false match rate is at most the target."""
        return _next(self.raw_last_rejected)


def smallest_fmr(pairing: Pairing) -> float:
    """Compute the smallest FMR that the set resolves: ``EXPECTED`` / pairs of different identities.

    Pairs of images are more, but those of the same two people repeat one another.
    """
    return EXPECTED / max(1, min(pairing.identity_pairs, pairing.impostor_pairs))


def require_resolved(pairing: Pairing, fmr: float) -> None:
    """Raise UnsupportedFmr, with the reason, where ``fmr`` is below what the set resolves."""
    smallest = smallest_fmr(pairing)
    if not smallest * (1 - 1e-9) <= fmr <= 1:
        raise UnsupportedFmr(
            f"FMR {fmr:g} is not resolved: {pairing.impostor_pairs:,} impostor pairs come from "
            f"{pairing.identity_pairs:,} pairs of different identities: fewer than {EXPECTED} of those would match. "
            + (
                f"Ask for {no_less(smallest)} or more, or evaluate on more people."
                if smallest < 1
                else "Evaluate on more people."
            )
        )


def rates(scores: PairScores, fmrs: Doubles) -> Rates:
    """Find the threshold and the TAR at each target FMR.

    The threshold is the smallest with FMR ≤ target, so that of several impostors with one score all match or none.
    Exact where all impostors are kept; below that the balanced one comes from their sample, the raw one is the next
    edge of the histogram.
    """
    multiplicity = np.ones(scores.pairing.identities)
    balanced = _last_rejected(scores, fmrs, impostor_cumulative(scores, multiplicity))
    allowed = np.floor(fmrs * (1 + 1e-9) * scores.pairing.impostor_pairs).astype(np.int64)
    exact = np.searchsorted(-scores.impostor, np.float32(-scores.cut), "right")
    raw = np.append(scores.impostor, np.float32(-np.inf))[np.minimum(allowed, exact)]
    if exact < len(scores.impostor):
        below = allowed >= exact
        above = np.append(np.cumsum(scores.histogram[::-1])[::-1], 0)
        edge = len(above) - np.searchsorted(above[::-1], allowed[below], "right")
        raw[below] = np.nextafter(np.append(bin_edges(), 1.0)[edge].astype(np.float32), np.float32(-np.inf))
    return _accepted(scores, balanced, raw, multiplicity)


def first_beyond(fmr: Doubles, full: Doubles, shrink: Doubles, fmrs: Doubles, total: Doubles | float = 1.0) -> Ints:
    """Find the place of the first kept impostor that is one too many for each target (F, or R×F of R resamples).

    ``fmr``, times 1 / ``total``: FMR of a resample at each kept impostor; its deviation from ``full``, that of all
    people, counts times ``shrink`` (one per target). It need not rise: the place is where halving ends.
    """
    low = np.zeros((*fmr.shape[:-1], len(fmrs)), np.int64)
    high = np.full_like(low, len(full))
    targets, rest = fmrs * (1 + 1e-9), 1 - shrink
    for _ in range(len(full).bit_length()):  # one that has ended meets the same answer again and stays
        middle = np.minimum((low + high) >> 1, len(full) - 1)
        within = shrink * (np.take_along_axis(fmr, middle, -1) / total) + rest * np.take(full, middle) <= targets
        low, high = np.where(within, middle + 1, low), np.where(within, high, middle)
    return low


def accepted_rates(scores: PairScores, balanced: Ints, raw: Ints, multiplicity: Doubles) -> Rates:
    """Find rates with every identity as often as it was drawn, where the kept impostors before these places match.

    ``balanced``, ``raw``: F places. ``multiplicity``: one per identity. All may have a row for each of R resamples.
    """
    ends = np.append(scores.impostor, np.float32(-np.inf))
    return _accepted(scores, ends[balanced], ends[raw], multiplicity)


def fmr_at(scores: PairScores, thresholds: Doubles) -> Doubles:
    """Compute the balanced FMR at each threshold: exact where all impostors are kept, from their sample below."""
    cumulative = impostor_cumulative(scores, np.ones(scores.pairing.identities))
    rate: Doubles = np.minimum(np.append(0.0, cumulative), 1.0)
    return rate[matching(scores.impostor, thresholds)]


def raw_fmr_at(scores: PairScores, thresholds: Doubles) -> Doubles:
    """Compute the raw FMR at each threshold: exact where all impostors are kept, else to a histogram's bin."""
    kept = matching(scores.impostor, thresholds).astype(np.float64)
    below = thresholds < scores.cut
    if below.any():
        above = np.append(np.cumsum(scores.histogram[::-1])[::-1], 0)
        kept[below] = above[bin_of(thresholds[below].astype(np.float32))]
    return kept / scores.pairing.impostor_pairs


def equal_error_rate(scores: PairScores) -> float:
    """Compute the equal error rate: the smallest over all thresholds of the larger of FMR and FNMR (raw)."""
    edges = bin_edges()
    grid = np.concatenate([scores.impostor, scores.genuine]).astype(np.float64)
    grid = np.concatenate([grid[grid >= scores.cut], edges[edges < scores.cut], [np.inf]])
    fnmr = 1 - matching(scores.genuine, grid) / len(scores.genuine)
    return float(np.maximum(raw_fmr_at(scores, grid), fnmr).min())


def lowest_impostor(scores: PairScores) -> float:
    """Find a score that no impostor pair is below."""
    if np.isneginf(scores.cut):
        return float(scores.impostor[-1])
    return float(bin_edges()[np.flatnonzero(scores.histogram)[0]])


def impostor_cumulative(scores: PairScores, multiplicity: Doubles) -> Doubles:
    """Sum up the balanced FMR at each kept impostor score, descending, with each identity's ``multiplicity``."""
    return _cumulative(scores, multiplicity, scores.share, scores.pairing.identity_pair_weight(multiplicity))


def raw_impostor_cumulative(scores: PairScores, multiplicity: Doubles) -> Doubles:
    """Sum up the raw FMR at each kept impostor score, descending, with each identity's ``multiplicity``."""
    return _cumulative(scores, multiplicity, scores.weight, scores.pairing.impostor_weight(multiplicity))


class LinearSums:
    """Sum up impostors, descending, to first order in how often each identity was drawn.

    A pair weighs m(a) + m(b) − 1 in place of m(a)·m(b): the same but for a term that is noise of pairs alone. The
    arrays are made once: the system takes longer to hand out as much memory than the sums take.
    """

    def __init__(self, scores: PairScores, resamples: int) -> None:
        pairing = scores.pairing
        self._people = scores.impostor_identities
        self._parts = scores.share, scores.weight
        self._pairs = pairing.identity_pairs_per_identity, pairing.impostor_pairs_per_identity
        self._sums = np.zeros((2, resamples, len(scores.impostor) + 1))

    def sum(self, multiplicity: Doubles) -> list[tuple[Doubles, Doubles]]:
        """Return weight before each kept impostor, then of all, R×(K + 1), and of all pairs, R×1: balanced, then raw.

        Their quotient is the FMR. ``multiplicity``: R×N. The next call overwrites what this one returned.
        """
        query, gallery = self._people
        for r, more in enumerate(multiplicity.astype(np.int32) - 1):
            for start in range(0, len(query), BLOCK):
                here = slice(start, start + BLOCK)
                weight = np.take(more, query[here])
                weight += np.take(more, gallery[here])
                weight += 1
                for sums, part in zip(self._sums[:, r], self._parts, strict=True):
                    _add_up(weight * part[here], sums[start : start + BLOCK + 1])
        totals = (np.maximum(p.sum() / 2 + (multiplicity - 1) @ p, p.max())[:, None] for p in self._pairs)
        return list(zip(self._sums[:, : len(multiplicity)], totals, strict=True))


def matching(descending: Floats, thresholds: Doubles) -> Ints:
    """Count the scores at or above each threshold."""
    return np.searchsorted(-descending.astype(np.float64), -thresholds, "right")


def _cumulative(scores: PairScores, multiplicity: Doubles, part: Doubles, total: float) -> Doubles:
    query, gallery = scores.impostor_identities
    weight = np.take(multiplicity, query)
    weight *= np.take(multiplicity, gallery)
    weight *= part
    cumulative: Doubles = np.cumsum(weight, out=weight)
    cumulative /= total
    return cumulative


def _last_rejected(scores: PairScores, fmrs: Doubles, cumulative: Doubles) -> Floats:
    place = np.searchsorted(cumulative, fmrs * (1 + 1e-9), "right")  # the first impostor that is one too many
    return np.append(scores.impostor, np.float32(-np.inf))[place]


def _accepted(scores: PairScores, balanced: Floats, raw: Floats, multiplicity: Doubles) -> Rates:
    """Find the rates where the scores above the last rejected ones match."""
    person, people = multiplicity / np.maximum(scores.pairing.genuine_per_identity, 1), scores.genuine_identity
    descending = -scores.genuine

    def accepted(weight: Doubles, last: Floats) -> Doubles:
        drawn = np.take(weight, people, -1)
        sums = np.zeros((*drawn.shape[:-1], len(people) + 1))
        for row, into in zip(np.atleast_2d(drawn), np.atleast_2d(sums), strict=True):
            for start in range(0, len(people), BLOCK):
                _add_up(row[start : start + BLOCK], into[start : start + BLOCK + 1])
        rate: Doubles = np.take_along_axis(sums, np.searchsorted(descending, -last, "left"), -1) / sums[..., -1:]
        return rate

    return Rates(balanced, accepted(person, balanced), raw, accepted(multiplicity, raw))


def _add_up(weights: Doubles, sums: Doubles) -> None:
    """Continue running sums of N + 1 from their first by N weights, in numpy's order and in a third of its time."""
    weights[0] += sums[0]
    sums[1:] = cv2.integral(weights[None], sdepth=cv2.CV_64F)[1, 1:]


def _next(last: Floats) -> Doubles:
    above: Doubles = np.nextafter(last, np.float32(np.inf)).astype(np.float64)
    return above
