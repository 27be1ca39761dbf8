"""Render a comparison as one HTML page, every number from compare.json."""

from __future__ import annotations

from pathlib import Path

from pkd.toolkit.evaluation.comparison.compare import Ranking
from pkd.toolkit.evaluation.report.compare_plots import LEVEL, pictures, probability, what
from pkd.toolkit.evaluation.report.drawing import draw
from pkd.toolkit.evaluation.report.page import points, render_page


def render_ranking(r: Ranking, figures: Path | None = None) -> str:
    """Render the whole page; ``figures`` gets its pictures as PNG. Raises MissingExtra without matplotlib or jinja2."""
    return render_page(
        "comparison.html",
        r=r,
        title=f"{len(r.runs)} runs by {what(r)}",
        synthetic=r.synthetic,
        verdict=verdict(r),
        drawn=draw(pictures(r), figures),
        errors=r.by == "tar" and any(run.comparison for run in r.runs),
        unreachable=_too_few(r) if r.smallest_p >= LEVEL else "",
        level=f"{LEVEL:g}",
    )


def verdict(r: Ranking) -> str:
    """Say the outcome in a sentence, plain text."""
    best, second = r.runs[0], r.runs[1]
    assert second.behind_best is not None and second.p_adjusted is not None
    lead = f"{abs(100 * second.behind_best.difference):.1f} points, p {probability(second.p_adjusted)}"
    if points(second.behind_best.difference) == points(0.0):
        return f"{best.name} and {second.name} are level ({lead})."
    if second.p_adjusted < LEVEL:
        return f"{best.name} beats {second.name} by {lead}."
    if r.smallest_p >= LEVEL:
        return f"{best.name} leads {second.name} by {lead}. {_too_few(r)}"
    return f"{best.name} leads, but its lead over {second.name} ({lead}) may be chance."


def _too_few(r: Ranking) -> str:
    by_resamples = r.by in ("rank-1", "fnir")  # the others draw signs (paired.py)
    return (
        f"With {len(r.pairs):,} comparisons no adjusted p-value can be below {probability(r.smallest_p)}: "
        f"{'evaluate with a larger --bootstrap, or ' if by_resamples else ''}compare fewer runs."
    )
