"""Report: an Evaluation as one HTML page. Every number comes from report.json; sections are in files of their own."""

from __future__ import annotations

from html import escape
from pathlib import Path

from pkd.toolkit.evaluation.report.baselines import baselines
from pkd.toolkit.evaluation.report.drawing import as_svg, require_plots, write_png
from pkd.toolkit.evaluation.report.groups import demographics
from pkd.toolkit.evaluation.report.html import MEANING, bullets, page, percent, section, span, table
from pkd.toolkit.evaluation.report.identification import identification
from pkd.toolkit.evaluation.report.method import how_measured, not_claimed, provenance
from pkd.toolkit.evaluation.report.plots import pictures
from pkd.toolkit.evaluation.report.rates import cross_matrix, headline, point_at, rates, thresholds
from pkd.toolkit.evaluation.report.scores import agreement, distances, scores, trade_off, worst
from pkd.toolkit.evaluation.results.schema import Evaluation, PairAccuracy

__all__ = ["render", "require_plots", "write_figures"]


def render(e: Evaluation) -> str:
    """The whole page. Raises MissingExtra without matplotlib."""
    drawn = {name: as_svg(picture) for name, picture in pictures(e).items()}
    return page(
        _title(e),
        (
            _opening(e),
            _pair_lists(e),
            cross_matrix(e),
            trade_off(e, drawn),
            baselines(e),
            distances(e, drawn),
            scores(e, drawn),
            rates(e),
            thresholds(e),
            identification(e, drawn),
            demographics(e),
            agreement(e, drawn),
            worst(e),
            not_claimed(e),
            provenance(e),
            how_measured(e),
        ),
    )


def write_figures(e: Evaluation, folder: Path) -> None:
    """Write the page's pictures as ``folder/<name>.png``; those of an earlier run are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    for picture in pictures(e).values():
        write_png(picture, folder)


def _title(e: Evaluation) -> str:
    names = f"{e.student.name} against {e.teacher.name}" if e.student else e.teacher.name
    return f"{names} on {e.data.name}"


def _opening(e: Evaluation) -> str:
    banner = (
        '<p class="banner" role="note">Synthetic faces. These rates describe procedural drawings and say nothing about '
        "people. Do not use the thresholds.</p>"
        if e.synthetic
        else ""
    )
    return f'<header>{banner}<h1>{escape(_title(e))}</h1><p class="lead">{_compared(e)}</p>{_cards(e)}</header>'


def _compared(e: Evaluation) -> str:
    """What was compared, in a sentence or two."""
    who = [f"the teacher {escape(e.teacher.name)}"]
    if e.student:
        who.append(f"its student {escape(e.student.name)}" if e.student.space == e.teacher.space else e.student.name)
    if e.control:
        who.append(f"the undistilled control {escape(e.control.encoder.name)}")
    names = " and ".join([", ".join(who[:-1]), who[-1]] if len(who) > 1 else who)
    pairs = next((f"{c.genuine_pairs:,} genuine and {c.impostor_pairs:,} impostor pairs" for c in e.comparisons), "")
    return (
        f"{names[0].upper()}{names[1:]} on {e.data.images:,} images of {e.data.identities:,} people "
        f"({escape(e.data.name)}): {escape(e.protocol)}{f', {pairs}' if pairs else ''}. "
        f"{escape(e.created[:10])}, {escape(e.tool)}."
    )


def _cards(e: Evaluation) -> str:
    """The figures that matter, where no 2×2 matrix follows that shows them."""
    fmr = headline(e.comparisons)
    cards = [
        f'<div class="card"><span><strong>{c.name}</strong> at FMR '
        f"{percent(point.fmr)}</span><b>{percent(point.tar_balanced, 1)}</b>"
        f"<span>of genuine pairs accepted, {span(point.tar_balanced_ci95)}; {MEANING[c.name]}</span></div>"
        for c in e.comparisons
        if not e.student and c.name == "T–T" and (point := point_at(c, fmr))
    ]
    cards += [
        f'<div class="card{" main" if a.name == "S–T" else ""}"><span><strong>{a.name}</strong> accuracy</span>'
        f"<b>{percent(a.accuracy, 2)}</b><span>{span(a.ci95, 2)}; {MEANING[a.name]}</span></div>"
        for a in e.pair_accuracies
    ]
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _pair_lists(e: Evaluation) -> str:
    if not e.pair_accuracies:
        return ""
    first = e.pair_accuracies[0]
    return section(
        f"Accuracy on {escape(e.data.name)}",
        table(
            ["pair", "accuracy", "95 % interval", "standard deviation<br>over folds", "threshold"],
            [_accuracy_row(a) for a in e.pair_accuracies],
        ),
        f"<p>Threshold from {escape(first.threshold_from)}. {first.genuine_pairs:,} genuine and "
        f"{first.impostor_pairs:,} impostor pairs in {len(first.fold_accuracy)} fold(s).</p>",
        bullets(f"<b>{a.name}</b> {MEANING[a.name]}" for a in e.pair_accuracies),
    )


def _accuracy_row(a: PairAccuracy) -> list[str]:
    low, high = min(a.fold_threshold), max(a.fold_threshold)
    return [
        f"<b>{a.name}</b>",
        percent(a.accuracy, 2),
        span(a.ci95, 2),
        f"{100 * a.fold_std:.2f} points" if a.fold_std is not None else "one fold",
        f"{low:.3f}{'' if low == high else f' to {high:.3f}'}",
    ]
