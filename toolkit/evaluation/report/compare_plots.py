"""Draw the pictures of a comparison: the ranking, every two runs, error trade-offs and distances of all runs."""

from __future__ import annotations

from typing import Any

from pkd.toolkit.evaluation.comparison.compare import STATISTICS, Ranking
from pkd.toolkit.evaluation.report.drawing import FAINT, INK, SOFT, Picture, on_axes
from pkd.toolkit.evaluation.report.page import points
from pkd.toolkit.evaluation.report.plots import det_curves, distance_distributions

COLOURS = ("#0b63c5", "#b45309", "#0f766e", "#a21caf", "#475569", "#be123c", "#4d7c0f", "#6d28d9")
DASHES = ((0, ()), (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
LEVEL = 0.05
"""Adjusted p-value below which two runs are said to differ."""
MANY = 8
"""Runs beyond which the pairwise picture shows numbers for names, and colours for p-values."""
LONGEST = 26
"""Letters of a run's name that fit beside a picture."""


def pictures(r: Ranking) -> dict[str, Picture]:
    """List every picture of a comparison, by name."""
    drawn = [ranking(r), pairwise(r)]
    comparisons = {run.name: run.comparison for run in r.runs if run.comparison and r.by == "tar"}
    curves = {_label(name): c.det for name, c in comparisons.items() if c.det.fmr}
    if curves:
        drawn.append(det_curves(curves, title=r.cell, lines=_lines(r)))
    if comparisons:
        drawn.append(distance_distributions([(_label(name), c) for name, c in comparisons.items()]))
    return {picture.name: picture for picture in drawn}


def ranking(r: Ranking) -> Picture:
    """Draw each run's value with its interval, best on top; the raw rate as an open circle."""

    def draw(axes: Any) -> None:
        for place, run in enumerate(r.runs):
            colour = _lines(r)[_label(run.name)][0]
            low, high = (100 * end for end in run.first.ci95)
            axes.plot([low, high], [place, place], color=colour, lw=2.2, solid_capstyle="butt")
            axes.plot([100 * run.first.value], [place], "o", color=colour, ms=8, label="macro (balanced)")
            if run.raw:
                axes.plot([100 * run.raw.value], [place], "o", mfc="none", mec=SOFT, ms=6, label="micro (raw)")
        axes.set_yticks(range(len(r.runs)), [_label(run.name) for run in r.runs])
        axes.set(ylim=(len(r.runs) - 0.5, -0.5), xlabel=f"{what(r)}, %")
        axes.grid(True, axis="x")
        axes.tick_params(axis="y", length=0)

    words = f"{what(r)} of " + ", ".join(run.name for run in r.runs) + ", best first, with 95 % intervals"
    return Picture("ranking", words, (6.6, 0.9 + 0.36 * len(r.runs)), on_axes(draw))


def pairwise(r: Ranking) -> Picture:
    """Draw row minus column in points, with the adjusted p-value; blue where the row wins, red where it loses."""
    names = [run.name for run in r.runs]
    place = {name: i for i, name in enumerate(names)}

    def draw(axes: Any) -> None:
        small = len(names) > MANY
        for v in r.pairs:
            for a, b, sign in ((v.a, v.b, 1), (v.b, v.a, -1)):
                difference = sign * v.difference.difference
                sure = v.p_adjusted < LEVEL
                wins = (difference < 0) is STATISTICS[r.by].falls
                colour = ("#dbeafe" if wins else "#ffe4e6") if sure else "#f8fafc"
                x, y = place[b], place[a]
                axes.add_patch(_square(x, y, colour))
                text = points(sign * v.difference.difference)
                if not small:
                    text += f"\np {probability(v.p_adjusted)}"
                axes.text(x, y, text, ha="center", va="center", size=6.5 if small else 9, color=INK)
        for i in range(len(names)):
            axes.add_patch(_square(i, i, FAINT))
        axes.set(
            xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), xlabel="minus this run", ylabel="this run"
        )
        axes.set_xticks(range(len(names)), [str(i + 1) for i in range(len(names))])
        rows = [str(i + 1) if small else f"{_label(name)}  {i + 1}" for i, name in enumerate(names)]
        axes.set_yticks(range(len(names)), rows)
        axes.tick_params(length=0)
        axes.xaxis.set_ticks_position("top")
        axes.xaxis.set_label_position("top")
        for spine in axes.spines.values():
            spine.set_visible(False)

    words = "; ".join(
        f"{v.a} minus {v.b}: {100 * v.difference.difference:+.2f} points, p {probability(v.p_adjusted)}"
        for v in r.pairs
    )
    side = 0.62 if len(names) <= MANY else 0.3
    return Picture("pairwise", f"Every two runs. {words}", (6.6, 0.9 + side * len(names)), on_axes(draw))


def what(r: Ranking) -> str:
    """Say what is ranked by, in words."""
    target = "" if r.target is None else f"{100 * r.target:g} %"
    return f"{r.cell} {STATISTICS[r.by].words.format(target)}"


def probability(p: float) -> str:
    """Write a p-value with two significant digits."""
    return f"{p:.2g}"


def _square(x: int, y: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=colour, lw=0)


def _lines(r: Ranking) -> dict[str, tuple[str, Any]]:
    return {
        _label(run.name): (COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)])
        for i, run in enumerate(r.runs)
    }


def _label(name: str) -> str:
    """Fit a name beside a picture: a long one loses its middle, and no dollar sign starts mathematics."""
    cut = name if len(name) <= LONGEST else f"{name[: LONGEST // 2 - 1]}…{name[-LONGEST // 2 :]}"
    return cut.replace("$", r"\$")
