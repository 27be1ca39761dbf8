"""pkd-compare: rank evaluations over the same pairs, with paired intervals and p-values."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pkd.toolkit.core.cli_support import Result, make_parser, run
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.comparison.compare import rank
from pkd.toolkit.evaluation.comparison.load import read_runs
from pkd.toolkit.evaluation.comparison.ranking import Ranking
from pkd.toolkit.evaluation.comparison.statistics import STATISTICS
from pkd.toolkit.evaluation.report.compare_page import render_ranking, verdict, write_ranking_figures
from pkd.toolkit.evaluation.report.compare_plots import probability, what
from pkd.toolkit.evaluation.report.drawing import require_plots
from pkd.toolkit.evaluation.report.html import points

EXAMPLES = """
  pkd-compare runs/l2kd/evaluation runs/proxylesskd/evaluation --out comparison
  pkd-compare plain=eval-a "with margin=eval-b" --cell S-T --fmr 1e-3 --out comparison
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``pkd-compare``."""
    parser = make_parser(
        "pkd-compare",
        "Rank folders that pkd-evaluate wrote over the same pairs, and say of every two whether one beats the other: "
        "difference, 95 % interval and p-value over the same drawn people. Writes OUT/compare.html, OUT/compare.json "
        "and OUT/figures.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="EVAL", help="folder of pkd-evaluate, or NAME=FOLDER")
    add("--by", choices=STATISTICS, help="what to rank by (tar; for pair lists accuracy)")
    add("--cell", metavar="Q-G", help="ordered pair to rank by: S-T, T-T, S-S … (S-T, or T-T without a student)")
    add("--fmr", type=float, metavar="F", help="FMR, or FPIR of fnir, to rank at (the smallest that all runs resolve)")
    add("--out", type=Path, required=True, metavar="OUT", help="folder to write")
    return run(parser, compare, argv)


def compare(args: argparse.Namespace, console: Console) -> Result:
    """Rank, write and show; returns what ``--json`` prints."""
    require_plots()
    out: Path = args.out
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file. Give a folder with --out.")
    if (out / "report.json").exists():
        raise InputError(f"{out}: is the folder of an evaluation. Give another --out.")
    found = rank(read_runs(args.runs), by=args.by, cell=args.cell, at=args.fmr)
    page = render_ranking(found)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (out / "compare.html").write_text(page, encoding="utf-8")
    write_ranking_figures(found, out / "figures")
    _show(console, found, out)
    summary: dict[str, Any] = found.model_dump(mode="json", exclude={"runs": {"__all__": {"comparison"}}})
    return {"out": str(out), "verdict": verdict(found), **summary}


def _show(console: Console, r: Ranking, out: Path) -> None:
    if r.synthetic:
        console.print("[bold]Synthetic faces: these rates say nothing about people.[/bold]")
    table = Table(title=f"{what(r)}, % with 95 % interval", title_justify="left")
    for heading in ("", "run", "identities alike" if r.runs[0].raw else r.by, "raw", "minus the best", "p"):
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
    console.print(table)
    console.print(verdict(r), markup=False)
    console.print(f"page: {out / 'compare.html'}")
