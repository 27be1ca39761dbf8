"""The report's baselines: what an undistilled control, and linear maps of it, would have given."""

from __future__ import annotations

from html import escape

from pkd.toolkit.evaluation.report.html import bullets, percent, points, section, span, table
from pkd.toolkit.evaluation.report.rates import headline, point_at
from pkd.toolkit.evaluation.results.schema import (
    Comparison,
    Control,
    Evaluation,
    LinearMap,
    PairAccuracy,
    PairedDifference,
)

READING = {
    "T–T": "the ceiling: the teacher on both sides",
    "S–T": "distilled: the student against the teacher’s gallery",
    "R–T": "control behind an affine map (ridge regression)",
    "P–T": "control behind a rotation (orthogonal Procrustes)",
    "C–T": "control as it is: nothing joins the two spaces, so chance, which is the FMR, is expected",
    "C–C": "control against itself: what it could do in a space of its own",
}
"""The cells that say what distillation bought, in the order of the table."""


def baselines(e: Evaluation) -> str:
    """What distillation bought, or what to pass to see it."""
    if e.control is None:
        return section(
            "What distillation bought",
            "<p>No baseline was measured. Pass <code>--control SPEC</code>, an encoder that was not distilled from "
            "this teacher (<code>pkd-distill --method none</code> trains one), and <code>--fit-faces DIR</code>, "
            "aligned crops of <em>other</em> people, on which linear maps from the control to the teacher are fitted. "
            "The report then says what the student does that a control, or a linear map of it, does not.</p>",
        )
    return section(
        "What distillation bought",
        f"<p>The control <code>{escape(e.control.encoder.name)}</code> was not distilled from this teacher. Where a "
        "linear map of a control of the student’s size and training does as well as the student, distillation bought "
        "nothing; a larger or longer trained control shows how far a map alone can go.</p>",
        _rates(e) if e.comparisons else _accuracies(e.pair_accuracies),
        _maps(e.control, e),
    )


def _rates(e: Evaluation) -> str:
    fmr = headline(e.comparisons)
    if fmr is None:
        return ""
    cells = {c.name: c for c in e.comparisons}
    gains = {g.baseline: g.difference for g in e.gains if g.fmr == fmr}
    rows = [
        [f"<b>{name}</b> {said}", *_rate(cells[name], fmr), *([_gain(gains.get(name))] if gains else [])]
        for name, said in READING.items()
        if name in cells
    ]
    heads = ["pair", f"accepted at FMR {percent(fmr)}", "pairs alike (raw)", "equal error rate", "d′"]
    if not gains:
        return table(heads, rows, kind="wordy")
    return (
        table([*heads, "S–T minus this"], rows, kind="wordy")
        + '<p class="small">Differences: in points, over the same drawn people, with 95 % interval and two-sided p.</p>'
    )


def _gain(d: PairedDifference | None) -> str:
    """Difference in points with interval and p-value, over the same drawn people."""
    if d is None:
        return ""
    low, high = (points(end) for end in d.ci95)
    return f"<b>{points(d.difference)}</b><small>{low} to {high}</small><small>p {d.p:.2g}</small>"


def _rate(c: Comparison, fmr: float) -> list[str]:
    point = point_at(c, fmr)
    if point is None:
        return ['<td class="none">not resolved</td>', "", percent(c.eer, 2), f"{c.distances.d_prime:.2f}"]
    return [
        f"<b>{percent(point.tar_balanced, 1)}</b><small>{span(point.tar_balanced_ci95)}</small>",
        f"{percent(point.tar, 1)}<small>{span(point.tar_ci95)}</small>",
        percent(c.eer, 2),
        f"{c.distances.d_prime:.2f}",
    ]


def _accuracies(found: tuple[PairAccuracy, ...]) -> str:
    cells = {a.name: a for a in found}
    rows = [
        [
            f"<b>{name}</b> {said}",
            f"<b>{percent(cells[name].accuracy, 2)}</b><small>{span(cells[name].ci95, 2)}</small>",
        ]
        for name, said in READING.items()
        if name in cells
    ]
    return table(["pair", "accuracy"], rows, kind="wordy") if rows else ""


def _maps(control: Control, e: Evaluation) -> str:
    """How the maps were fitted, or how to have some."""
    lines = []
    if control.encoder.space.dim != e.teacher.space.dim:
        lines.append(
            f"The control gives {control.encoder.space.dim} numbers and the teacher {e.teacher.space.dim}: without a "
            "map they have no cosine, so there is no C–T."
        )
    if control.fit is None:
        lines.append(
            "No linear map was fitted. Pass <code>--fit-faces DIR</code>, aligned crops of people who are not in this "
            "set."
        )
        return bullets(lines, "small")
    fit = control.fit
    lines.append(
        f"The maps were fitted on {fit.images:,} images of {fit.identities:,} other people ({escape(fit.name)}): no "
        "identity name and no image is in both sets."
    )
    lines += [_map(m, control) for m in control.maps]
    lines.append("None of these encoders gets a certificate.")
    return bullets(lines, "small")


def _map(m: LinearMap, control: Control) -> str:
    chosen = f", λ = {m.penalty:.3g} chosen on the latter" if m.penalty is not None else ""
    return (
        f"<b>{m.letter}</b>, {escape(m.kind)}: mean cosine to the teacher {m.fit_cosine:.3f} on the images of the fit; "
        f"{m.held_out_cosine:.3f} on {control.held_out_identities:,} people left out of it{chosen}."
    )
