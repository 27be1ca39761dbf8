"""Draw the pictures of a report: error trade-offs, distances and scores of every ordered pair of encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pkd.toolkit.evaluation.metrics.pairing import Doubles
from pkd.toolkit.evaluation.report.drawing import GENUINE, IMPOSTOR, INK, SOFT, Picture, on_axes
from pkd.toolkit.evaluation.results.schema import (
    Agreement,
    Comparison,
    Det,
    Discard,
    Distances,
    Evaluation,
    Histogram,
    Identification,
)

LINES: dict[str, tuple[str, Any]] = {
    "T–T": ("#475569", (0, ())),
    "S–T": ("#0b63c5", (0, ())),
    "T–S": ("#0f766e", (0, (6, 2))),
    "S–S": ("#b45309", (0, (4, 2))),
    "T–M": ("#0f766e", (0, (5, 1, 1, 1))),
    "S–M": ("#4d7c0f", (0, (2, 1))),
    "R–T": ("#a21caf", (0, (7, 2, 1, 2))),
    "P–T": ("#6d28d9", (0, (3, 1, 1, 1))),
    "C–C": ("#4d7c0f", (0, (2, 2))),
    "C–T": ("#9f1239", (0, (1, 1.5))),
}
"""Colour and dash pattern of each ordered pair: told apart in print, too."""
OF_MEASURE = {
    "sharpness": "#0b63c5",
    "exposure": "#b45309",
    "inter_eye": "#0f766e",
    "yaw": "#a21caf",
    "pitch": "#6d28d9",
    "roll": "#4d7c0f",
    "occlusion": "#9f1239",
}
LABEL_STEP = 0.11
"""Height of a threshold's label, as a share of the tallest bar."""
USED = 2e-5
"""Fraction of pairs from which on a bin counts as used."""


def pictures(e: Evaluation) -> dict[str, Picture]:
    """List every picture of a report, by name. Empty where nothing can be drawn."""
    drawn = [scores_of(c, e.comparisons) for c in e.comparisons]
    if any(c.det.fmr for c in e.comparisons):
        drawn.append(det_curves({c.name: c.det for c in e.comparisons}, title="query–gallery"))
    if e.comparisons:
        drawn.append(distance_distributions([(c.name, c) for c in e.comparisons]))
    planned = {c.name: c for c in e.comparisons if c.planned and set(c.name) <= set("T–S")}
    if planned:
        drawn += [more_people(planned, "people-fmr"), more_people(planned, "people-tar")]
    if any(i.curve.fpir for i in e.identifications):
        drawn.append(open_set_curves(e.identifications))
    if e.agreement:
        drawn.append(agreement_histogram(e.agreement))
    drawn += discard_pictures(e.discards)
    return {picture.name: picture for picture in drawn}


def file_name(encoder_pair: str) -> str:
    """Write an encoder pair's name in ASCII: ``S–T`` → ``S-T``."""
    return encoder_pair.replace("–", "-")


def det_curves(
    curves: dict[str, Det],
    *,
    title: str,
    lines: dict[str, tuple[str, Any]] = LINES,
    name: str = "det",
    rates: tuple[str, str] = ("false match rate (FMR)", "false non-match rate (FNMR)"),
) -> Picture:
    """Draw FNMR against FMR on log axes with bands, each curve down to the smallest FMR that its set resolves."""
    curves = {label: det for label, det in curves.items() if det.fmr}

    def draw(axes: Any) -> None:
        lowest = _lower_end(curves.values())
        band = 0.13 if len(curves) <= 4 else 0.08
        for label, det in curves.items():
            colour, dashes = lines[label]
            low, high, rate = (np.maximum(x, lowest / 10) for x in (det.low, det.high, det.fnmr))
            axes.fill_between(det.fmr, low, high, color=colour, alpha=band, lw=0)
            axes.plot(det.fmr, rate, color=colour, ls=dashes, lw=2, label=label)
        axes.set(xscale="log", yscale="log", ylim=(lowest, 1.0))
        axes.set_xlim(min(min(det.fmr) for det in curves.values()), 1.0)
        axes.set(xlabel=rates[0], ylabel=rates[1])
        axes.grid(True, which="major")
        axes.grid(True, which="minor", lw=0.4, alpha=0.6)
        _percent_ticks(axes.yaxis)
        _percent_ticks(axes.xaxis)
        handles, labels = axes.get_legend_handles_labels()
        worst_first = sorted(range(len(labels)), key=lambda i: -_at_end(curves[labels[i]]))
        corner, columns = ((0.0, -0.14), 2) if beneath else ((1.0, 1.0), 1)
        axes.legend(
            [handles[i] for i in worst_first], [labels[i] for i in worst_first], title=title, handlelength=2.6,
            borderpad=0.1, alignment="left", loc="upper left", bbox_to_anchor=corner, ncols=columns,
        )  # fmt: skip

    beneath = max(map(len, curves), default=0) > 5
    height = 4.3 + (0.3 + 0.24 * ((len(curves) + 1) // 2) if beneath else 0)
    words = "Detection error trade-off on log axes for " + ", ".join(curves)
    return Picture(name, words, (6.6, height), on_axes(draw))


def open_set_curves(found: Sequence[Identification]) -> Picture:
    """Draw FNIR against FPIR, as ``det_curves``."""
    curves = {i.name: Det(fmr=i.curve.fpir, fnmr=i.curve.fnir, low=i.curve.low, high=i.curve.high) for i in found}
    rates = "false positive identification rate (FPIR)", "false negative identification rate (FNIR)"
    return det_curves(curves, title="probe–gallery", name="identification", rates=rates)


def more_people(comparisons: dict[str, Comparison], name: str) -> Picture:
    """Draw against the number of people how wide the intervals at the smallest operating point would be.

    ``people-fmr``: the upper end of the FMR's interval over the rate. ``people-tar``: points of the TAR's interval.
    """
    of_fmr = name == "people-fmr"

    def draw(axes: Any) -> None:
        for label, c in comparisons.items():
            last, (colour, dashes) = c.planned[-1], LINES[label]
            values = last.fmr_high if of_fmr else tuple(100 * width for width in last.tar_width)
            axes.plot(last.people, values, color=colour, ls=dashes, lw=2, label=f"{label} at FMR {100 * last.fmr:g} %")
            here = np.argmin(np.abs(np.array(last.people) - c.genuine_identities))
            axes.plot(last.people[here], values[here], "o", color=colour)
        axes.set(xscale="log", xlabel="people with several images")
        people = next(iter(comparisons.values())).planned[-1].people
        axes.set_xticks(people, [f"{count:,}" for count in people])
        axes.minorticks_off()
        axes.set(ylabel="upper end / FMR" if of_fmr else "width, points", ylim=(1 if of_fmr else 0, None))
        axes.grid(True, which="major")
        axes.legend(loc="upper right", fontsize=9)

    what = "the upper end of the interval of the FMR" if of_fmr else "the width of the interval of the TAR"
    words = f"Curves of {what} against the number of people, for " + ", ".join(comparisons)
    return Picture(name, words, (5.0, 3.1), on_axes(draw))


def distance_distributions(rows: Sequence[tuple[str, Comparison]], *, name: str = "distances") -> Picture:
    """Draw densities of the Euclidean distance of genuine and impostor pairs, a row each on one axis, with their means.

    ``rows``: label and comparison. The distance of two unit vectors is √(2 − 2·cosine), 0 to 2.
    """

    def draw(figure: Any) -> None:
        plots = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
        used = [
            i for _, c in rows for h in (c.genuine, c.impostor) for i in np.flatnonzero(np.array(h.fractions) > 1e-3)
        ]
        edges = _distances(rows[0][1].genuine)
        for (label, c), axes in zip(rows, plots, strict=True):
            axes.set_axisbelow(True)
            for part, colour in ((c.impostor, IMPOSTOR), (c.genuine, GENUINE)):
                axes.fill_between(*_density(part), color=colour, alpha=0.3, lw=0)
                axes.plot(*_density(part), color=colour, lw=1.2)
            axes.set(ylim=(0, None), yticks=[], xlim=(edges[max(used) + 1] - 0.03, edges[min(used)] + 0.03))
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="x", length=3)
            axes.grid(True, axis="x")
            _means(axes, c.distances)
            axes.set_title(label, loc="left", size=11, weight="bold", color=INK, pad=3)
            axes.set_title(_said(c.distances), loc="right", size=9, color=SOFT, pad=3)
        plots[-1].set_xlabel("Euclidean distance of unit embeddings")

    words = "Distributions of the distance between embeddings of one person and of two, for " + ", ".join(
        label for label, _ in rows
    )
    return Picture(name, words, (6.0, 0.55 + 1.12 * len(rows)), draw)


def scores_of(comparison: Comparison, others: tuple[Comparison, ...]) -> Picture:
    """Draw genuine and impostor scores of one ordered pair with its thresholds, on one scale with ``others``."""

    def draw(axes: Any) -> None:
        for part, colour, name in (
            (comparison.impostor, IMPOSTOR, "impostor"),
            (comparison.genuine, GENUINE, "genuine"),
        ):
            axes.stairs(part.fractions, _edges(part), fill=True, color=colour, alpha=0.28)
            axes.stairs(part.fractions, _edges(part), color=colour, lw=1.3, label=f"{name} pairs")
        left, right = _range(*(h for c in others for h in (c.genuine, c.impostor)))
        top = max(*comparison.genuine.fractions, *comparison.impostor.fractions)
        for place, point in enumerate(reversed(comparison.points)):  # a line ends below the labels to its left
            height = (1.05 + LABEL_STEP * place) * top
            axes.plot([point.threshold] * 2, [0, height], color=INK, lw=1, ls=(0, (2, 2)))
            side = "right" if point.threshold > 0.15 * left + 0.85 * right else "left"
            axes.text(point.threshold, height, f" FMR {100 * point.fmr:g} % ", color=INK, size=10, va="center", ha=side)
        axes.set(ylim=(0, (1.12 + LABEL_STEP * len(comparison.points)) * top), xlim=(left, right))
        axes.set(xlabel="cosine similarity", ylabel="fraction of pairs", yticks=[])
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, fontsize=10, borderpad=0)

    words = f"Histogram of genuine and impostor scores, {comparison.name}, with the threshold of each false match rate"
    return Picture(f"scores-{file_name(comparison.name)}", words, (5.0, 3.1), on_axes(draw))


def agreement_histogram(agreement: Agreement) -> Picture:
    """Draw the cosine between teacher and student on the same image."""

    def draw(axes: Any) -> None:
        edges = _edges(agreement.histogram)
        axes.stairs(agreement.histogram.fractions, edges, fill=True, color=LINES["S–T"][0], alpha=0.28)
        axes.stairs(agreement.histogram.fractions, edges, color=LINES["S–T"][0], lw=1.3)
        axes.axvline(agreement.mean, color=INK, lw=1, ls=(0, (2, 2)))
        axes.set(xlim=_range(agreement.histogram), ylim=(0, 1.12 * max(agreement.histogram.fractions)))
        axes.text(agreement.mean, axes.get_ylim()[1], f" mean {agreement.mean:.3f}", color=INK, size=9, va="top")
        axes.set(xlabel="cosine similarity", ylabel="fraction of images", yticks=[])

    words = "Histogram of the cosine between teacher and student embedding of the same image"
    return Picture("agreement", words, (5.0, 2.6), on_axes(draw))


def discard_pictures(discards: Sequence[Discard]) -> list[Picture]:
    """Draw one figure for each encoder pair, a line for each measure."""
    names = dict.fromkeys(one.name for one in discards)
    return [_discard_picture(name, [one for one in discards if one.name == name]) for name in names]


def _discard_picture(name: str, curves: Sequence[Discard]) -> Picture:
    def draw(axes: Any) -> None:
        for one in curves:
            at = [100 * share for share in one.fractions]
            axes.plot(at, [100 * rate for rate in one.fnmr], color=OF_MEASURE[one.measure], lw=2, label=one.measure)
        for start in {one.fnmr[0] for one in curves}:
            axes.axhline(100 * start, color=SOFT, ls=(0, (4, 3)), lw=1)
        axes.set(xlabel="genuine pairs discarded, %", ylabel="misses among the rest (FNMR), %")
        axes.set_xlim(0, 100 * max(curves[0].fractions))
        axes.set_ylim(bottom=0)
        axes.grid(True)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderpad=0.1)

    words = "; ".join(f"{one.measure} {100 * one.fnmr[0]:.2f} to {100 * one.fnmr[-1]:.2f} %" for one in curves)
    return Picture(
        f"discard-{name.replace('–', '-')}", f"{name}: misses against what is discarded. {words}", (9, 4), on_axes(draw)
    )


def _means(axes: Any, distances: Distances) -> None:
    top = axes.get_ylim()[1]
    for mean, colour in ((distances.genuine_mean, GENUINE), (distances.impostor_mean, IMPOSTOR)):
        axes.plot([mean, mean], [0, top], color=colour, lw=1.2, ls=(0, (2, 2)))


def _said(d: Distances) -> str:
    return (
        f"intra {d.genuine_mean:.2f} ± {d.genuine_std:.2f} · inter {d.impostor_mean:.2f} ± {d.impostor_std:.2f} · "
        f"d′ {d.d_prime:.2f}"
    )


def _edges(histogram: Histogram) -> Doubles:
    return np.linspace(-1, 1, len(histogram.fractions) + 1)


def _distances(histogram: Histogram) -> Doubles:
    """Return the histogram's edges as distances: from 2 (opposite) down to 0 (equal)."""
    distances: Doubles = np.sqrt(np.maximum(2 - 2 * _edges(histogram), 0))
    return distances


def _density(histogram: Histogram) -> tuple[Doubles, Doubles]:
    """Return distances, ascending from 0, and the density there: a line through the middles of the bins.

    Bins of equal width in cosine are wide in distance where pairs are alike, up to 0.2 for the first, which as a bar
    would stand like a slab.
    """
    edges = _edges(histogram)
    middles = np.sqrt(2 - (edges[1:] + edges[:-1]))
    density = np.array(histogram.fractions) / -np.diff(_distances(histogram))
    return np.append(0, middles[::-1]), np.append(0, density[::-1])


def _range(*histograms: Histogram) -> tuple[float, float]:
    """Find the range of cosines that occur, with a little room."""
    used = [np.flatnonzero(np.array(h.fractions) > USED) for h in histograms]
    edges = _edges(histograms[0])
    return float(edges[max(0, min(u[0] for u in used) - 2)]), float(
        edges[min(len(edges) - 1, max(u[-1] for u in used) + 3)]
    )


def _at_end(det: Det) -> float:
    """Return the FNMR at the smallest FMR."""
    return det.fnmr[-1]


def _lower_end(curves: Any) -> float:
    """Choose the lower end of the FNMR axis: the decade below the smallest rate at an FMR ≤ 10 %."""
    positive = [rate for det in curves for fmr, rate in zip(det.fmr, det.fnmr, strict=True) if rate > 0 and fmr <= 0.1]
    return float(10 ** np.floor(np.log10(max(min(positive, default=0.1) * 0.8, 1e-4))))


def _percent_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axis.set_minor_formatter(NullFormatter())
