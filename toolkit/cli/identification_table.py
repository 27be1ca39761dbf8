"""The console's table of one-to-many searches."""

from __future__ import annotations

from rich.table import Table

from pkd.toolkit.certificate import Interval
from pkd.toolkit.evaluation.results import Evaluation


def identification_table(evaluation: Evaluation) -> Table:
    """Rank-1 and misses at each false positive identification rate, of every ordered pair."""
    first = evaluation.identifications[0]
    table = Table(
        title=f"Search among {' and '.join(f'{n:,}' for n in first.enrolled)} people, % with 95 % interval; "
        "probe–gallery",
        title_justify="left",
    )
    for heading in ("pair", "rate", "identities alike", "searches alike", "score ≥"):
        table.add_column(heading, justify="left" if heading in ("pair", "rate") else "right", no_wrap=True)
    for found in evaluation.identifications:
        for point in found.ranks:
            balanced = _said(point.rate_balanced, point.rate_balanced_ci95)
            table.add_row(found.name, f"rank {point.rank}", balanced, _said(point.rate, point.rate_ci95), "")
        for miss in found.points:
            balanced, raw = _said(miss.fnir_balanced, miss.fnir_balanced_ci95), _said(miss.fnir, miss.fnir_ci95)
            table.add_row(found.name, f"FNIR@FPIR {miss.fpir:g}", balanced, raw, f"{miss.threshold:.3f}")
        for fpir in found.unresolved:
            table.add_row(found.name, f"FNIR@FPIR {fpir:g}", "not resolved", "", "")
        table.add_section()
    return table


def _said(rate: float, interval: Interval) -> str:
    return f"{100 * rate:.1f} ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})"
