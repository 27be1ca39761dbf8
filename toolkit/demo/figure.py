"""Draw what the demo shows: demo.png, one person on two devices, and the section that opens its report."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import PkdError
from pkd.toolkit.evaluation.report.drawing import FAINT, GENUINE, IMPOSTOR, INK, STYLE, require_plots
from pkd.toolkit.images.codec import read_rgb

if TYPE_CHECKING:
    from pkd.toolkit.demo.run import Attempt, Outcome

PAPER, SOFT, AMBER = "#ffffff", "#64748b", "#b45309"
WIDTH, HEIGHT = 12.0, 8.1


def draw_picture(outcome: Outcome, path: Path) -> None:
    """Write a PNG, 1800×1215: the genuine and the impostor query of middle score, and a histogram of all scores."""
    require_plots()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({**STYLE, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(WIDTH, HEIGHT), facecolor=PAPER)
        FigureCanvasAgg(figure)
        _heading(figure, outcome)
        genuine, impostor = outcome.of(True), outcome.of(False)
        _row(figure, outcome, genuine[len(genuine) // 2], 0.595, "same person")
        _row(figure, outcome, impostor[len(impostor) // 2], 0.315, "two different people")
        _scores(figure, outcome)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def page(report: str, figures: Mapping[str, Any], picture: Path) -> str:
    """Put together the evaluation's page with the demo's own section after its header; one file, the picture inside."""
    head, mark, rest = report.partition("</header>")
    if not mark:
        raise PkdError("the evaluation's report.html has no header to follow. Reinstall pkd: its parts do not match.")
    data = base64.b64encode(picture.read_bytes()).decode()
    rows = "".join(_counted(figures[kind], label) for kind, label in (("genuine", "same"), ("impostor", "another")))
    who = "Synthetic visitors" if figures["synthetic"] else "Visitors"
    sizes = ", ".join(
        f"{role} {figures['bytes'][role] / 1e6:.2f} MB"
        + (f" ({figures['parameters'][role]:,} parameters)" if role in figures["parameters"] else "")
        for role in ("teacher", "student")
    )
    return (
        f"{head}{mark}\n<section><h2>Over HTTP</h2><p>{who} who took part in neither training nor evaluation were "
        "enrolled with the teacher over HTTP. Their other images were embedded with the student&#8217;s bundle alone, "
        "as on a phone, and only the embedding was sent to <code>/verify</code>. "
        f"The certificate of this ordered pair gave the threshold {figures['threshold']:.3f} for a false match rate of "
        f"{100 * figures['target_fmr']:g} %. {escape(sizes)}.</p>"
        '<div class="scroll"><table><thead><tr><th scope="col">Query and gallery show</th><th scope="col">Queries</th>'
        '<th scope="col">Matched</th><th scope="col">Rate</th><th scope="col">The certificate says</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        '<figure><img style="max-width:100%" alt="The middle genuine and the middle impostor query with their scores, '
        f'and a histogram of all scores" src="data:image/png;base64,{data}"></figure></section>{rest}'
    )


def _counted(counted: Mapping[str, Any], label: str) -> str:
    low, high = counted["expected_ci95"]
    return (
        f'<tr><th scope="row">{label} person</th><td>{counted["queries"]:,}</td><td>{counted["matched"]:,}</td>'
        f"<td>{100 * counted['rate']:.1f} %</td>"
        f"<td>{100 * counted['expected']:.1f} % <small>{100 * low:.1f}–{100 * high:.1f}</small></td></tr>"
    )


def _heading(figure: Any, outcome: Outcome) -> None:
    _say(figure, 0.045, 0.945, "One person, two devices", 23, color="#0f172a", weight="bold", ha="left")
    said = "The phone runs the student, the server's gallery was made by the teacher, and one certificate says how far "
    _say(figure, 0.045, 0.902, said + "a score between them can be trusted.", 10.5, color=SOFT, ha="left")
    if outcome.synthetic:
        box = {"boxstyle": "round,pad=0.55", "fc": "#fffbeb", "ec": AMBER, "lw": 1.2}
        said = "SYNTHETIC FACES · nobody here exists"
        _say(figure, 0.957, 0.945, said, 10.5, color=AMBER, weight="bold", ha="right", bbox=box)


def _say(figure: Any, x: float, y: float, words: str, size: float, **more: Any) -> None:
    figure.text(x, y, words, size=size, va="center", **{"color": INK, "ha": "center"} | more)


def _row(figure: Any, outcome: Outcome, attempt: Attempt, bottom: float, truth: str) -> None:
    """Draw query crop, score on its scale with the threshold, gallery crop."""
    height = 0.235
    side = height * HEIGHT / WIDTH
    left, right = 0.045, 0.957 - side
    for place, path, device in ((left, attempt.query, "phone · student"), (right, attempt.gallery, "server · teacher")):
        axes = figure.add_axes((place, bottom, side, height))
        axes.imshow(cv2.resize(read_rgb(path), (448, 448), interpolation=cv2.INTER_CUBIC))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=FAINT)
        _say(figure, place, bottom - 0.019, device, 10.5, weight="bold", ha="left")
    correct, threshold, certificate = attempt.match is attempt.genuine, outcome.threshold, outcome.certificate
    colour = IMPOSTOR if not correct else GENUINE if attempt.match else INK
    axes = figure.add_axes((left + side + 0.045, bottom + 0.085, right - left - side - 0.09, 0.05))
    low, high = _span(outcome)
    axes.axis("off")
    axes.set(xlim=(low, high), ylim=(0, 1))
    for start, end, shade in ((low, threshold, "#e2e8f0"), (threshold, high, "#99f6e4")):
        axes.plot([start, end], [0.5, 0.5], color=shade, lw=7, solid_capstyle="round")
    axes.plot([threshold, threshold], [0.05, 0.95], color=INK, lw=1.6)
    axes.plot([attempt.score], [0.5], "o", color=colour, ms=15, mec=PAPER, mew=2.2, clip_on=False, zorder=3)
    centred: dict[str, Any] = {"textcoords": "offset points", "ha": "center"}
    axes.annotate(f"threshold {threshold:.3f}", (threshold, 0), (0, -3), size=9.5, color=SOFT, va="top", **centred)
    score = f"{attempt.score:.3f}"
    axes.annotate(score, (attempt.score, 0.95), (0, 3), size=12.5, color=colour, weight="bold", va="bottom", **centred)
    rate, lowest, highest = (f"{100 * r:.3g} %" for r in (attempt.fmr_at_score, *attempt.fmr_ci95))
    pair = f"certificate {short(certificate.query)} against {short(certificate.gallery)}"
    said = f"false match rate at this score {rate}  (95 % interval {lowest} to {highest})"
    _say(
        figure, 0.5, bottom + height - 0.012, "match" if attempt.match else "no match", 21, color=colour, weight="bold"
    )
    _say(figure, 0.5, bottom + height - 0.051, f"{truth}: {'right' if correct else 'WRONG'}", 10.5, color=SOFT)
    _say(figure, 0.5, bottom + 0.034, said, 10)
    _say(figure, 0.5, bottom + 0.008, f"{pair}: {certificate.impostor_pairs:,} impostor pairs", 8.2, color=SOFT)


def _scores(figure: Any, outcome: Outcome) -> None:
    """Draw a histogram of all scores of the demo's own queries."""
    axes = figure.add_axes((0.045, 0.075, 0.912, 0.125))
    genuine, impostor = outcome.of(True), outcome.of(False)
    low, high = _span(outcome)
    bins = np.linspace(low, high, 61)
    for tried, colour, who in ((genuine, GENUINE, "same person"), (impostor, IMPOSTOR, "different people")):
        scores = np.array([a.score for a in tried])
        label = f"{who}: {sum(a.match for a in tried):,} of {len(tried):,} matched"
        axes.hist(scores, bins, weights=np.full(len(scores), 1 / len(scores)), color=colour, alpha=0.55, label=label)
    axes.axvline(outcome.threshold, color=INK, lw=1.6)
    axes.set(xlim=(low, high), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.set_xlabel("cosine similarity of the student's query to the teacher's gallery", size=9.5, color=SOFT)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=2, fontsize=10, borderaxespad=0, borderpad=0)


def _span(outcome: Outcome) -> tuple[float, float]:
    """Find the ends of the score scale, rounded outwards to tenths, that hold every score and the threshold."""
    scores = [a.score for a in outcome.attempts] + [outcome.threshold]
    return float(np.floor(min(scores) * 10 - 0.3) / 10), float(np.ceil(max(scores) * 10 + 0.3) / 10)
