"""Run pkd-compare: rank evaluations over the same pairs, with paired intervals and p-values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.table import Table

from pkd.toolkit.core.cli_options import Argument, Options, run_command
from pkd.toolkit.core.cli_support import Result
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.results_folder import replaced
from pkd.toolkit.core.tables import show_table
from pkd.toolkit.evaluation.comparison.compare import Ranking, rank
from pkd.toolkit.evaluation.comparison.load import read_runs
from pkd.toolkit.evaluation.report.compare_plots import probability, what
from pkd.toolkit.evaluation.report.drawing import require_plots
from pkd.toolkit.evaluation.report.page import points
from pkd.toolkit.evaluation.report.reports import render_ranking, verdict

RESULTS = ("compare.json", "compare.html", "figures/*.png")
"""Files that a comparison consists of."""
EXAMPLES = """
  pkd-compare runs/l2kd/evaluation runs/proxylesskd/evaluation --out comparison
  pkd-compare plain=eval-a "with margin=eval-b" --cell S-T --fmr 1e-3 --out comparison
"""


class CompareOptions(Options):
    """Hold what pkd-compare was asked for."""

    runs: Annotated[tuple[str, ...], Argument("EVAL", positional=True)] = ()
    """Folder of pkd-evaluate, or NAME=FOLDER; two or more."""
    by: Literal["tar", "accuracy", "rank-1", "fnir"] | None = None
    """Statistic to rank by: tar, or accuracy for pair lists."""
    cell: Annotated[str | None, Argument("Q-G")] = None
    """Ordered encoder pair to rank by: S-T, T-T, S-S …; S-T, or T-T without a student."""
    fmr: Annotated[float | None, Argument("F")] = None
    """Target FMR, or FPIR of fnir, a fraction; the smallest that all runs resolve."""
    out: Annotated[Path, Argument("OUT")]
    """Folder for the page, its figures and compare.json."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pkd-compare``; returns the exit code."""
    return run_command(
        "pkd-compare",
        "Rank folders that pkd-evaluate wrote over the same pairs, and say of every two whether one beats the other: "
        "difference, 95 % interval and p-value over the same drawn people. Writes OUT/compare.html, OUT/compare.json "
        "and OUT/figures.",
        EXAMPLES,
        CompareOptions,
        compare,
        argv,
    )


def compare(options: CompareOptions, console: Console) -> Result:
    """Rank, write and show; returns what ``--json`` prints."""
    require_plots()
    out = options.out
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file. Give a folder with --out.")
    if (out / "report.json").exists():
        raise InputError(f"{out}: is the folder of an evaluation. Give another --out.")
    found = rank(read_runs(options.runs), by=options.by, cell=options.cell, at=options.fmr)
    with replaced(out, RESULTS) as new:
        (new / "compare.html").write_text(render_ranking(found, new / "figures"), encoding="utf-8")
        (new / "compare.json").write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    _show(console, found, out)
    summary: dict[str, Any] = found.model_dump(mode="json", exclude={"runs": {"__all__": {"comparison"}}})
    return {"out": str(out), "verdict": verdict(found), **summary}


def _show(console: Console, r: Ranking, out: Path) -> None:
    if r.synthetic:
        console.print("[bold]Synthetic faces: these rates say nothing about people.[/bold]")
    table = Table(title=f"{what(r)}, % with 95 % interval", title_justify="left")
    for heading in ("", "run", "macro (balanced)" if r.runs[0].raw else r.by, "micro (raw)", "minus the best", "p"):
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=heading != "run")
    for place, ranked in enumerate(r.runs, 1):
        first, raw, behind = ranked.first, ranked.raw, ranked.behind_best
        table.add_row(
            str(place),
            ranked.name,
            f"{100 * first.value:.1f} ({100 * first.ci95[0]:.1f}–{100 * first.ci95[1]:.1f})",
            f"{100 * raw.value:.1f}" if raw else "",
            f"{points(behind.difference)} ({points(behind.ci95[0])} to {points(behind.ci95[1])})" if behind else "best",
            probability(ranked.p_adjusted) if ranked.p_adjusted is not None else "",
        )
    show_table(console, table)
    console.print(verdict(r), markup=False)
    console.print(f"page: {out / 'compare.html'}")
