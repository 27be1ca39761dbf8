"""Compare two encoders on the same people by what each person, and each pair of people, contributes to a rate.

Resamples count the noise of an impostor pair twice in a difference, so that small differences are missed. Here a
difference is a sum over people and pairs of people. Under the hypothesis that there is none each of these is as likely
to have the other sign, and signs drawn at random say how large a sum chance makes. How often that claims a difference
of equally good encoders, and how often it finds one that is there: docs/evidence.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from pkd.toolkit.evaluation.metrics.error_rates import matching, rates
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats, Ints, Mask
from pkd.toolkit.evaluation.metrics.resamples import paired_difference
from pkd.toolkit.evaluation.results.schema import PairedDifference

PARTS = ("own", "moved", "pairs", "parts", "slope", "shifted")
"""Names of the arrays of ``Contributions`` after the statistic's own, in ``ResampleValues.values``."""
NEARBY = 0.5
"""Natural logarithm of the factor around a target FMR within which at least the slope of the TAR is taken."""
FLIPS = 4999
"""Draws of random signs."""
MANY = 1024
"""Differences that get signs one by one, the largest; the sum of smaller ones is normal."""
OWN = 1.5
"""Factor of the variance that moving thresholds bring to the list that they were found on. It is best at its own
threshold, so that its accuracy elsewhere only falls, and varies less than where it is free to rise. The pairs whose
decision changes, as many independent ones, vary 1.3 to 1.7 times as much (simulated, 60 to 400 people)."""


@dataclass(frozen=True)
class Contributions:
    """Hold what people contribute to one rate of one encoder."""

    own: Doubles
    """Part of the rate that each person's own pairs make up; NaN for who takes no part."""
    moved: Doubles
    """Part of the FMR (or of the accuracy) that each person's pairs with others make up, less the mean of as many."""
    pairs: Doubles
    """Ascending codes of the pairs of different people that match: the smaller identity times N, plus the larger."""
    parts: Doubles
    """Part of the FMR (or of the accuracy) that each of these pairs makes up."""
    slope: Doubles
    """One number: how much the rate changes with ``moved``."""
    shifted: Doubles
    """Rate at the thresholds that resampled people would give, of a pair list; none where ``slope`` tells it."""

    def named(self, name: str) -> dict[str, Doubles]:
        """Name the arrays after a statistic, for ``ResampleValues.values``."""
        return {f"{name}/{part}": getattr(self, part) for part in PARTS}

    @classmethod
    def find(cls, values: Mapping[str, Doubles], name: str) -> Contributions | None:
        """Find the contributions to a statistic among ``ResampleValues.values``; None where none were kept."""
        kept = {part: values[key] for part in PARTS if (key := f"{name}/{part}") in values}
        return cls(**kept) if len(kept) == len(PARTS) else None


def tar_contributions(scores: PairScores, fmr: float, threshold: float, deviation: float) -> Contributions:
    """Find what people contribute to the balanced TAR at the threshold of a target FMR.

    A person's own genuine pairs count directly. Pairs of different people move the threshold: a rate that is larger by
    δ costs δ times the slope of the TAR over the FMR. ``deviation``: of the measured FMR over its value, the range
    around the target that the slope is taken from. Pairs of images that a sample stands for (pair_scores.py) are not
    among ``pairs``, so that their noise counts twice.
    """
    pairing = scores.pairing
    size, total = pairing.identities, float(pairing.identity_pairs)
    genuine, others = pairing.genuine_per_identity, pairing.identity_pairs_per_identity
    matched = scores.genuine_identity[: matching(scores.genuine, np.array([threshold]))[0]]
    own = np.bincount(matched, minlength=size) / np.maximum(genuine, 1) / np.count_nonzero(genuine)
    factor = float(np.exp(np.clip(deviation, NEARBY, 1.0)))
    ends = np.array([fmr / factor, min(fmr * factor, 1.0)])
    low, high = rates(scores, ends).tar_balanced
    here = slice(0, int(matching(scores.impostor, np.array([threshold]))[0]))
    a, b = (side[here] for side in scores.impostor_identities)
    part = scores.share[here] / total
    moved = np.bincount(a, part, size) + np.bincount(b, part, size) - others * (part.sum() / total)
    one_by_one = scores.weight[here] == 1
    codes, place = np.unique((np.minimum(a, b) * size + np.maximum(a, b))[one_by_one], return_inverse=True)
    return Contributions(
        own=np.where((genuine > 0) | (others > 0), own, np.nan),
        moved=moved,
        pairs=codes.astype(np.float64),
        parts=np.bincount(place, part[one_by_one], len(codes)).astype(np.float64),
        slope=np.array([-max(float(high - low), 0.0) / (ends[1] - ends[0])]),
        shifted=np.empty(0),
    )


def accuracy_contributions(right: Mask, first: Ints, second: Ints, shifted: Doubles) -> Contributions:
    """Find what people contribute to the accuracy of a pair list.

    ``right``: one per pair. ``first``, ``second``: int64 identities of its images. ``shifted``: what
    ``shifted_accuracies`` found.
    """
    part = right / len(right)
    across = first != second
    size = int(max(first.max(), second.max())) + 1
    there = np.bincount(first, minlength=size) + np.bincount(second, minlength=size) > 0
    a, b = first[across], second[across]
    codes, place = np.unique(np.minimum(a, b) * size + np.maximum(a, b), return_inverse=True)
    moved: Doubles = np.zeros(size)
    for side in (a, b):
        moved += np.bincount(side, part[across], size)
    return Contributions(
        own=np.where(there, np.bincount(first[~across], part[~across], size), np.nan),
        moved=moved,
        pairs=codes.astype(np.float64),
        parts=np.bincount(place, part[across], len(codes)).astype(np.float64),
        slope=np.ones(1),
        shifted=shifted,
    )


@dataclass(frozen=True)
class ScoredList:
    """Hold the scores of a pair list: whether both images of a pair are of one person, and whose they are."""

    scores: Floats
    same: Mask
    first: Ints
    second: Ints


def shifted_accuracies(listed: ScoredList, source: ScoredList, *, resamples: int, seed: int) -> Doubles:
    """Compute the accuracy of ``listed`` at the best threshold for each resample of the people of ``source``.

    A threshold that few people gave is one more reason why encoders that are equally good differ: with 120 people
    it makes up half of the variance of a difference (benchmarks/paired_tests.py). A pair of different people weighs
    m(a) + m(b) − 1, as in bootstrap.py. Where ``listed`` is ``source``, deviations are widened by ``OWN``.
    """
    random = np.random.default_rng(seed)
    order = np.argsort(-source.scores, kind="stable")
    down, sign = source.scores[order].astype(np.float64), np.where(source.same[order], 1.0, -1.0)
    first, second = source.first[order], source.second[order]
    padded = np.concatenate([[down[0] + 1e-6], down, [down[-1] - 1e-6]])
    allowed = np.concatenate([[True], down[1:] < down[:-1], [True]])  # equal scores fall on one side
    across = first != second
    count = int(max(first.max(), second.max())) + 1
    even = np.full(count, 1 / count)
    cuts = np.empty(resamples)
    for r in range(resamples):
        drawn = random.multinomial(count, even).astype(np.float64)
        weight = drawn[first] + np.where(across, drawn[second] - 1, 0.0)
        gain = np.where(allowed, np.concatenate([[0.0], np.cumsum(np.maximum(weight, 0.0) * sign)]), -np.inf)
        best = np.flatnonzero(gain >= gain.max() - 1e-9)
        place = best[len(best) // 2]
        cuts[r] = (padded[place] + padded[place + 1]) / 2
    genuine, impostor = (np.sort(listed.scores[kind]).astype(np.float64) for kind in (listed.same, ~listed.same))
    wrong = np.searchsorted(genuine, cuts, "left") + len(impostor) - np.searchsorted(impostor, cuts, "left")
    accuracy: Doubles = 1 - wrong / len(listed.same)
    if listed is source:
        accuracy = accuracy.mean() + np.sqrt(OWN) * (accuracy - accuracy.mean())
    return accuracy


def flipped(a: Contributions, b: Contributions) -> Doubles:
    """Draw how large a difference chance makes between two encoders that are equally good: FLIPS absolute values.

    Every person's own difference and every pair's gets a random sign. People vary together with all their pairs, and
    thresholds vary, so the sums are scaled to the variance of the difference over people: pairs that share a person
    vary together, and the noise of a pair counts once (Fafchamps and Gubert 2007, for dyads). Both encoders' thresholds
    move at one slope, the mean of the two: that of few people is noisy.
    """
    slope = float(a.slope[0] + b.slope[0]) / 2
    there = ~np.isnan(a.own)
    own, moved = (a.own - b.own)[there], (a.moved - b.moved)[there]
    codes = np.union1d(a.pairs, b.pairs)
    pairs = np.zeros(len(codes))
    pairs[np.searchsorted(codes, a.pairs)] += a.parts * slope
    pairs[np.searchsorted(codes, b.pairs)] -= b.parts * slope
    noise = float(pairs @ pairs)
    units = np.abs(np.concatenate([own, pairs]))
    units = np.sort(units[units > 0])[::-1]
    if not len(units):
        return np.zeros(FLIPS)
    # never less than if nothing varied together, or six people who agree would look like hundreds
    variance = max(float(((own + slope * moved) ** 2).sum()) - noise, float(units @ units))
    if len(a.shifted) and a.shifted.shape == b.shifted.shape:
        variance += float((a.shifted - b.shifted).var())
    sums = (_signs()[:, : len(units)] @ units[:MANY].astype(np.float32)).astype(np.float64)
    if len(rest := units[MANY:]):
        sums += np.random.default_rng(1).standard_normal(FLIPS) * np.sqrt(rest @ rest)
    drawn: Doubles = np.abs(sums) * np.sqrt(variance / (units @ units))
    return drawn


@cache
def _signs() -> Floats:
    """Draw the signs once for every comparison: 20 MB."""
    drawn = np.random.default_rng(0).integers(0, 2, (FLIPS, MANY), dtype=np.int8)
    return np.asarray(2 * drawn.astype(np.float32) - 1, np.float32, order="F")


def compared(a: Contributions, b: Contributions, *, observed: float, level: float = 0.95) -> PairedDifference:
    """Compare a rate of A and of B, A − B over all people being ``observed``.

    The p-value is the share of random signs that make the difference as large as it is, one added to count and number
    (Phipson and Smyth 2010); so that five people who differ are never enough for 0.05. The interval holds the
    differences that would have a p-value above 1 − ``level``.
    """
    chance = flipped(a, b)
    reach = float(np.quantile(chance, level))
    count = int(np.count_nonzero(chance >= abs(observed) * (1 - 1e-6)))
    return PairedDifference(
        difference=observed,
        ci95=(max(observed - reach, -1.0), min(observed + reach, 1.0)),
        p=(count + 1) / (len(chance) + 1),
    )


def paired(
    a: Mapping[str, Doubles],
    b: Mapping[str, Doubles],
    names: tuple[str, str],
    *,
    observed: float,
    level: float = 0.95,
) -> PairedDifference:
    """Compare a statistic of two evaluations, or of one, by what ``ResampleValues.values`` holds under ``names``.

    By contributions where both have them, else by resamples, for statistics that know no pairs of people (rank-k,
    FNIR). Raises InputError where the numbers of resamples differ.
    """
    found = [Contributions.find(values, name) for values, name in zip((a, b), names, strict=True)]
    if found[0] and found[1] and found[0].own.shape == found[1].own.shape:
        return compared(found[0], found[1], observed=observed, level=level)
    return paired_difference(a[names[0]], b[names[1]], observed=observed, level=level)
