"""Show accuracy against size: students of several sizes, made and trained alike, each as float32 and as 8-bit file.

Run as: python benchmarks/sizes.py [RUNS] [--rows NAME ...]

RUNS is the folder of the trainings (runs/students); one that is there is measured and not trained again. Each student
is MobileFaceNet Y1 behind its map, shrunk to the size of the row, then trained for 300 steps of 128 of 10,000 images
of train.txt, and exported with 8-bit weights and 16-bit activations (pkd-export --precision w8a16). Ten to fifteen
minutes of one core a row. It needs PKD_SHARED, and writes benchmarks/results/sizes.json and the table of
docs/adoption.md; --page writes the table alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from real_faces import ROOT, SHARED, markdown_table, prose
from students import Places, Report, Row, adopted, arguments, drawn, put, trained, write

from pkd.export.cli import main as export
from pkd.toolkit.distill.models.open_encoder import open_encoder
from pkd.toolkit.distill.models.student import load_student

RESULTS = ROOT / "benchmarks" / "results" / "sizes.json"
PICTURE = ROOT / "docs" / "images" / "sizes.svg"
TARGETS = {"float32": "onnxruntime-fp32", "w8a16": "onnxruntime-w8a16"}
BUDGET = (
    "--method", "infonce", "--steps", "300", "--batch", "128", "--no-mirror", "--ema", "0.99",
    "--threads", "1",
)  # fmt: skip


SOME = drawn(10_000, seed=1)


def shrunk(parameters: int, rank: int) -> Row:
    """Make a row of a shrunk student, whose last three quarters are frozen and whose rate is higher."""
    return Row(
        ("--shrink", str(parameters), "--map-rank", str(rank), "--freeze", "0.75", "--lr", "3e-3", *BUDGET), SOME
    )


ROWS = {
    "whole": Row(("--freeze", "0.9", "--lr", "2e-3", *BUDGET), SOME),
    "0.70 M": shrunk(700_000, 128),
    "0.39 M": shrunk(390_000, 96),
    "0.20 M": shrunk(200_000, 64),
    "0.08 M": shrunk(80_000, 32),
}


def main() -> int:
    """Train what is missing, export, measure, and write the JSON and the table."""
    args = arguments(__doc__, ROWS)
    if args is None:
        return 0
    if args.page:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        put("sizes", text(results))
        draw(results)
        return 0
    runs = trained(args, ROWS, adopted())
    if not args.train_only:
        places = Places()
        rows = [measured(places, name, run) for (name, _), run in runs.items()]
        results = {"rows": rows, **places.size()}
        write(results, RESULTS, text)
        draw(results)
    return 0


def measured(places: Places, name: str, run: Path) -> Report:
    """Export both files and measure each."""
    bundle = run.with_name(f"{run.name}-bundle")
    if not bundle.is_dir():
        calibration = SHARED / "faces" / "splits" / "train.txt"
        options = ["--precision", "fp32", "w8a16", "--calib", str(calibration)]
        if export([str(run), "-o", str(bundle), *options]):
            raise SystemExit(f"pkd-export failed for {run.name}")
    training = load_student(run).training
    report: Report = {key: training.get(key) for key in ("method", "images", "identities", "parameters", "steps")}
    for kind, target in TARGETS.items():
        encoder = open_encoder(str(bundle / "targets" / target))
        report[kind] = {
            "bytes": (bundle / "targets" / target / "encoder.onnx").stat().st_size,
            **places.encoder(encoder, f"{name}, {kind}", parts=("test",)),
        }
    return report


def text(results: Report) -> str:
    """Write what the rows are, and the rows."""
    rows = results["rows"]
    said = prose(
        f"MobileFaceNet Y1 behind its map, whole and shrunk, trained by `infonce` for {rows[0]['steps']:,} steps of "
        f"128 of {rows[0]['images']:,} images of {rows[0]['identities']:,} people: the same small budget for each. TAR "
        f"at FMR 1e-3 on test.txt ({results['test_images']:,} images of {results['people']:,} people), every identity "
        "weighing the same, with 95 % identity-level bootstrap intervals; one seed. The 8-bit file has int8 weights "
        "and 16-bit activations (`--precision w8a16`)."
    )
    lines = [
        (
            f"{row['parameters']:,}",
            f"{row['float32']['bytes'] / 1e6:.2f} MB", rate(row["float32"], "S–T"), rate(row["float32"], "S–S"),
            f"{row['w8a16']['bytes'] / 1e6:.2f} MB", rate(row["w8a16"], "S–T"), rate(row["w8a16"], "S–S"),
        )
        for row in rows
    ]  # fmt: skip
    head = ("parameters", "float32", "S–T", "S–S", "w8a16", "S–T", "S–S")
    return f"{said}\n\n{markdown_table(head, lines)}"


def draw(results: Report) -> None:
    """Draw S–T TAR at FMR 1e-3 against the size of the file, float32 and 8-bit."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "pkd"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for kind, colour in (("float32", "#0b63c5"), ("w8a16", "#b45309")):
        points = sorted((row[kind]["bytes"] / 1e6, row[kind]["test"]["S–T"]) for row in results["rows"])
        sizes = [size for size, _ in points]
        found = [rates["tar"]["0.001"] for _, rates in points]
        bars = [[abs(rates["interval"]["0.001"][end] - rates["tar"]["0.001"]) for _, rates in points] for end in (0, 1)]
        axes.errorbar(sizes, found, bars, marker="o", capsize=2, color=colour, label=kind)
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    axes.minorticks_off()
    axes.set_xlabel("size of the file, MB")
    axes.set_ylabel("S–T TAR at FMR 1e-3")
    axes.grid(color="#e2e8f0")
    axes.legend(loc="lower right")
    figure.savefig(PICTURE, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def rate(report: Report, pair: str) -> str:
    """Write a rate at FMR 1e-3 with its interval."""
    low, high = report["test"][pair]["interval"]["0.001"]
    return f"{report['test'][pair]['tar']['0.001']:.3f} ({low:.3f}–{high:.3f})"


if __name__ == "__main__":
    raise SystemExit(main())
