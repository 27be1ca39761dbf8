"""Report: an Evaluation as one HTML page. No network, no script, no face; every number comes from report.json."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from pkd.toolkit.certificate import Interval, OperatingPoint
from pkd.toolkit.evaluation.plots import LINES, agreement_histogram, det_curves, require_plots, score_histograms
from pkd.toolkit.evaluation.results import Comparison, Evaluation, PairAccuracy
from pkd.toolkit.space import EncoderInfo, short

__all__ = ["render", "require_plots"]

MEANING = {
    "T–T": "teacher query, teacher gallery: the ceiling",
    "S–T": "student query, teacher gallery: the edge device against the server",
    "T–S": "teacher query, student gallery",
    "S–S": "student query, student gallery: the student alone",
}

STYLE = """
:root { --ink: #0f172a; --soft: #475569; --line: #e2e8f0; --paper: #fff; --tint: #f1f5f9; --blue: #0b63c5; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 56rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p, ul { max-width: 44rem; } p { margin: .5rem 0; } ul { padding-left: 1.2rem; } li { margin: .35rem 0; }
.lead { color: var(--soft); } .small, figcaption, caption { color: var(--soft); font-size: .88rem; }
.banner { border: 2px solid #b45309; background: #fffbeb; color: #7c2d12; padding: .7rem 1rem; border-radius: .5rem;
  font-weight: 600; margin: 0 0 1.4rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; margin: 1.3rem 0 0; }
.card { background: var(--tint); border-radius: .6rem; padding: .8rem 1rem; }
.card.main { background: #e8f1fc; }
.card b { display: block; font-size: 1.65rem; line-height: 1.25; letter-spacing: -.02em; }
.card span { display: block; color: var(--soft); font-size: .86rem; line-height: 1.4; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; color: var(--ink); padding: .6rem 0 .2rem; }
th, td { padding: .42rem .7rem .42rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; font-size: .88rem; } th:first-child, td:first-child { text-align: left; }
td small { display: block; color: var(--soft); font-size: .8rem; } td { white-space: nowrap; }
thead th { font-size: 1rem; } thead th:first-child { font-size: .88rem; font-weight: 400; color: var(--soft); }
tbody th { font-weight: 400; font-size: 1rem; white-space: nowrap; }
.none { color: #94a3b8; }
figure { margin: .8rem 0; } figure svg { width: 100%; height: auto; display: block; }
.wide { max-width: 40rem; } .half { max-width: 28rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .6rem 1.6rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1.2rem; margin: .6rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .86em ui-monospace, SFMono-Regular, Menlo, monospace; }
@media (max-width: 34rem) { main { padding: 1.2rem .9rem 3rem; } h1 { font-size: 1.4rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin: 0 0 .5rem; } th, td { padding-right: .5rem; }
  td small { font-size: .74rem; } }
@media print { body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  figure, .scroll, .card { break-inside: avoid; } h2, h2 + p { break-after: avoid; } h2 { margin-top: 1.6rem; }
  .figures { grid-template-columns: 1fr 1fr; } .wide { max-width: 13cm; } .scroll { overflow: visible; }
  td, th { padding-top: .25rem; padding-bottom: .25rem; } .card, .banner { border: 1px solid #94a3b8; } }
"""


def render(evaluation: Evaluation) -> str:
    """The whole page. Raises MissingExtra without matplotlib."""
    sections = [_opening(evaluation)]
    if evaluation.pair_accuracies:
        sections.append(_pair_lists(evaluation))
    if evaluation.comparisons:
        sections += [_matrix(evaluation.comparisons), _det(evaluation), _histograms(evaluation.comparisons)]
    if evaluation.agreement:
        sections.append(_agreement(evaluation))
    sections += [_not_reported(evaluation), _provenance(evaluation), _method(evaluation)]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(_title(evaluation))}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        "</main>\n</body>\n</html>\n"
    )


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
    people = f"{e.data.images:,} images of {e.data.identities:,} identities"
    what = "Student and teacher" if e.student else "Teacher"
    return (
        f"<header>{banner}<h1>{escape(_title(e))}</h1>"
        f'<p class="lead">{what}, {escape(e.protocol)}: {people}. {escape(e.created[:10])}, {escape(e.tool)}.</p>'
        f"{_cards(e)}</header>"
    )


def _cards(e: Evaluation) -> str:
    """The figure that matters at the middle false match rate, for each ordered pair."""
    cards = []
    for c in e.comparisons:
        point = next((p for p in c.points if p.fmr <= 1e-3), c.points[-1] if c.points else None)
        if point is None:
            continue
        cards.append(
            f'<div class="card{" main" if c.name == "S–T" else ""}"><span><strong>{c.name}</strong> at FMR '
            f"{_percent(point.fmr)}</span><b>{_percent(point.tar_balanced, 1)}</b>"
            f"<span>of genuine pairs accepted, {_range(point.tar_balanced_ci95)}; {MEANING[c.name]}</span></div>"
        )
    cards += [
        f'<div class="card{" main" if a.name == "S–T" else ""}"><span><strong>{a.name}</strong> accuracy</span>'
        f"<b>{_percent(a.accuracy, 2)}</b><span>{_range(a.ci95, 2)}; {MEANING[a.name]}</span></div>"
        for a in e.pair_accuracies
    ]
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _matrix(comparisons: tuple[Comparison, ...]) -> str:
    meanings = "".join(f"<li><b>{c.name}</b> {MEANING[c.name]}</li>" for c in comparisons)
    return (
        f"<section><h2>True accept rates</h2><p>The query side is named first:</p><ul>{meanings}</ul>"
        + _by_fmr(comparisons, "Every identity alike", _balanced)
        + _by_fmr(comparisons, "Every pair alike (raw)", _raw)
        + "<p class=small>Below each rate: its 95 % interval over other people like these.</p>"
        "<h2>Thresholds</h2><p>A threshold belongs to one ordered pair of encoders and to no other. Below each: the "
        "false match rate that it may have on other people.</p>"
        + _by_fmr(comparisons, "Cosine similarity", _threshold)
        + "</section>"
    )


def _by_fmr(comparisons: tuple[Comparison, ...], caption: str, cell: Callable[[OperatingPoint], str]) -> str:
    """One row per false match rate, one column per ordered pair."""
    fmrs = {p.fmr for c in comparisons for p in c.points} | {r.fmr for c in comparisons for r in c.refused}
    heads = "".join(f'<th scope="col" style="color:{LINES[c.name][0]}">{c.name}</th>' for c in comparisons)
    rows = "".join(
        f'<tr><th scope="row">{_percent(fmr)}</th>'
        + "".join(
            next((f"<td>{cell(p)}</td>" for p in c.points if p.fmr == fmr), '<td class="none">not resolved</td>')
            for c in comparisons
        )
        + "</tr>"
        for fmr in sorted(fmrs, reverse=True)
    )
    return (
        f'<div class="scroll"><table><caption>{caption}</caption>'
        f'<thead><tr><th scope="col">at FMR</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _balanced(point: OperatingPoint) -> str:
    return f"<b>{_percent(point.tar_balanced, 1)}</b><small>{_range(point.tar_balanced_ci95)}</small>"


def _raw(point: OperatingPoint) -> str:
    return f"{_percent(point.tar, 1)}<small>{_range(point.tar_ci95)}</small>"


def _threshold(point: OperatingPoint) -> str:
    return f"{point.threshold:.4f}<small>{_range_g(point.fmr_ci95)}</small>"


def _det(e: Evaluation) -> str:
    figure = det_curves(e.comparisons)
    if not figure:
        return ""
    errors = ", ".join(f"{c.name} {_percent(c.eer, 2)}" for c in e.comparisons)
    return (
        f'<section><h2>Detection error trade-off</h2><figure class="wide">{figure}<figcaption>Every identity weighs '
        "the same. Lower is better. Bands: 95 % intervals. A curve ends where the impostor pairs of this set stop "
        f"resolving the rate.</figcaption></figure><p>Equal error rate, every pair alike: {errors}.</p></section>"
    )


def _histograms(comparisons: tuple[Comparison, ...]) -> str:
    figures = "".join(
        f"<figure>{score_histograms(c, comparisons)}<figcaption><b>{c.name}</b>: {c.genuine_pairs:,} genuine pairs of "
        f"{c.genuine_identities:,} identities, {c.impostor_pairs:,} impostor pairs.</figcaption></figure>"
        for c in comparisons
    )
    return (
        "<section><h2>Scores</h2><p>Each ordered pair of encoders has its own distribution, and so its own thresholds "
        f'(dashed, one per false match rate).</p><div class="figures">{figures}</div></section>'
    )


def _agreement(e: Evaluation) -> str:
    a = e.agreement
    assert a is not None
    return (
        "<section><h2>Teacher and student on the same image</h2>"
        f'<figure class="half">{agreement_histogram(a)}<figcaption>Mean cosine {a.mean:.3f}, median {a.median:.3f}, '
        f"5th percentile {a.low:.3f}, standard deviation {a.std:.3f}.</figcaption></figure></section>"
    )


def _pair_lists(e: Evaluation) -> str:
    rows = "".join(_accuracy_row(a) for a in e.pair_accuracies)
    return (
        f"<section><h2>Accuracy on {escape(e.data.name)}</h2>"
        '<div class="scroll"><table><thead><tr><th scope="col">Pair</th><th scope="col">Accuracy</th>'
        '<th scope="col">95 % interval</th><th scope="col">Standard deviation<br>over folds</th>'
        '<th scope="col">Threshold</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        f"<p>Threshold from {escape(e.pair_accuracies[0].threshold_from)}. "
        f"{e.pair_accuracies[0].genuine_pairs:,} genuine and {e.pair_accuracies[0].impostor_pairs:,} impostor pairs in "
        f"{len(e.pair_accuracies[0].fold_accuracy)} fold(s).</p></section>"
    )


def _accuracy_row(a: PairAccuracy) -> str:
    low, high = min(a.fold_threshold), max(a.fold_threshold)
    spread = f"{100 * a.fold_std:.2f} points" if a.fold_std is not None else "one fold"
    return (
        f"<tr><td><b>{a.name}</b></td><td>{_percent(a.accuracy, 2)}</td><td>{_range(a.ci95, 2)}</td><td>{spread}</td>"
        f"<td>{low:.3f}{'' if low == high else f' to {high:.3f}'}</td></tr>"
    )


def _not_reported(e: Evaluation) -> str:
    reasons = sorted({r.reason for c in e.comparisons for r in c.refused})
    lines = "".join(f"<li>{escape(line)}</li>" for line in (*e.notes, *reasons))
    return f"<section><h2>What is not claimed</h2><ul>{lines}</ul></section>" if lines else ""


def _provenance(e: Evaluation) -> str:
    single = f"; {e.data.single_image_identities:,} of them with one image" if e.data.single_image_identities else ""
    rows = [
        ("Images", f"{e.data.images:,} of {e.data.identities:,} identities{single}"),
        ("Set", f"{escape(e.data.name)}{' (synthetic)' if e.synthetic else ''}"),
        ("Digest", f"<code>{e.data.content_digest}</code>"),
        ("Teacher", _encoder(e.teacher)),
        *([("Student", _encoder(e.student))] if e.student else []),
        ("Embedding", "image + mirror image" if e.flip else "image as it is"),
        ("Intervals", f"{e.resamples:,} resamples of the identities, seed {e.seed}"),
        ("Certificates", "<br>".join(_certificate(c) for c in e.comparisons) or "none: a pair list certifies nothing"),
        ("Made", f"{escape(e.created)} by {escape(e.tool)}"),
    ]
    return (
        "<section><h2>Data and encoders</h2><dl>"
        + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
        + "</dl></section>"
    )


def _certificate(c: Comparison) -> str:
    return f"{c.name}: " + (f"<code>{escape(c.certificate)}</code>" if c.certificate else "none")


def _encoder(info: EncoderInfo) -> str:
    return (
        f"<code>{escape(info.id)}</code><br>{info.space.dim} numbers, {escape(info.numeric_mode)}, "
        f"{escape(info.preprocess.name)}, space <code>{escape(short(info.space.id))}</code>"
    )


def _method(e: Evaluation) -> str:
    lines = [
        "The score of a pair is the cosine of the two embeddings; it matches when the score is at or above the "
        "threshold.",
        "Intervals come from drawing the <em>identities</em> again with replacement, not the pairs: pairs that share a "
        "person are not independent. Pairs between two copies of one drawn person are left out.",
    ]
    if e.comparisons:
        lines += [
            "All pairs count, except an image with itself or a byte-identical copy. Over one set, S–T takes every "
            "ordered pair of two images, T–T and S–S every pair once.",
            "FMR (false match rate): the fraction of pairs of different people that match. TAR (true accept rate): the "
            "fraction of pairs of the same person that match. <em>Every identity alike</em> averages over people, so "
            "that no one with many images dominates; <em>every pair alike</em> is the raw fraction.",
            "Each threshold is the smallest at which the measured FMR is no larger than the target. In every resample "
            "it is found again, so a TAR interval includes the uncertainty of the threshold. The false match "
            "rates below the thresholds keep the threshold and let the people vary.",
            "A false match rate is reported only where at least ten of the distinct pairs of different people would be "
            "expected to match by chance at it.",
        ]
    if e.pair_accuracies:
        lines.append(
            "Accuracy is the fraction of right decisions. With folds, each is decided at the threshold that is best on "
            "the others. The interval holds the thresholds and varies the people."
        )
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f'<section><h2>How this was measured</h2><ul class="small">{items}</ul></section>'


def _percent(rate: float, digits: int | None = None) -> str:
    return f"{100 * rate:g} %" if digits is None else f"{100 * rate:.{digits}f} %"


def _range(interval: Interval, digits: int = 1) -> str:
    return f"{100 * interval[0]:.{digits}f} to {100 * interval[1]:.{digits}f} %"


def _range_g(interval: Interval) -> str:
    return f"{100 * interval[0]:.2g} to {100 * interval[1]:.2g} %"
