"""Compute intervals over people: identities are resampled, not pairs.

Pairs that share a person are not independent, and an interval that takes them to be is too narrow (Bolle, Ratha and
Pankanti 2004, "Error analysis of pattern recognition systems: the subsets bootstrap"; Poh, Martin and Bengio 2007).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from pkd.toolkit.certificates.certificate import Interval
from pkd.toolkit.evaluation.metrics.error_rates import (
    fmr_at,
    impostor_cumulative,
    matching,
    raw_impostor_cumulative,
    resampled_rates,
)
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Ints, Mask


@dataclass(frozen=True)
class Bootstrap:
    """Hold the statistics of R resamples of the identities and turn them into intervals."""

    tar: Doubles
    """R×F: raw TAR at each raw target FMR, the threshold found anew in every resample."""
    tar_balanced: Doubles
    """R×F: balanced TAR at each balanced target FMR."""
    fmr: Doubles
    """R×K: balanced FMR at each fixed threshold."""
    observed_fmr: Doubles
    """K: FMR of all people at each fixed threshold."""
    pair_variance: Doubles
    """K: part of the variance of the FMR that belongs to pairs of people and to neither of the two."""
    identity_pairs: int
    """Pairs of different identities that were compared."""
    people: tuple[float, float, float]
    """Effective number of identities behind raw TAR, balanced TAR and FMR: (Σ share)² / Σ share² (Kish 1965)."""

    def tar_interval(self, k: int) -> Interval:
        """Return the 95 % interval of the raw TAR at target ``k``."""
        return interval(self.tar[:, k], self.people[0])

    def tar_balanced_interval(self, k: int) -> Interval:
        """Return the 95 % interval of the balanced TAR at target ``k``."""
        return interval(self.tar_balanced[:, k], self.people[1])

    def fmr_interval(self, k: int) -> Interval:
        """Return the 95 % interval of the FMR at threshold ``k``, over all people like these."""
        return self._around(k, 1)

    def prediction(self, k: int) -> Interval:
        """Return the 95 % interval of what as many other people would measure as FMR at threshold ``k``.

        Two chances add up, alike in size: that of the people who gave the threshold, and that of the fresh ones.
        """
        return self._around(k, 2)

    def _around(self, k: int, times: int) -> Interval:
        """Compute a log-normal interval (a rate is a small count): FMR · exp(± t √times · relative standard deviation).

        Of the variance of an FMR one part comes from people (some match everyone more easily) and one, V, from pairs
        alone. Resampling people brings V in three times: once by the product of two draws, and, for every person's part
        is estimated from noisy pairs, once more by either draw (Owen 2007, The pigeonhole bootstrap, for two-way
        data). At small rates nearly all is V, and without taking 2 V off intervals would be 1.7 times too wide.
        """
        rate = float(self.observed_fmr[k])
        if rate == 0:  # of n independent pairs none, in 2.5 of 100 cases
            return 0.0, min(1.0, float(-np.log(0.025) / max(1, self.identity_pairs)))
        pairs = float(self.pair_variance[k])
        spread = np.sqrt(times * max(float(self.fmr[:, k].var()) - 2 * pairs, pairs)) / rate
        factor = float(np.exp(_quantile(self.people[2]) * spread))
        return rate / factor, min(1.0, rate * factor)


def bootstrap(
    scores: PairScores,
    fmrs: Doubles,
    thresholds: Doubles,
    *,
    resamples: int = 1000,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> Bootstrap:
    """Draw the identities with replacement ``resamples`` times and measure each resample.

    Impostors a ≠ b weigh multiplicity(a)·multiplicity(b), a genuine pair of a multiplicity(a): pairs between two
    copies of one drawn identity are left out, for they would be genuine pairs posing as impostors. A draw without any
    impostor or genuine pair (possible only in tiny sets) is drawn again.
    """
    pairing = scores.pairing
    random = np.random.default_rng(seed)
    even = np.full(pairing.identities, 1 / pairing.identities)
    last = matching(scores.impostor, thresholds)
    has_genuine = pairing.genuine_per_identity > 0
    wanted = has_genuine if has_genuine.any() else ~has_genuine  # a group may have impostor pairs alone
    tar, balanced = np.empty((resamples, len(fmrs))), np.empty((resamples, len(fmrs)))
    fmr = np.empty((resamples, len(thresholds)))
    for r in range(resamples):
        multiplicity = random.multinomial(pairing.identities, even).astype(np.float64)
        while not (pairing.identity_pair_weight(multiplicity) > 0 and multiplicity[wanted].any()):
            multiplicity = random.multinomial(pairing.identities, even).astype(np.float64)
        cumulative = impostor_cumulative(scores, multiplicity)
        if len(fmrs):
            drawn = resampled_rates(
                scores, fmrs, multiplicity, cumulative, raw_impostor_cumulative(scores, multiplicity)
            )
            tar[r], balanced[r] = drawn.tar, drawn.tar_balanced
        fmr[r] = np.minimum(np.append(0.0, cumulative), 1.0)[last]
        advance(1)
    return Bootstrap(
        tar,
        balanced,
        fmr,
        observed_fmr=fmr_at(scores, thresholds),
        pair_variance=_pair_variance(scores, last),
        identity_pairs=pairing.identity_pairs,
        people=(
            effective(pairing.genuine_per_identity),
            float(np.count_nonzero(has_genuine)),
            float(np.count_nonzero(pairing.per_query + pairing.per_gallery)),
        ),
    )


def interval(samples: Doubles, people: float = np.inf) -> Interval:
    """Compute the 95 % percentile interval of one statistic's resamples.

    ``people``: effective number of identities behind it. Few of them vary more than their resamples say: the
    percentiles move outwards, to where Student's t and n/(n − 1) put the normal ones (Hesterberg 2015, What Teachers
    Should Know About the Bootstrap, "expanded percentile interval").
    """
    outside = NormalDist().cdf(-_quantile(people))
    low, high = np.percentile(samples, (100 * outside, 100 * (1 - outside)))
    return float(low), float(high)


def _quantile(people: float) -> float:
    """Compute Student's 97.5 % quantile with n − 1 degrees of freedom (Cornish and Fisher), times √(n/(n − 1))."""
    z = NormalDist().inv_cdf(0.975)
    free = max(people, 3.0) - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return float(t * np.sqrt(1 + 1 / free))


def effective(share: Doubles) -> float:
    """Compute the number of equal shares that vary as much as these: (Σ share)² / Σ share² (Kish 1965)."""
    return float(share.sum() ** 2 / (share**2).sum()) if share.any() else 0.0


def _pair_variance(scores: PairScores, matching: Ints) -> Doubles:
    """Estimate the variance of the FMR if pairs of people matched independently.

    The first ``matching`` kept impostors match.

    Σ (x − FMR)² / P² over the P pairs of people, x the fraction of a pair's images that match. Where the kept are a
    sample, each stands for ``weight`` pairs of images, and its square for as many squares: unbiased.
    """
    pairing = scores.pairing
    a, b = scores.impostor_identities
    both = np.minimum(a, b) * pairing.identities + np.maximum(a, b)
    order = np.argsort(both, kind="stable")  # within a pair of people the scores still descend
    share = scores.share[order]
    before = np.cumsum(share) - share
    starts = np.flatnonzero(np.diff(both[order], prepend=-1))
    before -= np.repeat(before[starts], np.diff(starts, append=len(order)))
    squares = np.empty(len(order))
    squares[order] = share * (2 * before + share / scores.weight[order])
    matched = np.append(0.0, np.cumsum(squares))[matching]
    rate = np.append(0.0, np.cumsum(scores.share))[matching] / pairing.identity_pairs
    variance: Doubles = np.maximum(matched / pairing.identity_pairs - rate**2, 0) / pairing.identity_pairs
    return variance


def resampled_accuracies(right: Mask, same: Mask, first: Ints, second: Ints, *, resamples: int, seed: int) -> Doubles:
    """Compute the accuracy of a pair list in each resample of its identities, the list's mix of kinds held.

    ``right``, ``same``: bool, one per pair. ``first``, ``second``: int64 identities of its images.
    """
    random = np.random.default_rng(seed)
    count = int(max(first.max(), second.max())) + 1
    even = np.full(count, 1 / count)
    share = same.mean()
    found = np.empty(resamples)
    for r in range(resamples):
        multiplicity = np.zeros(len(right))
        while not multiplicity.any():  # a draw without any pair, possible only in tiny lists, is drawn again
            drawn = random.multinomial(count, even).astype(np.float64)
            multiplicity = np.where(first == second, drawn[first], drawn[first] * drawn[second])
        parts = [(part, f) for part, f in ((same, share), (~same, 1 - share)) if multiplicity[part].any()]
        found[r] = sum(f * (multiplicity[p] @ right[p]) / multiplicity[p].sum() for p, f in parts) / sum(
            f for _, f in parts
        )
    return found
