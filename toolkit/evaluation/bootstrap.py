"""Intervals over people: the identities are drawn again, not the pairs.

Pairs that share a person are not independent, and an interval that takes them to be is too narrow (Bolle, Ratha and
Pankanti 2004, "Error analysis of pattern recognition systems: the subsets bootstrap"; Poh, Martin and Bengio 2007).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pkd.toolkit.evaluation.pairs import Doubles, Ints, Mask
from pkd.toolkit.evaluation.rates import drawn_rates, impostor_cumulative, matching
from pkd.toolkit.evaluation.scores import PairScores

LEVELS = (2.5, 97.5)
"""Percentiles of a 95 % interval."""
METHOD = "percentile bootstrap over identities; pairs between copies of one identity left out"
"""How every interval is made, in words: what a certificate states."""


@dataclass(frozen=True)
class Bootstrap:
    """Statistics of R resamples of the identities."""

    tar: Doubles
    """R×F: TAR at each target FMR, the threshold found anew in every resample."""
    tar_balanced: Doubles
    """R×F, every identity weighing the same."""
    fmr: Doubles
    """R×K: FMR at each fixed threshold."""
    fresh_fmr: Doubles
    """(R−1)×F: FMR in one resample at the threshold that another resample found for each target."""


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
    last = matching(scores.impostor, thresholds)
    has_genuine = pairing.genuine_per_identity > 0
    tar, balanced = np.empty((resamples, len(fmrs))), np.empty((resamples, len(fmrs)))
    fmr = np.empty((resamples, len(thresholds)))
    fresh, before = np.empty((resamples - 1, len(fmrs))), np.zeros(len(fmrs), np.int64)
    for r in range(resamples):
        weight = random.multinomial(pairing.identities, even).astype(np.float64)
        while not (pairing.impostor_weight(weight) > 0 and weight[has_genuine].any()):
            weight = random.multinomial(pairing.identities, even).astype(np.float64)
        cumulative = impostor_cumulative(scores, weight)
        drawn = drawn_rates(scores, fmrs, weight, cumulative)
        tar[r], balanced[r] = drawn.tar, drawn.tar_balanced
        rate = np.minimum(np.concatenate([[0.0], cumulative]), 1.0)
        fmr[r] = rate[last]
        if r:
            fresh[r - 1] = rate[before]
        before = np.searchsorted(-scores.impostor, -drawn.last_rejected, "left")
        advance(1)
    return Bootstrap(tar, balanced, fmr, fresh)


def interval(samples: Doubles) -> tuple[float, float]:
    """95 % percentile interval of one statistic's resamples."""
    low, high = np.percentile(samples, LEVELS)
    return float(low), float(high)


def drawn_accuracies(right: Mask, same: Mask, first: Ints, second: Ints, *, resamples: int, seed: int) -> Doubles:
    """Accuracy of a pair list in each of the resamples of its identities, the list's mix of kinds held.

    ``right``, ``same``: bool, one per pair. ``first``, ``second``: int64 identities of its images.
    """
    random = np.random.default_rng(seed)
    count = int(max(first.max(), second.max())) + 1
    even = np.full(count, 1 / count)
    share = same.mean()
    found = np.empty(resamples)
    for r in range(resamples):
        weight = np.zeros(len(right))
        while not weight.any():  # a draw without any pair, possible only in tiny lists, is drawn again
            drawn = random.multinomial(count, even).astype(np.float64)
            weight = np.where(first == second, drawn[first], drawn[first] * drawn[second])
        parts = [(part, f) for part, f in ((same, share), (~same, 1 - share)) if weight[part].any()]
        found[r] = sum(f * (weight[p] @ right[p]) / weight[p].sum() for p, f in parts) / sum(f for _, f in parts)
    return found
