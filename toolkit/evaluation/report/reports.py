"""Render an Evaluation, or a comparison of some, as one HTML page: every number from report.json or compare.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pkd.toolkit.certificates.certificate import OperatingPoint, usefulness
from pkd.toolkit.evaluation.comparison.compare import Ranking
from pkd.toolkit.evaluation.metrics.error_rates import EXPECTED
from pkd.toolkit.evaluation.report.compare_plots import LEVEL, probability, what
from pkd.toolkit.evaluation.report.compare_plots import pictures as compare_pictures
from pkd.toolkit.evaluation.report.drawing import draw
from pkd.toolkit.evaluation.report.page import percent, points, render_page
from pkd.toolkit.evaluation.report.plots import pictures
from pkd.toolkit.evaluation.results.schema import Comparison, Evaluation

HEADLINE = 1e-3
"""False match rate that the page leads with, or the smallest above it that is resolved."""
DISTILLED = {
    "T–T": "the ceiling: the teacher on both sides",
    "S–T": "distilled: the student against the teacher’s gallery",
    "R–T": "control behind an affine map (ridge regression)",
    "P–T": "control behind a rotation (orthogonal Procrustes)",
    "C–T": "control as it is: nothing joins the two spaces, so chance, which is the FMR, is expected",
    "C–C": "control against itself: what it could do in a space of its own",
}
"""Encoder pairs that say what distillation bought, in the order of the table."""
GROUPED = ("S–T", "T–T")
"""Encoder pairs with tables of groups; report.json has the others."""
WORST = ("S–T", "T–S", "T–T")
"""Encoder pairs whose worst pairs of images are on worst.html; report.json has those of all."""


def render(e: Evaluation, figures: Path | None = None) -> str:
    """Render the whole page; ``figures`` gets its pictures as PNG. Raises MissingExtra without matplotlib or jinja2."""
    fmr = headline(e.comparisons)
    by_name = {c.name: c for c in e.comparisons}
    infos = (
        ("Teacher", e.teacher),
        ("Student", e.student),
        ("Mapped", e.mapped),
        ("Control", e.control and e.control.encoder),
    )
    return render_page(
        "evaluation.html",
        e=e,
        title=f"{f'{e.student.name} against {e.teacher.name}' if e.student else e.teacher.name} on {e.data.name}",
        synthetic=e.synthetic,
        compared=_compared(e),
        drawn=draw(pictures(e), figures),
        fmr=fmr,
        fmrs=sorted(
            {p.fmr for c in e.comparisons for p in c.points} | {x.fmr for c in e.comparisons for x in c.refused},
            reverse=True,
        ),
        by_name=by_name,
        names=list(by_name),
        point_at=point_at,
        cards=[(c, p) for c in e.comparisons if not e.student and c.name == "T–T" and (p := point_at(c, fmr))],
        own=[c for c in e.comparisons if set(c.name) <= set("T–SM")],
        distilled=DISTILLED,
        gains={g.baseline: g.difference for g in e.gains if g.fmr == fmr},
        accuracies={a.name: a for a in e.pair_accuracies},
        grouped=[by_name[name] for name in GROUPED if name in by_name],
        verdicts=verdicts(e),
        worst=_worst(e),
        not_claimed=(*e.notes, *sorted({r.reason for c in e.comparisons for r in c.refused})),
        encoders=[(name, info) for name, info in infos if info],
        expected=EXPECTED,
    )


def render_worst(e: Evaluation) -> str | None:
    """Render the pairs of images that teacher and student get most wrong, by file name; None where none are known."""
    worst = _worst(e)
    title = f"The pairs of {e.data.name} that are told most wrong"
    return render_page("worst.html", title=title, synthetic=e.synthetic, worst=worst) if worst else None


def render_ranking(r: Ranking, figures: Path | None = None) -> str:
    """Render the whole page; ``figures`` gets its pictures as PNG. Raises MissingExtra without matplotlib or jinja2."""
    return render_page(
        "comparison.html",
        r=r,
        title=f"{len(r.runs)} runs by {what(r)}",
        synthetic=r.synthetic,
        verdict=verdict(r),
        drawn=draw(compare_pictures(r), figures),
        errors=r.by == "tar" and any(run.comparison for run in r.runs),
        unreachable=_too_few(r) if r.smallest_p >= LEVEL else "",
        level=f"{LEVEL:g}",
    )


def verdicts(e: Evaluation) -> list[str]:
    """Say of which pairs of teacher and student nobody should use the scores, and why; empty where all are of use."""
    fmr, said = headline(e.comparisons), []
    for c in e.comparisons:
        point = point_at(c, fmr)
        if point is None or not set(c.name) <= set("T–SM"):
            continue
        share = f"{percent(point.tar_balanced, 1)} of the people it should"
        accepted = f"{c.name} accepts {share}, at FMR {percent(point.fmr)}"
        if verdict := usefulness(point):
            why = "Chance does as well." if verdict == "useless" else "That is less than half."
            said.append(f"{verdict.capitalize()}: {accepted}. {why}")
    return said


def headline(comparisons: Sequence[Comparison]) -> float | None:
    """Choose the false match rate of the page's first figures; None where none is resolved."""
    measured = {p.fmr for c in comparisons for p in c.points}
    at_most = [fmr for fmr in measured if fmr <= HEADLINE]
    return max(at_most) if at_most else min(measured, default=None)


def point_at(comparison: Comparison, fmr: float | None) -> OperatingPoint | None:
    """Return the operating point at this target; None where it was not resolved."""
    return next((p for p in comparison.points if p.fmr == fmr), None)


def _worst(e: Evaluation) -> list[Comparison]:
    by_name = {c.name: c for c in e.comparisons}
    return [by_name[name] for name in WORST if name in by_name and by_name[name].worst]


def _compared(e: Evaluation) -> str:
    """Name the encoders that were compared."""
    who = [f"the teacher {e.teacher.name}"]
    if e.student:
        who.append(f"its student {e.student.name}" if e.student.space == e.teacher.space else e.student.name)
    if e.mapped:
        who.append(f"the mapped templates of {e.mapped.name}")
    if e.control:
        who.append(f"the undistilled control {e.control.encoder.name}")
    names = " and ".join([", ".join(who[:-1]), who[-1]] if len(who) > 1 else who)
    return f"{names[0].upper()}{names[1:]}"


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
