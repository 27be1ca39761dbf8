"""Draw figures as inline SVG for a page and as PNG files. matplotlib is imported when one is drawn."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkd.toolkit.core.errors import MissingExtra

GENUINE, IMPOSTOR = "#0f766e", "#b91c1c"
INK, SOFT, FAINT = "#334155", "#64748b", "#cbd5e1"
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
PNG_DPI = 200


@dataclass(frozen=True)
class Picture:
    """Say what to draw, in which size and under which name. Drawing touches no global state of matplotlib."""

    name: str
    """Stem of the PNG's name, and part of every id in the SVG: unique within a page."""
    words: str
    """Description of the figure, for those who cannot see it."""
    size: tuple[float, float]
    """Inches."""
    draw: Callable[[Any], None]
    """Function that draws into a matplotlib Figure."""


def on_axes(draw: Callable[[Any], None]) -> Callable[[Any], None]:
    """Make a ``Picture.draw`` of one pair of axes."""

    def draw_figure(figure: Any) -> None:
        axes = figure.subplots()
        axes.set_axisbelow(True)
        draw(axes)

    return draw_figure


def require_plots() -> None:
    """Raise MissingExtra without matplotlib, before minutes are spent on what cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("matplotlib", "evaluate") from None


def draw(pictures: Mapping[str, Picture], folder: Path | None = None) -> dict[str, str]:
    """Draw each picture as an ``<svg>`` element that scales with its surroundings and whose text stays text.

    ``folder`` gets each as ``<name>.png``, too, on white, ``PNG_DPI`` dots an inch; PNG files there before are removed.
    Raises MissingExtra without matplotlib.
    """
    require_plots()
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.png"):
            stale.unlink()
    return {key: _draw(picture, folder) for key, picture in pictures.items()}


def _draw(picture: Picture, folder: Path | None) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context({**STYLE, "svg.hashsalt": f"pkd {picture.name}"}):
        figure = Figure(figsize=picture.size)
        FigureCanvasAgg(figure)
        picture.draw(figure)
        # Found once. A figure that has a layout engine is drawn twice for each file.
        ConstrainedLayoutEngine().execute(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    if folder:
        with rc_context({**STYLE, "font.sans-serif": ["DejaVu Sans"]}):
            path = folder / f"{picture.name}.png"
            figure.savefig(path, format="png", dpi=PNG_DPI, facecolor="#ffffff", metadata={"Software": None})
    return _for_page(buffer.getvalue(), picture)


def _for_page(svg: str, picture: Picture) -> str:
    """Turn a whole SVG file into an element whose ids no other picture of the page has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bd="[^"]*"', _coarser, svg)
    # Two figures of one page must not share an id: a clip path of one would cut the other.
    svg = re.sub(r'\bid="', f'id="{picture.name}-', svg)
    svg = svg.replace("url(#", f"url(#{picture.name}-").replace('href="#', f'href="#{picture.name}-')
    opening = f'<svg role="img" aria-label="{html.escape(picture.words)}" '
    return re.sub(r'^<svg width="[^"]*" height="[^"]*"|^<svg ', lambda _: opening, svg, count=1)


def _coarser(path: re.Match[str]) -> str:
    """Round a path to a hundredth of a point, which is finer than any screen or printer."""
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", path.group())
