"""Draw how misses fall where the photographs of least quality are discarded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pkd.toolkit.evaluation.report.drawing import SOFT, Picture, on_axes
from pkd.toolkit.evaluation.results.schema import Discard

COLOURS = {
    "sharpness": "#0b63c5",
    "exposure": "#b45309",
    "inter_eye": "#0f766e",
    "yaw": "#a21caf",
    "pitch": "#6d28d9",
    "roll": "#4d7c0f",
    "occlusion": "#9f1239",
}


def discard_pictures(discards: Sequence[Discard]) -> list[Picture]:
    """Draw one figure for each encoder pair, a line for each measure."""
    names = dict.fromkeys(one.name for one in discards)
    return [_picture(name, [one for one in discards if one.name == name]) for name in names]


def _picture(name: str, curves: Sequence[Discard]) -> Picture:
    def draw(axes: Any) -> None:
        for one in curves:
            at = [100 * share for share in one.fractions]
            axes.plot(at, [100 * rate for rate in one.fnmr], color=COLOURS[one.measure], lw=2, label=one.measure)
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
