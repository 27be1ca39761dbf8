"""Identification rates of searches: closed-set rank-k and open-set FNIR at FPIR, with intervals.

As ISO/IEC 19795-1 and NIST's FRVT 1:N define them. Rank-k: the fraction of mated searches whose mate is among the k
best. FPIR(T): the fraction of searches without a mate in which someone scores at or above T. FNIR(T, R): the fraction
of mated searches whose mate is not among the R best, or is below T. Every probe identity weighs the same (balanced),
or every search (raw). Intervals draw the probe identities again; the gallery is held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pkd.toolkit.certificates.certificate import Interval
from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.evaluation.metrics.bootstrap import effective, interval
from pkd.toolkit.evaluation.metrics.error_rates import EXPECTED
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats, Ints
from pkd.toolkit.evaluation.metrics.search import Searches
from pkd.toolkit.evaluation.results.schema import Identification, OpenSetCurve, OpenSetPoint, RankPoint

RANKS = (1, 5, 10)
FPIRS = (1e-1, 1e-2, 1e-3)
"""False positive identification rates that are reported where the searches without a mate resolve them."""
WITHIN = 1
"""R of FNIR(T, R): the best candidate must be the mate."""


@dataclass(frozen=True)
class Drawn:
    """Rates with every identity as often as it was drawn; balanced first, raw second, along the first axis."""

    ranks: Doubles
    """2×K: fraction of mated searches with the mate within each rank."""
    last: Floats
    """2×F: highest score that is no candidate, for each FPIR; −inf where all may be."""
    fnir: Doubles
    """2×F"""

    @property
    def threshold(self) -> Doubles:
        """2×F: smallest float32 threshold with an FPIR no larger than the target."""
        above: Doubles = np.nextafter(self.last, np.float32(np.inf)).astype(np.float64)
        return above


class Rates:
    """Searches in the order of their scores, so that every resample is a few sums.

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

    def draw(self, weight: Doubles, ranks: Sequence[int], fpirs: Doubles) -> Drawn:
        """Rates with ``weight``: float64, how often each identity was drawn. Some mated search must be drawn."""
        share = weight / np.maximum(self.mated_per_identity, 1)
        other = weight / np.maximum(self.other_per_identity, 1)
        found, last, fnir = [], [], []
        for mated_weight, other_weight in ((share, other), (weight, weight)):
            mass = np.take(mated_weight, self._reached_by)
            total = mass.sum()
            found.append([mass[self._rank <= rank].sum() / total for rank in ranks])
            cumulative = np.cumsum(np.take(other_weight, self._best_of))
            if len(cumulative):
                cumulative /= cumulative[-1]
            # the first search without a mate that is one too many
            last.append(np.append(self._best, -np.inf)[np.searchsorted(cumulative, fpirs * (1 + 1e-9), "right")])
            accepted = np.searchsorted(-self._reached, -last[-1], "left")
            fnir.append(1 - np.concatenate([[0.0], np.cumsum(mass)])[accepted] / total)
        return Drawn(np.array(found), np.array(last, np.float32), np.maximum(np.array(fnir), 0.0))


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
    """Rank-k for k below the people enrolled, and FNIR at those of ``FPIRS`` that are resolved, with intervals.

    ``enrolled``: people in each gallery. At least one search must be mated. Also the values of every resample.
    """
    rates = Rates(searches, identities)
    ranks = [rank for rank in RANKS if rank < min(enrolled)]
    others = int((rates.other_per_identity > 0).sum())
    smallest = EXPECTED / others if others else None
    grid = _grid(smallest) if smallest and smallest <= 1 else np.empty(0)
    full = rates.draw(np.ones(identities), ranks, grid)

    random = np.random.default_rng(seed)
    present = np.flatnonzero(rates.mated_per_identity + rates.other_per_identity)
    is_mated, is_other = rates.mated_per_identity > 0, rates.other_per_identity > 0
    rank_draws, fnir_draws = np.empty((resamples, 2, len(ranks))), np.empty((resamples, 2, len(grid)))
    for r in range(resamples):
        weight = np.zeros(identities)
        while not weight[is_mated].any() or (others and not weight[is_other].any()):
            weight[present] = random.multinomial(len(present), np.full(len(present), 1 / len(present)))
        drawn = rates.draw(weight, ranks, grid)
        rank_draws[r], fnir_draws[r] = drawn.ranks, drawn.fnir
        advance(1)

    people = float(is_mated.sum()), effective(rates.mated_per_identity.astype(np.float64))
    places = {fpir: int(np.flatnonzero(grid == fpir)[0]) for fpir in FPIRS if fpir in grid}
    values = {f"{name}/rank_balanced/{rank}": rank_draws[:, 0, k] for k, rank in enumerate(ranks)}
    values |= {f"{name}/rank/{rank}": rank_draws[:, 1, k] for k, rank in enumerate(ranks)}
    values |= {f"{name}/fnir_balanced/{fpir:g}": fnir_draws[:, 0, k] for fpir, k in places.items()}
    values |= {f"{name}/fnir/{fpir:g}": fnir_draws[:, 1, k] for fpir, k in places.items()}
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
                rate_balanced_ci95=interval(rank_draws[:, 0, k], people[0]),
                rate=float(full.ranks[1, k]),
                rate_ci95=interval(rank_draws[:, 1, k], people[1]),
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
                fnir_balanced_ci95=interval(fnir_draws[:, 0, k], people[0]),
                raw_threshold=float(full.threshold[1, k]),
                fnir=float(full.fnir[1, k]),
                fnir_ci95=interval(fnir_draws[:, 1, k], people[1]),
            )
            for fpir, k in places.items()
        ),
        unresolved=tuple(fpir for fpir in FPIRS if fpir not in places),
        curve=_curve(grid, full, [interval(draws, people[0]) for draws in fnir_draws[:, 0].T]),
    )
    return found, values


def _grid(smallest: float) -> Doubles:
    """Falling false positive identification rates of the curve, down to the smallest that is resolved."""
    grid = np.unique([*np.geomspace(smallest, 1, 60), smallest, *(f for f in FPIRS if f >= smallest * (1 - 1e-9))])
    return grid[::-1]


def _curve(grid: Doubles, full: Drawn, intervals: Sequence[Interval]) -> OpenSetCurve:
    fnir = full.fnir[0].tolist()
    return OpenSetCurve(
        fpir=tuple(grid.tolist()),
        fnir=tuple(fnir),
        low=tuple(min(low, rate) for (low, _), rate in zip(intervals, fnir, strict=True)),
        high=tuple(max(high, rate) for (_, high), rate in zip(intervals, fnir, strict=True)),
    )


def _descending(scores: Floats, identity: Ints) -> tuple[Floats, Ints, Ints]:
    order = np.argsort(-scores, kind="stable")
    return scores[order], identity[order], order
