"""The report's rates: the 2×2 matrix of teacher and student, and every operating point of every ordered pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pkd.toolkit.certificates.certificate import OperatingPoint
from pkd.toolkit.evaluation.report.html import MEANING, bullets, percent, section, short_span, span, table
from pkd.toolkit.evaluation.report.plots import LINES
from pkd.toolkit.evaluation.results.schema import Comparison, Evaluation

HEADLINE = 1e-3
"""False match rate that the page leads with, or the smallest above it that is resolved."""


def headline(comparisons: Sequence[Comparison]) -> float | None:
    """The false match rate of the page's first figures; None where none is resolved."""
    measured = {p.fmr for c in comparisons for p in c.points}
    at_most = [fmr for fmr in measured if fmr <= HEADLINE]
    return max(at_most) if at_most else min(measured, default=None)


def point_at(comparison: Comparison, fmr: float | None) -> OperatingPoint | None:
    """The operating point at this target; None where it was not resolved."""
    return next((p for p in comparison.points if p.fmr == fmr), None)


def cross_matrix(e: Evaluation) -> str:
    """Query rows × gallery columns of teacher and student at the headline rate."""
    fmr = headline(e.comparisons)
    if fmr is None or not e.student:
        return ""
    cells = {c.name: c for c in e.comparisons}
    rows = [
        [f"{who}<small>query</small>", *(_cell(cells, f"{letter}–{gallery}", fmr) for gallery in "TS")]
        for letter, who in (("T", "Teacher"), ("S", "Student"))
    ]
    return section(
        f"Who may be matched with whom, at FMR {percent(fmr)}",
        "<p>How often a person is accepted where one of "
        f"{1 / fmr:,.0f} other people would be; every person weighs the same. Below each rate its 95 % interval.</p>",
        table(["", "Teacher<small>gallery</small>", "Student<small>gallery</small>"], rows, kind="square"),
    )


def _cell(cells: dict[str, Comparison], name: str, fmr: float) -> str:
    found = cells.get(name)
    if found is None:
        turned = f"{name[-1]}–{name[0]}" if name == "T–S" else ""
        said = f"the transpose of {turned}:<br>the same pairs" if turned in cells else "no cosine"
        return f'<td class="none"><small>{name}</small>{said}</td>'
    point = point_at(found, fmr)
    main = ' class="main"' if name == "S–T" else ""
    if point is None:
        return f'<td class="none"><small>{name}</small>not resolved</td>'
    return (
        f"<td{main}><small>{name}</small><b>{percent(point.tar_balanced, 1)}</b>"
        f"<small>{span(point.tar_balanced_ci95)}</small></td>"
    )


def rates(e: Evaluation) -> str:
    """The true accept rates of every ordered pair at every false match rate."""
    if not e.comparisons:
        return ""
    return section(
        "True accept rates",
        "<p>The query side is named first:</p>",
        bullets(f"<b>{c.name}</b> {MEANING[c.name]}" for c in e.comparisons),
        _by_fmr(e.comparisons, "Every identity alike", _balanced),
        _by_fmr(e.comparisons, "Every pair alike (raw)", _raw),
        '<p class="small">Below each rate: its 95 % interval over other people like these.</p>',
    )


def thresholds(e: Evaluation) -> str:
    """The thresholds of teacher and student, with the false match rates that they may have on other people."""
    told = [c for c in e.comparisons if set(c.name) <= set("T–S")]
    if not told:
        return ""
    return section(
        "Thresholds",
        "<p>A threshold belongs to one ordered pair of encoders and to no other. Below each, of the false match rate "
        "behind it: how well this set knows it (95 % interval), and what another set of as many people would measure "
        "in 95 of 100 cases (new).</p>",
        _by_fmr(told, "Cosine similarity", _threshold),
    )


def _by_fmr(comparisons: Sequence[Comparison], caption: str, cell: Callable[[OperatingPoint], str]) -> str:
    """One row per false match rate, one column per ordered pair."""
    fmrs = {p.fmr for c in comparisons for p in c.points} | {r.fmr for c in comparisons for r in c.refused}
    heads = [f'<th scope="col" style="color:{LINES[c.name][0]}">{c.name}</th>' for c in comparisons]
    rows = [
        [
            percent(fmr),
            *(cell(p) if (p := point_at(c, fmr)) else '<td class="none">not resolved</td>' for c in comparisons),
        ]
        for fmr in sorted(fmrs, reverse=True)
    ]
    return table(["at FMR", *heads], rows, caption=caption, kind="long")


def _balanced(point: OperatingPoint) -> str:
    return f"<b>{percent(point.tar_balanced, 1)}</b><small>{span(point.tar_balanced_ci95)}</small>"


def _raw(point: OperatingPoint) -> str:
    return f"{percent(point.tar, 1)}<small>{span(point.tar_ci95)}</small>"


def _threshold(point: OperatingPoint) -> str:
    return (
        f"{point.threshold:.4f}<small>{short_span(point.fmr_ci95)}</small>"
        f"<small>new {short_span(point.prediction95)}</small>"
    )
