"""Error rates, from arrays alone.

A pair matches when its score is at or above the threshold. FMR: the fraction of impostor pairs that match. TAR: the
fraction of genuine pairs that match, every pair weighing the same (raw) or every identity (balanced).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkd.toolkit.errors import UnsupportedFmr
from pkd.toolkit.evaluation.pairs import Doubles, Floats, Ints, Pairing
from pkd.toolkit.evaluation.scores import PairScores, bin_edges, bin_of

EXPECTED = 10
"""An FMR is resolved where at least this many pairs of different identities are expected above its threshold."""


@dataclass(frozen=True)
class Rates:
    """What a set of target false match rates leads to: one entry per target."""

    last_rejected: Floats
    """Highest score that must not match; −inf where all may."""
    tar: Doubles
    tar_balanced: Doubles

    @property
    def threshold(self) -> Doubles:
        """Smallest float32 threshold whose false match rate is at most the target."""
        above: Doubles = np.nextafter(self.last_rejected, np.float32(np.inf)).astype(np.float64)
        return above


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


def rates(scores: PairScores, fmrs: Doubles) -> Rates:
    """TAR at each target FMR.

    The threshold is the smallest with FMR ≤ target, so that of several impostors with one score all match or none:
    exact where all impostors are kept, else the next edge of the histogram above it.
    """
    allowed = np.floor(fmrs * (1 + 1e-9) * scores.pairing.impostor_pairs).astype(np.int64)
    exact = np.searchsorted(-scores.impostor, np.float32(-scores.cut), "right")
    last = np.append(scores.impostor, np.float32(-np.inf))[np.minimum(allowed, exact)]
    if exact < len(scores.impostor):
        below = allowed >= exact
        above = np.append(np.cumsum(scores.histogram[::-1])[::-1], 0)
        edge = len(above) - 1 - np.searchsorted(above[::-1], allowed[below], "right") + 1
        last[below] = np.nextafter(np.append(bin_edges(), 1.0)[edge].astype(np.float32), np.float32(-np.inf))
    return rates_from(scores, last, np.ones(scores.pairing.identities))


def drawn_rates(scores: PairScores, fmrs: Doubles, weight: Doubles, cumulative: Doubles) -> Rates:
    """As ``rates`` with every identity as often as it was drawn, from the kept impostors.

    ``cumulative``: of ``impostor_cumulative`` with the same ``weight``.
    """
    place = np.searchsorted(cumulative, fmrs * (1 + 1e-9), "right")  # the first impostor that is one too many
    return rates_from(scores, np.append(scores.impostor, np.float32(-np.inf))[place], weight)


def fmr_at(scores: PairScores, thresholds: Doubles) -> Doubles:
    """FMR at each threshold: exact where all impostors are kept, else on the histogram's grid (1.5e-5)."""
    kept = matching(scores.impostor, thresholds).astype(np.float64)
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
    fnmr = 1 - matching(scores.genuine, grid) / len(scores.genuine)
    return float(np.maximum(fmr_at(scores, grid), fnmr).min())


def lowest_impostor(scores: PairScores) -> float:
    """A score that no impostor pair is below."""
    if np.isneginf(scores.cut):
        return float(scores.impostor[-1])
    return float(bin_edges()[np.flatnonzero(scores.histogram)[0]])


def impostor_cumulative(scores: PairScores, weight: Doubles) -> Doubles:
    """FMR at each kept impostor score (descending), with the identities weighted."""
    query, gallery = scores.impostor_identities
    mass = np.take(weight, query)
    mass *= np.take(weight, gallery)
    mass *= scores.mass
    cumulative: Doubles = np.cumsum(mass, out=mass)
    cumulative /= scores.pairing.impostor_weight(weight)
    return cumulative


def rates_from(scores: PairScores, last: Floats, weight: Doubles) -> Rates:
    """Rates where the scores above ``last`` match. ``weight``: how often each identity was drawn."""
    accepted = np.searchsorted(-scores.genuine, -last, "left")
    drawn = np.take(weight, scores.genuine_identity)
    raw = np.concatenate([[0.0], np.cumsum(drawn)])
    drawn /= np.take(scores.pairing.genuine_per_identity, scores.genuine_identity)
    balanced = np.concatenate([[0.0], np.cumsum(drawn)])
    return Rates(last, raw[accepted] / raw[-1], balanced[accepted] / balanced[-1])


def matching(descending: Floats, thresholds: Doubles) -> Ints:
    """How many scores are at or above each threshold."""
    return np.searchsorted(-descending.astype(np.float64), -thresholds, "right")
