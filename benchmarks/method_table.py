"""Every method on the shared split at one modest budget: S–T and S–S with intervals.

Run as: python benchmarks/method_table.py                       (all rows, about 9 minutes of one core each)
        python benchmarks/method_table.py --rows l2kd kd        (these rows; the others come from the last results)

Teacher: EdgeFace-XS, which has no classifier; so the head is `means` unless a row says otherwise. It runs the commands
that a user runs, resumes an unfinished training, and writes benchmarks/results/method_table.json. It needs PKD_SHARED.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from real_faces import EDGEFACE, ROOT, SHARED, Report, command, markdown_table, prose, row

from pkd.toolkit.distill.losses.registry import WeightedSum
from pkd.toolkit.distill.models.student import load_student

RESULTS = ROOT / "benchmarks" / "results" / "method_table.json"

ROWS: dict[str, list[str]] = {
    "none, ArcFace": ["--method", "none"],
    "none, CosFace": ["--method", "none", "--margin", "cosface:0.35"],
    "l2kd": ["--method", "l2kd"],
    "infonce": ["--method", "infonce"],
    "raml": ["--method", "raml"],
    "csd": ["--method", "csd"],
    "d3still": ["--method", "d3still"],
    "kd": ["--method", "kd"],
    "proxylesskd, ArcFace": ["--method", "proxylesskd"],
    "proxylesskd, straight-through": ["--method", "proxylesskd", "--gradient", "straight-through"],
    "margindistillation": ["--method", "margindistillation"],
    "adadistill": ["--method", "adadistill"],
    "fitnets": ["--method", "fitnets"],
    "at": ["--method", "at"],
    "fsp": ["--method", "fsp"],
    "rkd": ["--method", "rkd"],
    "cckd": ["--method", "cckd"],
    "proxylesskd+l2kd": ["--method", "proxylesskd+l2kd:30"],
}
BUDGET = [
    "--student", "mobilefacenet-relu:0.5", "--steps", "600", "--batch", "64", "--lr", "0.02", "--augment", "0.1",
    "--precision", "fp32", "--threads", "1", "--seed", "0",
]  # fmt: skip


def main() -> int:
    """Train and evaluate the rows asked for, then write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "table", help="trainings and evaluations")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    args = parser.parse_args()
    if not (SHARED / "faces").is_dir():
        print(f"skipped: no photographs in {SHARED}. Set PKD_SHARED to the folder that holds faces/ and models/.")
        return 0
    teacher = (str(SHARED / "models" / EDGEFACE[0]), EDGEFACE[1])
    for name in args.rows:
        run = args.out / name.replace(", ", "-").replace(" ", "-")
        measured = distil_and_evaluate(run, teacher, [*BUDGET, *ROWS[name]])
        found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        found[name] = measured
        ordered = {each: found[each] for each in ROWS if each in found}
        RESULTS.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")
    return 0


def distil_and_evaluate(run: Path, teacher: tuple[str, str | None], options: list[str]) -> Report:
    """Train into ``run`` and evaluate on test.txt, each unless it is there. ``teacher``: its spec and preprocessing."""
    splits = SHARED / "faces/splits"
    opened = ["--teacher", teacher[0], *(["--teacher-preprocess", teacher[1]] if teacher[1] else [])]
    if not (run / "student.pt").is_file():
        resume = ["--resume"] if (run / "checkpoint.pt").is_file() else []
        faces = ["--faces", str(splits / "train.txt"), "--unlabelled", str(splits / "train_unlabelled.txt")]
        command("pkd-distill", *opened, *faces, *options, "--out", str(run), *resume)
    training = dict(load_student(run).training)
    own = [] if WeightedSum.parse(str(training["method"])).aligns else ["--any-space"]
    if not (run / "evaluation" / "report.json").is_file():
        test = ["--student", str(run), "--faces", str(splits / "test.txt"), *own]
        command("pkd-evaluate", *opened, *test, "--out", str(run / "evaluation"))
    report = json.loads((run / "evaluation" / "report.json").read_text(encoding="utf-8"))
    kept = ("genuine_identities", "genuine_pairs", "impostor_pairs", "eer", "points")
    return {
        "training": training,
        "agreement": report["agreement"],
        "data": report["data"],
        "comparisons": {c["name"]: {key: c[key] for key in kept} for c in report["comparisons"]},
    }


def table(results: dict[str, Report]) -> str:
    """Write the section of docs/performance.md."""
    one = next(iter(results.values()))
    pairs = one["comparisons"]["S–T"]
    text = prose(
        f"Teacher EdgeFace-XS, student `{one['training']['backbone']}` ({one['training']['parameters']:,} parameters), "
        f"{one['training']['steps']:,} steps of {one['training']['batch']} images, one seed, nothing tuned for a row. "
        f"TAR on test.txt ({one['data']['images']:,} images of {one['data']['identities']:,} people, "
        f"{pairs['genuine_pairs']:,} genuine and {pairs['impostor_pairs']:,} impostor pairs), every identity weighing "
        "the same, with 95 % identity-level bootstrap intervals; the last column is the raw TAR, in which two people "
        "hold half of the genuine pairs. fitnets, at, fsp, rkd and cckd stand beside the student's own classifier, as "
        "published: they leave it in a space of its own, so their S–T is chance by design. The head is `means`, the "
        "margin ArcFace 0.5 at scale 64 where a row does not say otherwise."
    )
    rows = [("teacher", "T–T", *points(one["comparisons"]["T–T"]), "")]
    for name, result in results.items():
        for pair in ("S–T", "S–S"):
            comparison = result["comparisons"][pair]
            raw = next((f"{p['tar']:.3f}" for p in comparison["points"] if abs(p["fmr"] / 1e-2 - 1) < 1e-6), "")
            rows.append((name, pair, *points(comparison), raw))
    return f"{text}\n\n{markdown_table(('method', 'query–gallery', 'FMR 1e-2', 'FMR 1e-3', 'raw, 1e-2'), rows)}"


def points(comparison: Report) -> tuple[str, ...]:
    """Identity-balanced TAR at FMR 1e-2 and 1e-3 with its interval."""
    return row("", "", comparison, "tar_balanced")[2:4]


if __name__ == "__main__":
    sys.exit(main())
