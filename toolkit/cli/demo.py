"""pkd-demo: from training to a verified pair over HTTP in minutes, offline. Run as: pkd-demo --out demo"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pkd.toolkit.core.cli_support import Result, make_parser, run
from pkd.toolkit.core.errors import MissingExtra
from pkd.toolkit.demo.run import OWN_MINUTES, STEPS, DemoConfig, Outcome, run_demo, summary

EXAMPLES = """
  pkd-demo                                      synthetic people, offline, under five minutes on two cores
  pkd-demo --faces crops/ --teacher teacher.onnx --teacher-preprocess mean=127.5,std=127.5 --minutes 20 --out mine
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``pkd-demo``; returns the exit code."""
    parser = make_parser(
        "pkd-demo",
        "Run the other commands as you would: train a teacher, distil a student that is at least four times smaller, "
        "evaluate both beside an undistilled control, export, serve, and match queries of the student against the "
        "teacher's gallery over HTTP. Prints each command line. Writes OUT/report.html and OUT/demo.png. The people "
        "are synthetic drawings unless you give --faces and --teacher.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("--out", type=Path, default=DemoConfig.out, metavar="DIR", help="folder to write (demo)")
    add("--faces", type=Path, metavar="DIR|LIST", help="your aligned crops, one folder per person (pkd-align)")
    add("--teacher", metavar="SPEC", help="your teacher: FILE.onnx, FILE.pt, insightface:PACK, a bundle or a run")
    add("--teacher-preprocess", metavar="P", help="of FILE.onnx or FILE.pt, for example mean=127.5,std=127.5")
    add("--minutes", type=float, metavar="M", help=f"of training, with your own faces ({OWN_MINUTES:g})")
    add("--port", type=int, default=DemoConfig.port, metavar="N", help="of the server; 0 picks a free one (0)")
    size = parser.add_argument_group("size of the synthetic demo")
    size.add_argument("--identities", type=int, default=DemoConfig.identities, metavar="N", help="people (%(default)s)")
    size.add_argument("--images", type=int, default=DemoConfig.images, metavar="N", help="of each (%(default)s)")
    usual = ", ".join(f"{role} {count}" for role, count in STEPS.items())
    size.add_argument("--steps", type=int, metavar="N", help=f"optimiser steps of each training ({usual})")
    return run(parser, _demo, argv)


def _demo(args: argparse.Namespace, console: Console) -> Result:
    for package, extra in (("torch", "train"), ("matplotlib", "train"), ("onnx", "export"), ("fastapi", "serve")):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, extra)
    config = DemoConfig(**{name: value for name, value in vars(args).items() if name != "json"})
    outcome = run_demo(config, console)
    told = summary(outcome)
    _show(outcome, told, config.out, console)
    return told


def _show(outcome: Outcome, told: Result, out: Path, console: Console) -> None:
    table = Table(title="Queries of the student against the teacher's gallery, over HTTP", title_justify="left")
    for heading in ("at the door", "queries", "matched", "rate", "certificate says"):
        table.add_column(heading, justify="left" if heading == "at the door" else "right", no_wrap=True)
    for row, label in (("genuine", "the same person"), ("impostor", "another person")):
        counted = told[row]
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
    console.print(table)
    sizes = told["bytes"]
    counts = told["parameters"]
    if "teacher" in counts:
        times = counts["teacher"] / counts["student"]
        console.print(
            f"student {counts['student']:,} parameters, teacher {counts['teacher']:,}: {times:.1f} times smaller"
        )
    else:
        console.print(f"student {sizes['student'] / 1e6:.1f} MB, teacher {sizes['teacher'] / 1e6:.1f} MB")
    console.print(f"threshold {told['threshold']:.3f} for a false match rate of {told['target_fmr']:g}")
    console.print(
        f"{told['seconds']['total']:.0f} s in all; report: {out / 'report.html'}, picture: {out / 'demo.png'}"
    )


if __name__ == "__main__":
    sys.exit(main())
