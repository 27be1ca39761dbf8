"""Search galleries and compute identification rates: closed-set rank-k and open-set FNIR at FPIR, with intervals.

A search compares one probe with everyone enrolled, streamed in blocks, never as an N×M array. A person's score is the
highest of that person's entries. A search is mated where the probe's person is enrolled. ISO/IEC 19795-1 and NIST's
FRVT 1:N define the rates. Rank-k: the fraction of mated searches whose mate is among the k
best. FPIR(T): the fraction of searches without a mate in which someone scores at or above T. FNIR(T, R): the fraction
of mated searches whose mate is not among the R best, or is below T. Every probe identity weighs the same (balanced),
or every search (raw). Intervals draw the probe identities again; the gallery is held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.evaluation.metrics.error_rates import EXPECTED
from pkd.toolkit.evaluation.metrics.intervals import effective, proportion_interval, proportion_intervals
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats, Ints, Mask, Pairing
from pkd.toolkit.evaluation.results.schema import Identification, OpenSetCurve, OpenSetPoint, RankPoint

BLOCK = 1 << 22
"""Scores of a block of searches: 16 MB."""


@dataclass(frozen=True)
class Plan:
    """Say which entries are enrolled and which searched: int64 indices into the gallery side and the probe side."""

    enrolled: Ints
    searched: Ints
    left_out: int
    """Probes that are not searched, for they are enrolled themselves (the same bytes)."""


@dataclass(frozen=True)
class Searches:
    """Hold Q searches. All arrays have one entry per search."""

    identity: Ints
    """Person of the probe."""
    mated: Mask
    best: Floats
    """Highest score of anyone enrolled."""
    mate: Floats
    """Score of the probe's own person; −inf where not enrolled."""
    rank: Ints
    """People enrolled who score at or above the mate, the mate included, so that a tie never counts in favour; 0
    where not enrolled."""


def one_gallery(pairing: Pairing) -> list[Plan]:
    """Enrol everyone on the gallery side with all images and search every probe."""
    return [_plan(pairing, np.arange(len(pairing.gallery)), np.arange(len(pairing.query)))]


def two_galleries(pairing: Pairing, seed: int) -> list[Plan]:
    """Split the people of one set into two halves at random; enrol each in turn, with one image a person at random.

    All other images are searched: those of the half itself have a mate, those of the other half have none. So everyone
    with two images gives mated searches, and everyone gives searches without a mate (as with the two galleries of
    IJB-C, Maze et al. 2018).
    """
    random = np.random.default_rng(seed)
    labels = pairing.query
    by_content = np.lexsort((pairing.query_file, labels))  # another order of the same images is the same split
    shuffled = by_content[random.permutation(len(labels))]
    people, first = np.unique(labels[shuffled], return_index=True)
    chosen = shuffled[first]
    half = np.zeros(len(people), bool)
    half[random.permutation(len(people))[: len(people) // 2]] = True
    plans = []
    for enrolled in (chosen[half], chosen[~half]):
        plans.append(_plan(pairing, enrolled, np.setdiff1d(np.arange(len(labels)), enrolled)))
    return plans


def search(
    probe: Floats,
    probe_identity: Ints,
    gallery: Floats,
    gallery_identity: Ints,
    *,
    block: int = BLOCK,
    advance: Callable[[int], None] = lambda done: None,
) -> Searches:
    """Search everyone. ``probe``, ``gallery``: float32 Q×D and M×D unit rows with int64 identities, one list of names.

    ``block``: scores that are computed at a time. ``advance`` is told how many probes are done.
    """
    order = np.argsort(gallery_identity, kind="stable")
    people, starts = np.unique(gallery_identity[order], return_index=True)
    entries = gallery[order].T
    place = np.minimum(np.searchsorted(people, probe_identity), len(people) - 1)
    mated = people[place] == probe_identity
    best, mate = np.empty(len(probe), np.float32), np.full(len(probe), -np.inf, np.float32)
    rank = np.zeros(len(probe), np.int64)
    step = max(1, block // len(order))
    for start in range(0, len(probe), step):
        here = slice(start, start + step)
        scores = probe[here] @ entries
        if len(people) < len(order):
            scores = np.maximum.reduceat(scores, starts, axis=1)
        best[here] = scores.max(axis=1)
        own = np.flatnonzero(mated[here])
        found = scores[own, place[here][own]]
        mate[start + own] = found
        rank[start + own] = np.count_nonzero(scores[own] >= found[:, None], axis=1)
        advance(len(scores))
    return Searches(probe_identity, mated, best, mate, rank)


def joined(parts: Sequence[Searches]) -> Searches:
    """Join the searches of several galleries, one after the other."""
    return Searches(
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("identity", "mated", "best", "mate", "rank"))
    )


def _plan(pairing: Pairing, enrolled: Ints, searched: Ints) -> Plan:
    itself = np.isin(pairing.query_file[searched], pairing.gallery_file[enrolled])
    return Plan(enrolled, searched[~itself], int(itself.sum()))


RANKS = (1, 5, 10)
FPIRS = (1e-1, 1e-2, 1e-3)
"""False positive identification rates that are reported where the searches without a mate resolve them."""
WITHIN = 1
"""R of FNIR(T, R): the best candidate must be the mate."""


@dataclass(frozen=True)
class ResampledSearches:
    """Hold the rates of one resample of the identities; balanced first, raw second, along the first axis."""

    ranks: Doubles
    """2×K: fraction of mated searches with the mate within each rank."""
    last: Floats
    """2×F: highest score that is no candidate, for each FPIR; −inf where all may be."""
    fnir: Doubles
    """2×F"""

    @property
    def threshold(self) -> Doubles:
        """Return 2×F: the smallest float32 threshold with an FPIR no larger than the target."""
        above: Doubles = np.nextafter(self.last, np.float32(np.inf)).astype(np.float64)
        return above


class SearchRates:
    """Keep searches in the order of their scores, so that every resample is a few sums.

    ``identities``: number of names that ``searches.identity`` counts through. ``within``: R.
    """

    def __init__(self, searches: Searches, identities: int, *, within: int = WITHIN) -> None:
        mated, other = searches.mated, ~searches.mated
        self.mated_per_identity = np.bincount(searches.identity[mated], minlength=identities)
        self.other_per_identity = np.bincount(searches.identity[other], minlength=identities)
        reached = np.where(searches.rank[mated] <= within, searches.mate[mated], np.float32(-np.inf))
        self._reached, self._reached_by, order = _descending(reached, searches.identity[mated])
        self._rank = searches.rank[mated][order]
        self._best, self._best_of, _ = _descending(searches.best[other], searches.identity[other])

    def draw(self, multiplicity: Doubles, ranks: Sequence[int], fpirs: Doubles) -> ResampledSearches:
        """Measure one resample. ``multiplicity``: float64, times each identity was drawn, a mated one among them."""
        share = multiplicity / np.maximum(self.mated_per_identity, 1)
        other = multiplicity / np.maximum(self.other_per_identity, 1)
        found, last, fnir = [], [], []
        for mated_weight, other_weight in ((share, other), (multiplicity, multiplicity)):
            weight = np.take(mated_weight, self._reached_by)
            total = weight.sum()
            found.append([weight[self._rank <= rank].sum() / total for rank in ranks])
            cumulative = np.cumsum(np.take(other_weight, self._best_of))
            if len(cumulative):
                cumulative /= cumulative[-1]
            # the first search without a mate that is one too many
            last.append(np.append(self._best, -np.inf)[np.searchsorted(cumulative, fpirs * (1 + 1e-9), "right")])
            accepted = np.searchsorted(-self._reached, -last[-1], "left")
            fnir.append(1 - np.concatenate([[0.0], np.cumsum(weight)])[accepted] / total)
        return ResampledSearches(np.array(found), np.array(last, np.float32), np.maximum(np.array(fnir), 0.0))


def measure_searches(
    searches: Searches,
    name: str,
    query: EncoderInfo,
    gallery: EncoderInfo,
    *,
    galleries: str,
    enrolled: Sequence[int],
    identities: int,
    resamples: int,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[Identification, dict[str, Doubles]]:
    """Measure rank-k for k below the people enrolled, and FNIR at those of ``FPIRS`` that are resolved.

    ``enrolled``: people in each gallery. At least one search must be mated. Also the values of every resample.
    """
    rates = SearchRates(searches, identities)
    ranks = [rank for rank in RANKS if rank < min(enrolled)]
    others = int((rates.other_per_identity > 0).sum())
    smallest = EXPECTED / others if others else None
    grid = _grid(smallest) if smallest and smallest <= 1 else np.empty(0)
    full = rates.draw(np.ones(identities), ranks, grid)

    random = np.random.default_rng(seed)
    present = np.flatnonzero(rates.mated_per_identity + rates.other_per_identity)
    is_mated, is_other = rates.mated_per_identity > 0, rates.other_per_identity > 0
    rank_samples, fnir_samples = np.empty((resamples, 2, len(ranks))), np.empty((resamples, 2, len(grid)))
    for r in range(resamples):
        multiplicity = np.zeros(identities)
        while not multiplicity[is_mated].any() or (others and not multiplicity[is_other].any()):
            multiplicity[present] = random.multinomial(len(present), np.full(len(present), 1 / len(present)))
        drawn = rates.draw(multiplicity, ranks, grid)
        rank_samples[r], fnir_samples[r] = drawn.ranks, drawn.fnir
        advance(1)

    people = float(is_mated.sum()), effective(rates.mated_per_identity.astype(np.float64))
    places = {fpir: int(np.flatnonzero(grid == fpir)[0]) for fpir in FPIRS if fpir in grid}
    values = {f"{name}/rank_balanced/{rank}": rank_samples[:, 0, k] for k, rank in enumerate(ranks)}
    values |= {f"{name}/rank/{rank}": rank_samples[:, 1, k] for k, rank in enumerate(ranks)}
    values |= {f"{name}/fnir_balanced/{fpir:g}": fnir_samples[:, 0, k] for fpir, k in places.items()}
    values |= {f"{name}/fnir/{fpir:g}": fnir_samples[:, 1, k] for fpir, k in places.items()}
    found = Identification(
        name=name,
        query=query.id,
        gallery=gallery.id,
        galleries=galleries,
        enrolled=tuple(enrolled),
        mated_searches=int(rates.mated_per_identity.sum()),
        mated_identities=int(is_mated.sum()),
        non_mated_searches=int(rates.other_per_identity.sum()),
        non_mated_identities=others,
        ranks=tuple(
            RankPoint(
                rank=rank,
                rate_balanced=float(full.ranks[0, k]),
                rate_balanced_ci95=proportion_interval(
                    float(full.ranks[0, k]), float(rank_samples[:, 0, k].var()), people[0]
                ),
                rate=float(full.ranks[1, k]),
                rate_ci95=proportion_interval(float(full.ranks[1, k]), float(rank_samples[:, 1, k].var()), people[1]),
            )
            for k, rank in enumerate(ranks)
        ),
        within=WITHIN,
        min_fpir=smallest if len(grid) else None,
        points=tuple(
            OpenSetPoint(
                fpir=fpir,
                threshold=float(full.threshold[0, k]),
                fnir_balanced=float(full.fnir[0, k]),
                fnir_balanced_ci95=proportion_interval(
                    float(full.fnir[0, k]), float(fnir_samples[:, 0, k].var()), people[0]
                ),
                raw_threshold=float(full.threshold[1, k]),
                fnir=float(full.fnir[1, k]),
                fnir_ci95=proportion_interval(float(full.fnir[1, k]), float(fnir_samples[:, 1, k].var()), people[1]),
            )
            for fpir, k in places.items()
        ),
        unresolved=tuple(fpir for fpir in FPIRS if fpir not in places),
        curve=_curve(grid, full, fnir_samples[:, 0].var(axis=0), people[0]),
    )
    return found, values


def _grid(smallest: float) -> Doubles:
    """List falling false positive identification rates of the curve, down to the smallest that is resolved."""
    grid = np.unique([*np.geomspace(smallest, 1, 60), smallest, *(f for f in FPIRS if f >= smallest * (1 - 1e-9))])
    return grid[::-1]


def _curve(grid: Doubles, full: ResampledSearches, variance: Doubles, people: float) -> OpenSetCurve:
    low, high = proportion_intervals(full.fnir[0], variance, people)
    columns = (grid, full.fnir[0], low, high)
    fpir, fnir, lows, highs = (tuple(column.tolist()) for column in columns)
    return OpenSetCurve(fpir=fpir, fnir=fnir, low=lows, high=highs)


def _descending(scores: Floats, identity: Ints) -> tuple[Floats, Ints, Ints]:
    order = np.argsort(-scores, kind="stable")
    return scores[order], identity[order], order
