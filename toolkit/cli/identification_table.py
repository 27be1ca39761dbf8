"""The console's table of one-to-many searches."""

from __future__ import annotations

from rich.table import Table

from pkd.toolkit.certificates.certificate import Interval
from pkd.toolkit.evaluation.results.schema import Evaluation


def identification_table(evaluation: Evaluation) -> Table:
    """A row an ordered pair: mates found first, and missed at each resolved false positive identification rate.

    Every identity weighs the same; the report has the raw rates, the other ranks and the thresholds.
    """
    first = evaluation.identifications[0]
    table = Table(
        title=f"Search among {' and '.join(f'{n:,}' for n in first.enrolled)} people, identities alike, % with 95 % "
        "interval; probe–gallery",
        title_justify="left",
    )
    table.add_column("pair", no_wrap=True)
    for heading in (*(f"rank {p.rank}" for p in first.ranks[:1]), *(f"FNIR@FPIR {p.fpir:g}" for p in first.points)):
        table.add_column(heading, justify="right", no_wrap=True)
    for found in evaluation.identifications:
        mates = [_said(point.rate_balanced, point.rate_balanced_ci95) for point in found.ranks[:1]]
        misses = [_said(miss.fnir_balanced, miss.fnir_balanced_ci95) for miss in found.points]
        table.add_row(found.name, *mates, *misses)
    return table


def _said(rate: float, interval: Interval) -> str:
    return f"{100 * rate:.1f} ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})"
