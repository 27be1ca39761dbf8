"""What runs can be ranked by: where each statistic lies in report.json and under which name in draws.npz."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pkd.toolkit.evaluation.comparison.ranking import Measured
from pkd.toolkit.evaluation.results.schema import Evaluation

Found = dict[float | None, tuple[Measured, Measured | None]]
"""Target rate (None for statistics without one) → every identity alike, and every pair (or search) alike."""


@dataclass(frozen=True)
class Statistic:
    """One way to rank runs."""

    words: str
    """``{}``: the target rate in per cent."""
    key: str
    """After the cell in ``Draws.values``. ``{}``: the target rate."""
    target: str
    """What the target rate is; empty where there is none."""
    falls: bool
    """True where less is better."""
    find: Callable[[Evaluation], Mapping[str, Found]]
    """By cell."""


def _tar(e: Evaluation) -> dict[str, Found]:
    return {
        c.name: {
            p.fmr: (
                Measured(value=p.tar_balanced, ci95=p.tar_balanced_ci95),
                Measured(value=p.tar, ci95=p.tar_ci95),
            )
            for p in c.points
        }
        for c in e.comparisons
    }


def _accuracy(e: Evaluation) -> dict[str, Found]:
    return {a.name: {None: (Measured(value=a.accuracy, ci95=a.ci95), None)} for a in e.pair_accuracies}


def _rank_1(e: Evaluation) -> dict[str, Found]:
    first = {i.name: i.ranks[0] for i in e.identifications if i.ranks and i.ranks[0].rank == 1}
    return {
        name: {
            None: (
                Measured(value=r.rate_balanced, ci95=r.rate_balanced_ci95),
                Measured(value=r.rate, ci95=r.rate_ci95),
            )
        }
        for name, r in first.items()
    }


def _fnir(e: Evaluation) -> dict[str, Found]:
    return {
        i.name: {
            p.fpir: (
                Measured(value=p.fnir_balanced, ci95=p.fnir_balanced_ci95),
                Measured(value=p.fnir, ci95=p.fnir_ci95),
            )
            for p in i.points
        }
        for i in e.identifications
    }


STATISTICS = {
    "tar": Statistic("true accept rate at FMR {}", "tar_balanced/{}", "FMR", False, _tar),
    "accuracy": Statistic("accuracy", "accuracy", "", False, _accuracy),
    "rank-1": Statistic("rank-1 rate", "rank_balanced/1", "", False, _rank_1),
    "fnir": Statistic("FNIR at FPIR {}", "fnir_balanced/{}", "FPIR", True, _fnir),
}
"""By the name that ``--by`` takes."""
