"""Error rates and their intervals, from arrays alone.

A pair matches when its score is at or above the threshold. FMR: the fraction of impostor pairs that match. TAR: the
fraction of genuine pairs that match, every pair weighing the same (raw) or every identity (balanced). Intervals come
from drawing identities, not pairs: pairs that share a person are not independent, and an interval that takes them to
be is too narrow (Bolle, Ratha and Pankanti 2004, "Error analysis of pattern recognition systems: the subsets
bootstrap"; Poh, Martin and Bengio 2007).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pkd.toolkit.errors import UnsupportedFmr
from pkd.toolkit.pairs import Doubles, Floats, Ints, Mask, Pairing, PairScores, bin_edges, bin_of

EXPECTED = 10
"""An FMR is resolved where at least this many pairs of different identities are expected above its threshold."""
LEVELS = (2.5, 97.5)
"""Percentiles of a 95 % interval."""


@dataclass(frozen=True)
class Rates:
    """What a set of target false match rates leads to. All float64, one entry per target."""

    last_rejected: Doubles
    """Highest impostor score that must not match; −inf where all may."""
    tar: Doubles
    tar_balanced: Doubles

    @property
    def threshold(self) -> Doubles:
        """Smallest float32 threshold whose false match rate is at most the target."""
        above: Doubles = np.nextafter(self.last_rejected.astype(np.float32), np.float32(np.inf)).astype(np.float64)
        return above


@dataclass(frozen=True)
class Bootstrap:
    """Statistics of R resamples of the identities."""

    tar: Doubles
    """R×F: TAR at each target FMR, the threshold found anew in every resample."""
    tar_balanced: Doubles
    """R×F, every identity weighing the same."""
    fmr: Doubles
    """R×K: FMR at each fixed threshold."""


def smallest_fmr(pairing: Pairing) -> float:
    """Smallest FMR that the set resolves: ``EXPECTED`` / pairs of different identities.

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
            f"Ask for {smallest:.2g} or more, or evaluate on more people."
        )


def rates(scores: PairScores, fmrs: Doubles, weight: Doubles | None = None) -> Rates:
    """TAR at each target FMR. ``weight``: how often each identity was drawn (all once if None).

    The threshold is the smallest with FMR ≤ target, so that of several impostors with one score all match or none.
    """
    weight = np.ones(scores.pairing.identities) if weight is None else weight
    return _rates(scores, fmrs, weight, _impostor_cumulative(scores, weight))


def fmr_at(scores: PairScores, thresholds: Doubles) -> Doubles:
    """FMR at each threshold: exact where all impostors are kept, else on the histogram's grid (1e-5)."""
    kept = _matching(scores.impostor, thresholds).astype(np.float64)
    below = thresholds < scores.cut
    if below.any():
        above = np.append(np.cumsum(scores.histogram[::-1])[::-1], 0)
        kept[below] = above[bin_of(thresholds[below].astype(np.float32))]
    return kept / scores.pairing.impostor_pairs


def equal_error_rate(scores: PairScores) -> float:
    """Smallest over all thresholds of the larger of FMR and FNMR (raw)."""
    edges = bin_edges()
    grid = np.concatenate([scores.impostor, scores.genuine]).astype(np.float64)
    grid = np.concatenate([grid[grid >= scores.cut], edges[edges < scores.cut], [np.inf]])
    fnmr = 1 - _matching(scores.genuine, grid) / len(scores.genuine)
    return float(np.maximum(fmr_at(scores, grid), fnmr).min())


def lowest_impostor(scores: PairScores) -> float:
    """A score that no impostor pair is below."""
    if np.isneginf(scores.cut):
        return float(scores.impostor[-1])
    return float(bin_edges()[np.flatnonzero(scores.histogram)[0]])


def bootstrap(
    scores: PairScores,
    fmrs: Doubles,
    thresholds: Doubles,
    *,
    resamples: int = 1000,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> Bootstrap:
    """Draw the identities with replacement ``resamples`` times and measure each draw.

    An impostor pair of identities a ≠ b weighs draws(a)·draws(b), a genuine pair of a draws(a): pairs between two
    copies of one drawn identity are left out, for they would be genuine pairs posing as impostors. A draw without any
    impostor or genuine pair (possible only in tiny sets) is drawn again.
    """
    pairing = scores.pairing
    random = np.random.default_rng(seed)
    even = np.full(pairing.identities, 1 / pairing.identities)
    last = _matching(scores.impostor, thresholds)
    has_genuine = pairing.genuine_per_identity > 0
    tar, balanced = np.empty((resamples, len(fmrs))), np.empty((resamples, len(fmrs)))
    fmr = np.empty((resamples, len(thresholds)))
    for r in range(resamples):
        weight = random.multinomial(pairing.identities, even).astype(np.float64)
        while not (pairing.impostor_weight(weight) > 0 and weight[has_genuine].any()):
            weight = random.multinomial(pairing.identities, even).astype(np.float64)
        cumulative = _impostor_cumulative(scores, weight)
        drawn = _rates(scores, fmrs, weight, cumulative)
        tar[r], balanced[r] = drawn.tar, drawn.tar_balanced
        fmr[r] = np.minimum(np.concatenate([[0.0], cumulative])[last], 1.0)
        advance(1)
    return Bootstrap(tar, balanced, fmr)


def interval(samples: Doubles) -> tuple[float, float]:
    """95 % percentile interval of one statistic's resamples."""
    low, high = np.percentile(samples, LEVELS)
    return float(low), float(high)


def best_threshold(scores: Floats, same: Mask) -> float:
    """Threshold with the most right decisions on these pairs, half-way to the next score; the middle one of equals."""
    order = np.argsort(-scores, kind="stable")
    down, genuine = scores[order].astype(np.float64), same[order]
    right = np.concatenate([[0], np.cumsum(np.where(genuine, 1, -1))])  # + the impostors, a constant
    allowed = np.concatenate([[True], down[1:] < down[:-1], [True]])  # equal scores fall on one side
    best = np.flatnonzero(allowed & (right == right[allowed].max()))
    cut = best[len(best) // 2]
    padded = np.concatenate([[down[0] + 1e-6], down, [down[-1] - 1e-6]])
    return float((padded[cut] + padded[cut + 1]) / 2)


def out_of_fold(scores: Floats, same: Mask, fold: Ints) -> tuple[Mask, Doubles]:
    """Decide each pair at the threshold that is best on the other folds (LFW View 2; Huang et al. 2007).

    Returns which decisions are right (bool, one per pair) and the threshold of each fold.
    """
    right = np.empty(len(scores), bool)
    thresholds = np.empty(int(fold.max()) + 1)
    for k in range(len(thresholds)):
        held = fold == k
        thresholds[k] = best_threshold(scores[~held], same[~held])
        right[held] = (scores[held] >= thresholds[k]) == same[held]
    return right, thresholds


def accuracy_interval(
    right: Mask, same: Mask, first: Ints, second: Ints, *, resamples: int, seed: int
) -> tuple[float, float]:
    """95 % identity-level bootstrap interval of the accuracy of a pair list, the list's mix of kinds held.

    ``right``, ``same``: bool, one per pair. ``first``, ``second``: int64 identities of its images.
    """
    random = np.random.default_rng(seed)
    count = int(max(first.max(), second.max())) + 1
    even = np.full(count, 1 / count)
    share = same.mean()
    found = np.empty(resamples)
    for r in range(resamples):
        drawn = random.multinomial(count, even).astype(np.float64)
        weight = np.where(same, drawn[first], drawn[first] * drawn[second])
        parts = [(part, f) for part, f in ((same, share), (~same, 1 - share)) if weight[part].any()]
        found[r] = sum(f * (weight[p] @ right[p]) / weight[p].sum() for p, f in parts) / sum(f for _, f in parts)
    return interval(found)


def _impostor_cumulative(scores: PairScores, weight: Doubles) -> Doubles:
    """FMR at each kept impostor score (descending), with the identities weighted."""
    mass = np.take(weight, scores.impostor_query)
    mass *= np.take(weight, scores.impostor_gallery)
    mass *= scores.mass
    cumulative: Doubles = np.cumsum(mass, out=mass)
    cumulative /= scores.pairing.impostor_weight(weight)
    return cumulative


def _rates(scores: PairScores, fmrs: Doubles, weight: Doubles, cumulative: Doubles) -> Rates:
    place = np.searchsorted(cumulative, fmrs * (1 + 1e-9), "right")  # the first impostor that is one too many
    last = np.append(scores.impostor, -np.inf)[place].astype(np.float64)
    accepted = np.searchsorted(-scores.genuine, -last.astype(np.float32), "left")  # strictly above it

    drawn = np.take(weight, scores.genuine_identity)
    raw = np.concatenate([[0.0], np.cumsum(drawn)])
    per_identity = scores.pairing.genuine_per_identity
    drawn /= np.take(per_identity, scores.genuine_identity)
    balanced = np.concatenate([[0.0], np.cumsum(drawn)])
    return Rates(last, raw[accepted] / raw[-1], balanced[accepted] / balanced[-1])


def _matching(descending: Floats, thresholds: Doubles) -> Ints:
    """How many scores are at or above each threshold."""
    return np.searchsorted(-descending.astype(np.float64), -thresholds, "right")
