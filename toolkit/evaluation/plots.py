"""The report's figures as inline SVG. matplotlib is imported when a figure is drawn, and no global state is touched."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from pkd.toolkit.errors import MissingExtra
from pkd.toolkit.evaluation.results import Agreement, Comparison, Histogram

LINES = {
    "T–T": ("#475569", (0, ())),
    "S–T": ("#0b63c5", (0, ())),
    "T–S": ("#0f766e", (0, (6, 2))),
    "S–S": ("#b45309", (0, (3, 2))),
}
"""Colour and dash pattern of each ordered pair: told apart in print, too."""
GENUINE, IMPOSTOR = "#0f766e", "#b91c1c"
INK, FAINT = "#334155", "#cbd5e1"
STYLE: Any = {
    "font.size": 11,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelcolor": INK,
    "grid.color": "#e2e8f0",
    "legend.frameon": False,
}


def require_plots() -> None:
    """Raise MissingExtra without matplotlib, before minutes are spent on what cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("matplotlib", "evaluate") from None


def det_curves(comparisons: tuple[Comparison, ...]) -> str:
    """FNMR against FMR on log axes with bands, down to the smallest resolved FMR."""

    def draw(axes: Any) -> None:
        floor = _floor(comparisons)
        for c in comparisons:
            colour, dashes = LINES[c.name]
            axes.fill_between(
                c.det.fmr, np.maximum(c.det.low, floor), np.maximum(c.det.high, floor), color=colour, alpha=0.13, lw=0
            )
            axes.plot(c.det.fmr, np.maximum(c.det.fnmr, floor), color=colour, ls=dashes, lw=2, label=c.name)
            marks = [p for p in c.points if 1 - p.tar_balanced > 0]
            axes.plot([p.fmr for p in marks], [1 - p.tar_balanced for p in marks], "o", color=colour, ms=5)
        axes.set(xscale="log", yscale="log", ylim=(floor, 1.0), xlim=(min(c.min_fmr for c in comparisons), 1.0))
        axes.set(xlabel="false match rate (FMR)", ylabel="false non-match rate (FNMR)")
        axes.grid(True, which="major")
        _percent_ticks(axes.yaxis)
        _percent_ticks(axes.xaxis)
        axes.legend(loc="upper right", title="query–gallery")

    drawn = [c for c in comparisons if c.det.fmr]
    words = "Detection error trade-off on log axes for " + ", ".join(c.name for c in comparisons)
    return _svg(draw, words, (5.6, 4.2), "det") if drawn else ""


def score_histograms(comparison: Comparison, beside: tuple[Comparison, ...]) -> str:
    """Genuine and impostor scores of one ordered pair with its thresholds, on one scale with those ``beside`` it."""

    def draw(axes: Any) -> None:
        for part, colour, name in (
            (comparison.impostor, IMPOSTOR, "impostor"),
            (comparison.genuine, GENUINE, "genuine"),
        ):
            axes.stairs(part.fractions, _edges(part), fill=True, color=colour, alpha=0.28)
            axes.stairs(part.fractions, _edges(part), color=colour, lw=1.3, label=f"{name} pairs")
        top = max(*comparison.genuine.fractions, *comparison.impostor.fractions)
        for place, point in enumerate(reversed(comparison.points)):  # a line ends below the labels to its left
            height = (1.03 + 0.07 * place) * top
            axes.plot([point.threshold] * 2, [0, height], color=INK, lw=1, ls=(0, (2, 2)))
            axes.text(point.threshold, height, f" FMR {100 * point.fmr:g} %", color=INK, size=9, va="center")
        axes.set(ylim=(0, 1.32 * top), xlim=_range(*(h for c in beside for h in (c.genuine, c.impostor))))
        axes.set(xlabel="cosine similarity", ylabel="fraction of pairs", yticks=[])
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, fontsize=10, borderpad=0)

    words = f"Histogram of genuine and impostor scores, {comparison.name}, with the threshold of each false match rate"
    return _svg(draw, words, (5.0, 3.1), comparison.name)


def agreement_histogram(agreement: Agreement) -> str:
    """Cosine between teacher and student on the same image."""

    def draw(axes: Any) -> None:
        edges = _edges(agreement.histogram)
        axes.stairs(agreement.histogram.fractions, edges, fill=True, color=LINES["S–T"][0], alpha=0.28)
        axes.stairs(agreement.histogram.fractions, edges, color=LINES["S–T"][0], lw=1.3)
        axes.axvline(agreement.mean, color=INK, lw=1, ls=(0, (2, 2)))
        axes.text(agreement.mean, axes.get_ylim()[1], f" mean {agreement.mean:.3f}", color=INK, size=9, va="top")
        axes.set(
            xlim=_range(agreement.histogram), ylim=(0, None), xlabel="cosine similarity", ylabel="fraction of images"
        )
        axes.set_yticks([])

    return _svg(
        draw, "Histogram of the cosine between teacher and student embedding of the same image", (5.0, 2.6), "a"
    )


def _svg(draw: Callable[[Any], None], words: str, size: tuple[float, float], salt: str) -> str:
    require_plots()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": f"pkd {salt}"}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.set_axisbelow(True)
        draw(axes)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Two figures of one page must not share an id: a clip path of one would cut the other.
    key = re.sub(r"\W", "", salt.encode("ascii", "xmlcharrefreplace").decode())
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = svg.replace("url(#", f"url(#{key}-").replace('href="#', f'href="#{key}-')
    return re.sub(r'^<svg width="[^"]*" height="[^"]*"|^<svg ', lambda m: _labelled(m.group(), words), svg, count=1)


def _labelled(opening: str, words: str) -> str:
    return f'<svg role="img" aria-label="{html.escape(words)}" '


def _edges(histogram: Histogram) -> Any:
    return np.linspace(-1, 1, len(histogram.fractions) + 1)


def _range(*histograms: Histogram) -> tuple[float, float]:
    """The cosines that occur, with a little room."""
    used = [np.flatnonzero(np.array(h.fractions) > 2e-5) for h in histograms]
    edges = _edges(histograms[0])
    return float(edges[max(0, min(u[0] for u in used) - 2)]), float(
        edges[min(len(edges) - 1, max(u[-1] for u in used) + 3)]
    )


def _floor(comparisons: tuple[Comparison, ...]) -> float:
    """Lower end of the FNMR axis: one decade step below the smallest rate that is drawn, and never 0."""
    positive = [rate for c in comparisons for rate in c.det.fnmr if rate > 0]
    return float(10 ** np.floor(np.log10(max(min(positive, default=0.1) * 0.8, 1e-4))))


def _percent_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axis.set_minor_formatter(NullFormatter())
