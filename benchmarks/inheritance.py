"""The paper's central case: a teacher that has its classifier, and students that inherit it, or do without.

Run as: python benchmarks/inheritance.py       (about 8 minutes of one core for the teacher, 4 for each student)

Public teachers carry no classifier. So a small teacher is trained here with its own (`--method none` on train.txt, on
from the weights of runs/methods/l2kd-continued, which benchmarks/real_faces.py trains). Students half its width then
learn from it by ProxylessKD over three heads (its own classifier, class means of its embeddings, a classifier fitted to
them) and, for comparison, by l2kd. Writes benchmarks/results/inheritance.json. It needs PKD_SHARED.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from method_table import distil_and_evaluate, points
from real_faces import ROOT, SHARED, Report, command, markdown_table, prose

from pkd.toolkit.distill.models.student import load_student

RESULTS = ROOT / "benchmarks" / "results" / "inheritance.json"
LOSS = ["--margin", "cosface:0.2", "--scale", "32"]
COMMON = ["--batch", "64", "--augment", "0.1", "--precision", "fp32", "--threads", "1", "--seed", "0"]
TEACHER = ["--student", "mobilefacenet-relu:0.5", "--method", "none", "--steps", "500", "--lr", "0.01", *LOSS, *COMMON]
STUDENT = ["--student", "mobilefacenet-relu:0.25", "--steps", "400", "--lr", "0.02", *LOSS, *COMMON]
ROWS = {
    "proxylesskd, its own classifier": ["--method", "proxylesskd", "--head", "auto"],
    "proxylesskd, class means": ["--method", "proxylesskd", "--head", "means"],
    "proxylesskd, fitted head": ["--method", "proxylesskd", "--head", "fit"],
    "l2kd": ["--method", "l2kd"],
}


def main() -> int:
    """Train the teacher and the rows asked for, then write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="trainings and evaluations")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    args = parser.parse_args()
    if not (SHARED / "faces").is_dir():
        print(f"skipped: no photographs in {SHARED}. Set PKD_SHARED to the folder that holds faces/ and models/.")
        return 0
    teacher = args.out / "inheritance" / "teacher"
    start = args.out / "methods" / "l2kd-continued"
    if not (teacher / "student.pt").is_file():
        resume = ["--resume"] if (teacher / "checkpoint.pt").is_file() else []
        faces = ["--faces", str(SHARED / "faces/splits/train.txt")]
        command("pkd-distill", *faces, "--init", str(start), *TEACHER, "--out", str(teacher), *resume)
    for name in args.rows:
        run = args.out / "inheritance" / name.replace(", ", "-").replace(" ", "-")
        measured = distil_and_evaluate(run, (str(teacher), None), [*STUDENT, *ROWS[name]])
        measured["teacher_parameters"] = load_student(teacher).training["parameters"]
        audit = json.loads((run / "audit.json").read_text(encoding="utf-8"))
        measured["audit"] = {key: audit[key] for key in ("classes", "audited_images", "mean_cosine", "top1")}
        found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        found[name] = measured
        ordered = {each: found[each] for each in ROWS if each in found}
        RESULTS.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")
    return 0


def table(results: dict[str, Report]) -> str:
    """Write the section of docs/performance.md."""
    one = next(iter(results.values()))
    rows = [("teacher", "T–T", "", *points(one["comparisons"]["T–T"]))]
    for name, result in results.items():
        top1 = result["audit"]["top1"]
        for pair in ("S–T", "S–S"):
            rows.append((name, pair, f"{top1:.1%}" if top1 is not None else "", *points(result["comparisons"][pair])))
    text = prose(
        f"A teacher of {one['teacher_parameters']:,} parameters with its own classifier "
        f"({one['training']['identities']:,} people of train.txt), and students of {one['training']['parameters']:,}, "
        f"{one['training']['steps']:,} steps of {one['training']['batch']} images each, CosFace 0.2 at scale 32 for "
        "teacher and students, one seed. TAR on "
        "test.txt, every identity weighing the same, with 95 % identity-level bootstrap intervals. Audit: share of "
        "training images whose teacher embedding is nearest to its own centre; where the teacher's classifier is not "
        "used, of the class means, each image left out of its own."
    )
    return f"{text}\n\n{markdown_table(('student', 'query–gallery', 'audit', 'FMR 1e-2', 'FMR 1e-3'), rows)}"


if __name__ == "__main__":
    sys.exit(main())
