"""Compute intervals over people: identities are resampled, not pairs.

Pairs that share a person are not independent, and an interval that takes them to be is too narrow (Bolle, Ratha and
Pankanti 2004, "Error analysis of pattern recognition systems: the subsets bootstrap"; Poh, Martin and Bengio 2007).
What was chosen, and how often it holds the truth where people differ: docs/evidence.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from pkd.toolkit.certificates.certificate import Assurance, Interval
from pkd.toolkit.evaluation.metrics.error_rates import (
    LinearSums,
    accepted_rates,
    first_beyond,
    fmr_at,
    impostor_cumulative,
    matching,
    raw_impostor_cumulative,
)
from pkd.toolkit.evaluation.metrics.intervals import (
    effective,
    proportion_interval,
    proportion_intervals,
    small_rate_interval,
    student_quantile,
)
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Ints, Mask

AT_ONCE = 1 << 18
"""Pairs times resamples that are measured at once: 2 MB an array, in the cache, however many resamples there are."""


@dataclass(frozen=True)
class FmrVariance:
    """Hold what pairs of people say of an FMR at K thresholds, one entry each."""

    total: Doubles
    """Variance of the FMR over people: pairs that share a person vary together, the noise of a pair counts once."""
    resampled: Doubles
    """Variance that resampling people gives to first order, which counts the noise of a pair twice."""
    people: Doubles
    """Effective people: degrees of freedom that the contributions of single people leave, plus 1."""
    largest: Doubles
    """Part of the FMR that the pairs of the most influential person make up: one more such person would add it."""


@dataclass(frozen=True)
class Bootstrap:
    """Hold the statistics of R resamples of the identities and turn them into intervals."""

    tar: Doubles
    """R×F: raw TAR at each raw target FMR, the threshold found anew in every resample."""
    tar_balanced: Doubles
    """R×F: balanced TAR at each balanced target FMR."""
    fmr: Doubles
    """R×K: balanced FMR at each fixed threshold."""
    observed_tar: Doubles
    """F: raw TAR of all people."""
    observed_tar_balanced: Doubles
    """F: balanced TAR of all people."""
    observed_fmr: Doubles
    """K: FMR of all people at each fixed threshold."""
    variance: FmrVariance
    """K: variance of the balanced FMR."""
    identity_pairs: int
    """Pairs of different identities that were compared."""
    people: tuple[float, float]
    """Effective number of identities behind raw and balanced TAR: (Σ share)² / Σ share² (Kish 1965)."""

    def tar_interval(self, k: int) -> Interval:
        """Return the 95 % interval of the raw TAR at target ``k``."""
        return proportion_interval(float(self.observed_tar[k]), float(self.tar[:, k].var()), self.people[0])

    def tar_balanced_interval(self, k: int) -> Interval:
        """Return the 95 % interval of the balanced TAR at target ``k``."""
        return proportion_interval(
            float(self.observed_tar_balanced[k]), float(self.tar_balanced[:, k].var()), self.people[1]
        )

    def tar_balanced_intervals(self) -> tuple[Doubles, Doubles]:
        """Return the ends of the intervals of the balanced TAR at all targets."""
        return proportion_intervals(self.observed_tar_balanced, self.tar_balanced.var(axis=0), self.people[1])

    def fmr_interval(self, k: int) -> Interval:
        """Return the 95 % interval of the FMR at threshold ``k``, over all people like these."""
        return self._around(k, 1)

    def prediction(self, k: int) -> Interval:
        """Return the 95 % interval of what as many other people would measure as FMR at threshold ``k``.

        It holds where the threshold was found for that rate. Two chances add up, of one size: that of the people who
        gave the threshold, and that of the fresh ones.
        """
        return self._around(k, 2)

    def assured(self, k: int, assurance: Assurance) -> float:
        """Compute the true FMR that a threshold like ``k`` assures: as a point or as a bound (see ``Assurance``).

        A threshold that was found for a measured rate has a larger true one on average, for the rate that is measured
        too small by some factor errs by as much more than one that is measured too large: E[1/x] ≈ 1 + variance of x.
        """
        rate, variance = float(self.observed_fmr[k]), float(self.variance.total[k])
        if rate == 0:
            return min(1.0, float(-np.log(0.05) / max(1, self.identity_pairs)))
        if assurance == "point":
            return min(1.0, rate + variance / rate)
        return self._around(k, 1, 0.95)[1]

    def _around(self, k: int, samples: int, probability: float = 0.975) -> Interval:
        """Compute an interval of the FMR at threshold ``k``.

        Of the variance of an FMR one part comes from people (some match everyone more easily) and one, V, from pairs
        alone. Resampling people brings V in three times: once by the product of two multiplicities, and, for every
        person's part is estimated from noisy pairs, once more by either of them (Owen 2007, The pigeonhole bootstrap).
        Here it counts once. The t is that of the effective people.
        """
        rate, v = float(self.observed_fmr[k]), self.variance
        if rate == 0:  # of n independent pairs none, in 2.5 of 100 cases
            return 0.0, min(1.0, float(-np.log(1 - probability) / max(1, self.identity_pairs)))
        return small_rate_interval(
            rate, float(v.total[k]), float(v.people[k]), float(v.largest[k]), samples=samples, probability=probability
        )


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

    A genuine pair of a weighs multiplicity(a), impostors a ≠ b weigh multiplicity(a) + multiplicity(b) − 1, which is
    multiplicity(a)·multiplicity(b) to first order: the rest is noise of pairs, which would count a third time (Owen
    2007, The pigeonhole bootstrap). A resample without any impostor or genuine pair (possible only in tiny sets) is
    drawn again. Thresholds of a resample move by what people and, once, pairs make the FMR vary, not by the twice that
    the resample still has.
    """
    pairing = scores.pairing
    random = np.random.default_rng(seed)
    even = np.full(pairing.identities, 1 / pairing.identities)

    def draw() -> Doubles:
        while True:
            drawn = random.multinomial(pairing.identities, even).astype(np.float64)
            if pairing.identity_pair_weight(drawn) > 0 and drawn[wanted].any():
                return drawn

    last = matching(scores.impostor, thresholds)
    has_genuine = pairing.genuine_per_identity > 0
    wanted = has_genuine if has_genuine.any() else ~has_genuine  # a group may have impostor pairs alone
    everyone = np.ones(pairing.identities)
    full, raw_full = impostor_cumulative(scores, everyone), raw_impostor_cumulative(scores, everyone)
    shrink, raw_shrink = (
        _shrinkage(scores, cumulative, fmrs, raw) for cumulative, raw in ((full, False), (raw_full, True))
    )
    observed = accepted_rates(
        scores, first_beyond(full, full, shrink, fmrs), first_beyond(raw_full, raw_full, raw_shrink, fmrs), everyone
    )
    tar, balanced = np.empty((resamples, len(fmrs))), np.empty((resamples, len(fmrs)))
    fmr = np.empty((resamples, len(thresholds)))
    at_once = max(1, AT_ONCE // (len(scores.impostor) + len(scores.genuine)))
    linear = LinearSums(scores, min(at_once, resamples))
    for start in range(0, resamples, at_once):
        rows = slice(start, min(start + at_once, resamples))
        multiplicity = np.stack([draw() for _ in range(rows.start, rows.stop)])
        (sums, total), (raw_sums, raw_total) = linear.sum(multiplicity)
        if len(fmrs):
            places = first_beyond(sums[:, 1:], full, shrink, fmrs, total)
            raw_places = first_beyond(raw_sums[:, 1:], raw_full, raw_shrink, fmrs, raw_total)
            found = accepted_rates(scores, places, raw_places, multiplicity)
            tar[rows], balanced[rows] = found.tar, found.tar_balanced
        fmr[rows] = np.clip(np.take(sums, last, -1) / total, 0.0, 1.0)
        advance(len(multiplicity))
    return Bootstrap(
        tar,
        balanced,
        fmr,
        observed_tar=observed.tar,
        observed_tar_balanced=observed.tar_balanced,
        observed_fmr=fmr_at(scores, thresholds),
        variance=fmr_variance(scores, last),
        identity_pairs=pairing.identity_pairs,
        people=(effective(pairing.genuine_per_identity), float(np.count_nonzero(has_genuine))),
    )


def interval(samples: Doubles, people: float = np.inf) -> Interval:
    """Compute the 95 % percentile interval of one statistic's resamples.

    ``people``: effective number of identities behind it. Few of them vary more than their resamples say: the
    percentiles move outwards, to where Student's t and n/(n − 1) put the normal ones (Hesterberg 2015, What Teachers
    Should Know About the Bootstrap, "expanded percentile interval").
    """
    outside = NormalDist().cdf(-student_quantile(people))
    low, high = np.percentile(samples, (100 * outside, 100 * (1 - outside)))
    return float(low), float(high)


def fmr_variance(scores: PairScores, last: Ints, *, raw: bool = False) -> FmrVariance:
    """Estimate the variance of the FMR over people where the first ``last`` (K) kept impostors match.

    With r the part of a pair of people that matches, less the FMR, and R of a person the sum over that person's pairs:
    (Σ R² − Σ r²) / P², for pairs that share a person vary together, and a pair's own r² is in the R of both its people
    (Fafchamps and Gubert 2007, for dyads). It is never less than Σ r² / P². Where the kept impostors are a sample, each
    stands for ``weight`` pairs of images, and its square for as many squares: unbiased. ``raw``: every pair of images
    weighs the same.
    """
    pairing = scores.pairing
    a, b = scores.impostor_identities
    part = scores.weight if raw else scores.share
    squares = np.append(0.0, np.cumsum(_squares_of_pairs(scores, part)))[last]
    matched = np.append(0.0, np.cumsum(part))[last]
    pairs = pairing.impostor_pairs_per_identity if raw else pairing.identity_pairs_per_identity
    total = pairs.sum() / 2
    rate = matched / total
    noise = np.maximum(squares / total - rate**2, 0) / total
    person, order = np.zeros(pairing.identities), np.argsort(last, kind="stable")
    variance, people, largest = np.empty(len(last)), np.empty(len(last)), np.empty(len(last))
    done = 0
    for k in order.tolist():
        here = slice(done, int(last[k]))
        for side in (a, b):
            person += np.bincount(side[here], part[here], minlength=pairing.identities)
        done = int(last[k])
        square = (person - pairs * rate[k]) ** 2
        variance[k] = square.sum() / total**2
        spare = (square**2).sum() - square.sum() ** 2 / max(1, len(square))
        largest[k] = person.max(initial=0.0) / total
        people[k] = 1 + (2 * square.sum() ** 2 / spare if spare > 0 else np.inf)
    compared = float(np.count_nonzero(pairs))
    return FmrVariance(np.maximum(variance - noise, noise), variance, np.minimum(people, compared), largest)


def _squares_of_pairs(scores: PairScores, part: Doubles) -> Doubles:
    """Compute by how much each kept impostor, in falling order, raises the sum of the squares of pairs of people."""
    a, b = scores.impostor_identities
    both = np.minimum(a, b) * scores.pairing.identities + np.maximum(a, b)
    order = np.argsort(both, kind="stable")  # within a pair of people the scores still descend
    own = part[order]
    before = np.cumsum(own) - own
    starts = np.flatnonzero(np.diff(both[order], prepend=-1))
    before -= np.repeat(before[starts], np.diff(starts, append=len(order)))
    squares = np.empty(len(order))
    squares[order] = own * (2 * before + own / scores.weight[order])
    return squares


def _shrinkage(scores: PairScores, cumulative: Doubles, fmrs: Doubles, raw: bool) -> Doubles:
    """Compute by which factor a resample's FMR deviates too much, at the threshold of each target."""
    if not len(fmrs):
        return np.empty(0)
    variance = fmr_variance(scores, np.searchsorted(cumulative, fmrs, "right"), raw=raw)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.sqrt(variance.total / variance.resampled), nan=1.0)


def resampled_accuracies(right: Mask, same: Mask, first: Ints, second: Ints, *, resamples: int, seed: int) -> Doubles:
    """Compute the accuracy of a pair list in each resample of its identities, the list's mix of kinds held.

    ``right``, ``same``: bool, one per pair. ``first``, ``second``: int64 identities of its images. Deviations are
    scaled to the variance of ``accuracy_variance``: a resample counts the noise of an impostor pair three times.
    """
    random = np.random.default_rng(seed)
    count = int(max(first.max(), second.max())) + 1
    even = np.full(count, 1 / count)
    share = same.mean()
    found = np.empty(resamples)
    for r in range(resamples):
        weight = np.zeros(len(right))
        while not weight.any():  # a resample without any pair, possible only in tiny lists, is drawn again
            drawn = random.multinomial(count, even).astype(np.float64)
            weight = np.where(first == second, drawn[first], drawn[first] * drawn[second])
        parts = [(part, f) for part, f in ((same, share), (~same, 1 - share)) if weight[part].any()]
        found[r] = sum(f * (weight[p] @ right[p]) / weight[p].sum() for p, f in parts) / sum(f for _, f in parts)
    if (spread := found.std()) > 0:
        found = right.mean() + (found - found.mean()) * np.sqrt(accuracy_variance(right, same, first, second)) / spread
    return np.clip(found, 0.0, 1.0)


def accuracy_variance(right: Mask, same: Mask, first: Ints, second: Ints) -> float:
    """Estimate the variance of a pair list's accuracy over people; pairs that share a person vary together.

    As ``fmr_variance``, on decisions less the mean of their kind.
    """
    residual = right.astype(np.float64)
    for kind in (same, ~same):
        if kind.any():
            residual[kind] -= residual[kind].mean()
    across = first != second
    size = int(max(first.max(), second.max())) + 1
    people = np.bincount(first, residual, size) + np.bincount(second[across], residual[across], size)
    noise = float((residual**2).sum())
    return max(float((people**2).sum()) - float((residual[across] ** 2).sum()), noise) / len(right) ** 2


def accuracy_interval(right: Mask, same: Mask, first: Ints, second: Ints) -> Interval:
    """Compute the 95 % interval of a pair list's accuracy over people."""
    across = first != second
    size = int(max(first.max(), second.max())) + 1
    pairs = np.bincount(first, minlength=size) + np.bincount(second[across], minlength=size)
    people = effective(pairs.astype(np.float64))
    return proportion_interval(float(right.mean()), accuracy_variance(right, same, first, second), people)
