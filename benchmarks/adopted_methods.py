"""Compare the methods that put a student into the teacher's space, all from the same adopted start, at equal budget.

Run as: python benchmarks/adopted_methods.py [RUNS] [--rows NAME ...] [--seeds 3] [--missing]

RUNS is the folder of the trainings (runs/students); one that is there is measured and not trained again. The start is
MobileFaceNet Y1, shrunk to 0.39 M parameters behind its map (`pkd-distill --method map --shrink`): a student that is
weak enough for the loss to matter. Every row then trains the last quarter of its arithmetic by pkd-distill for 300
steps of 128 images of train.txt; only the loss differs. About seven minutes of one core for the start, six for the
first row, which fills the cache, three for every other. It needs PKD_SHARED, and writes
benchmarks/results/adopted_methods.json and the table of docs/adoption.md; --page writes the table alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from real_faces import ROOT, prose
from students import Report, Row, everybody, listed, shrunk, table, table_of_runs

from pkd.toolkit.data.face_set import FaceSet

RESULTS = ROOT / "benchmarks" / "results" / "adopted_methods.json"
BUDGET = (
    "--steps", "300", "--batch", "128", "--freeze", "0.75", "--no-mirror", "--ema", "0.99",
    "--threads", "1", "--lr", "3e-3", "--map-rank", "512",
)  # fmt: skip
MANY = 10
"""Photographs that a person of the rows "people with many photographs" has at least. Nobody is held out there, so that
one that loses against the map is shown all the same."""


def many(runs: Path) -> Path:
    """Write the list of the training images of people with ``MANY`` photographs or more."""
    faces = FaceSet.read(everybody())
    count = np.bincount(faces.labels, minlength=len(faces.identities))
    kept = np.flatnonzero(count[faces.labels] >= MANY)
    return listed(faces, kept, runs, "many.txt")


ROWS = {
    "l2kd": Row(("--method", "l2kd"), seeds=3),
    "infonce": Row(("--method", "infonce"), seeds=3),
    "infonce, 1,900 steps, low-rank last layer": Row(
        ("--method", "infonce", "--steps", "1900", "--ema", "0.999", "--map-rank", "96")
    ),
    "infonce+l2kd:5": Row(("--method", "infonce+l2kd:5")),
    "infonce+raml:5": Row(("--method", "infonce+raml:5")),
    "raml": Row(("--method", "raml"), seeds=3),
    "csd": Row(("--method", "csd"), seeds=3),
    "d3still": Row(("--method", "d3still"), seeds=3),
    "proxylesskd": Row(("--method", "proxylesskd"), seeds=3),
    "proxylesskd, scale 16": Row(("--method", "proxylesskd", "--scale", "16")),
    "proxylesskd, softmax": Row(("--method", "proxylesskd", "--margin", "softmax")),
    "proxylesskd, softmax, scale 16": Row(("--method", "proxylesskd", "--margin", "softmax", "--scale", "16")),
    "proxylesskd, fitted head": Row(("--method", "proxylesskd", "--head", "fit")),
    "proxylesskd, a centre per image": Row(("--method", "proxylesskd", "--head", "images")),
    "proxylesskd, softmax, scale 16, a centre per image": Row(
        ("--method", "proxylesskd", "--margin", "softmax", "--scale", "16", "--head", "images"), seeds=3
    ),
    "proxylesskd+l2kd": Row(("--method", "proxylesskd+l2kd:30")),
    "kd": Row(("--method", "kd")),
    "adadistill": Row(("--method", "adadistill")),
    "margindistillation": Row(("--method", "margindistillation")),
    "l2kd+rkd": Row(("--method", "l2kd+rkd")),
    "l2kd+cckd": Row(("--method", "l2kd+cckd")),
    "l2kd, people with many photographs": Row(("--method", "l2kd", "--held-out", "0"), many),
    "proxylesskd, people with many photographs": Row(("--method", "proxylesskd", "--held-out", "0"), many),
}


def main() -> int:
    """Train what is missing, measure, and write the JSON and the table."""
    return table_of_runs(__doc__, ROWS, lambda runs: (*shrunk(runs), *BUDGET), "start", RESULTS, text)


def text(results: Report) -> str:
    """Write what the rows are, and the rows in order of their TAR on val.txt."""
    rows = results["rows"]
    start, one = rows[0], next(row for row in rows if row["row"] == "l2kd")
    said = prose(
        f"Every row begins with the same student: MobileFaceNet Y1, shrunk to {start['parameters']:,} parameters "
        f"behind its map ({one['parameters']:,} when its last layer is whole and batch normalisation is back). It "
        f"trains the last quarter of its arithmetic for {one['steps']:,} steps of 128 images of train.txt "
        f"({one['images']:,} images of {one['identities']:,} people after a tenth of the people was held out). TAR at "
        f"FMR 1e-3 on test.txt ({results['test_images']:,} images of {results['people']:,} people), every identity "
        "weighing the same: the mean over the seeds with the least and the greatest, or of one seed with its 95 % "
        "identity-level bootstrap interval. Margin ArcFace 0.5, scale 64 and the head `means` where a row does not say "
        f"otherwise; many photographs are {MANY} or more."
    )
    return f"{said}\n\n{table(rows, 'loss')}"


if __name__ == "__main__":
    raise SystemExit(main())
