"""Run the demo (pkd-demo): from training to a verified pair over HTTP in minutes, offline."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pkd.toolkit.core.cli_options import run_command
from pkd.toolkit.core.cli_support import Result
from pkd.toolkit.core.errors import MissingExtra
from pkd.toolkit.core.tables import show_table
from pkd.toolkit.demo.run import DemoConfig, Outcome, run_demo, summary

EXAMPLES = """
  pkd-demo                                      synthetic people, offline, under five minutes on two cores
  pkd-demo --faces crops/ --teacher teacher.onnx --teacher-preprocess mean=127.5,std=127.5 --minutes 20 --out mine
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pkd-demo``; returns the exit code."""
    return run_command(
        "pkd-demo",
        "Run the other commands as you would: train a teacher, distil a student that is at least four times smaller, "
        "evaluate both beside an undistilled control, export, serve, and match queries of the student against the "
        "teacher's gallery over HTTP. Prints each command line. Writes OUT/report.html and OUT/demo.png. The people "
        "are synthetic drawings unless you give --faces and --teacher.",
        EXAMPLES,
        DemoConfig,
        _demo,
        argv,
    )


def _demo(config: DemoConfig, console: Console) -> Result:
    for package, extra in (("torch", "train"), ("matplotlib", "train"), ("onnx", "export"), ("fastapi", "serve")):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, extra)
    outcome = run_demo(config, console)
    figures = summary(outcome)
    _show(outcome, figures, config.out, console)
    return figures


def _show(outcome: Outcome, figures: Result, out: Path, console: Console) -> None:
    table = Table(title="Queries of the student against the teacher's gallery, over HTTP", title_justify="left")
    for heading in ("query and gallery show", "queries", "matched", "rate", "certificate says"):
        table.add_column(heading, justify="left" if heading == "query and gallery show" else "right", no_wrap=True)
    for row, label in (("genuine", "the same person"), ("impostor", "another person")):
        counted = figures[row]
        low, high = counted["expected_ci95"]
        table.add_row(
            label,
            f"{counted['queries']:,}",
            f"{counted['matched']:,}",
            f"{100 * counted['rate']:.1f} %",
            f"{100 * counted['expected']:.1f} % ({100 * low:.1f}–{100 * high:.1f})",
        )
    console.print()
    if outcome.synthetic:
        console.print("[bold]Synthetic faces: these rates say nothing about people.[/bold]")
    show_table(console, table)
    sizes = figures["bytes"]
    counts = figures["parameters"]
    if "teacher" in counts:
        times = counts["teacher"] / counts["student"]
        console.print(
            f"student {counts['student']:,} parameters, teacher {counts['teacher']:,}: {times:.1f} times smaller"
        )
    else:
        console.print(f"student {sizes['student'] / 1e6:.1f} MB, teacher {sizes['teacher'] / 1e6:.1f} MB")
    console.print(f"threshold {figures['threshold']:.3f} for a false match rate of {figures['target_fmr']:g}")
    console.print(
        f"{figures['seconds']['total']:.0f} s in all; report: {out / 'report.html'}, picture: {out / 'demo.png'}"
    )


if __name__ == "__main__":
    sys.exit(main())
