"""Compare the methods that put a student into the teacher's space, all from the same adopted start, at equal budget.

Run as: python benchmarks/adopted_methods.py RUNS [--rows NAME ...] [--seeds 3]

RUNS is the folder of the trainings; one that is there is measured and not trained again. The start is MobileFaceNet Y1,
shrunk to 0.39 M parameters behind its map (`pkd-distill --method map --shrink`): a student that is weak enough for the
loss to matter. Every row then trains the last quarter of its arithmetic by pkd-distill for 300 steps of 128 images of
train.txt; only the loss differs. About seven minutes of one core for the start, six for the first row, which fills
the cache, three for every other. It needs PKD_SHARED, and writes benchmarks/results/adopted_methods.json and the table
of docs/adoption.md; --page writes the table alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from adoption import Bench
from real_faces import ROOT, SHARED, markdown_table, prose

from pkd.toolkit.cli.distill import main as distill
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.models.adopted import adopt
from pkd.toolkit.distill.models.student import load_student
from pkd.toolkit.encoders.base import open_onnx
from pkd.toolkit.encoders.embed import embed_stored

RESULTS = ROOT / "benchmarks" / "results" / "adopted_methods.json"
PAGE = ROOT / "docs" / "adoption.md"
BEGIN, END = "<!-- figures: benchmarks/adopted_methods.py -->\n", "<!-- end of the methods -->\n"
TEACHER = ("teacher_edgeface_xs_512.onnx", "mean=127.5,std=127.5")
STUDENT = ("teacher_mobilefacenet_y1_128.onnx", "mean=0,std=1")
SHRINK = ("--method", "map", "--shrink", "390000", "--map-rank", "96", "--threads", "1")
BUDGET = (
    "--steps", "300", "--batch", "128", "--freeze", "0.75", "--no-mirror", "--ema", "0.99", "--precision", "bf16",
    "--threads", "1", "--lr", "3e-3",
)  # fmt: skip
TIED = ("l2kd", "proxylesskd", "raml", "d3still", "csd", "infonce")
"""Rows that a sentence of the docs relies on, trained with every seed."""
MANY = 10
"""Photographs that a person of the rows "people with many photographs" has at least."""
ROWS: dict[str, tuple[str, ...]] = {
    "l2kd": ("--method", "l2kd"),
    "proxylesskd": ("--method", "proxylesskd"),
    "proxylesskd, scale 16": ("--method", "proxylesskd", "--scale", "16"),
    "proxylesskd, softmax": ("--method", "proxylesskd", "--margin", "softmax"),
    "proxylesskd, softmax, scale 16": ("--method", "proxylesskd", "--margin", "softmax", "--scale", "16"),
    "proxylesskd, fitted head": ("--method", "proxylesskd", "--head", "fit"),
    "proxylesskd, a centre per image": ("--method", "proxylesskd", "--head", "images"),
    "proxylesskd+l2kd": ("--method", "proxylesskd+l2kd:30"),
    "raml": ("--method", "raml"),
    "d3still": ("--method", "d3still"),
    "csd": ("--method", "csd"),
    "infonce": ("--method", "infonce"),
    "kd": ("--method", "kd"),
    "adadistill": ("--method", "adadistill"),
    "margindistillation": ("--method", "margindistillation"),
    "l2kd+rkd": ("--method", "l2kd+rkd"),
    "l2kd+cckd": ("--method", "l2kd+cckd"),
    "l2kd, people with many photographs": ("--method", "l2kd"),
    "proxylesskd, people with many photographs": ("--method", "proxylesskd"),
}
"""Options of pkd-distill, by the name of the row."""
Report = dict[str, Any]


def main() -> int:
    """Train what is missing, measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", help="folder of the trainings, kept and used again")
    parser.add_argument(
        "--page", action="store_true", help="write the table from the last figures, and measure nothing"
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help=f"seeds of {', '.join(TIED)}; the others have one")
    parser.add_argument("--train-only", action="store_true", help="train, and measure later")
    parser.add_argument("--no-training", action="store_true", help="measure the runs that are there alone")
    args = parser.parse_args()
    if args.page:
        write_table(json.loads(RESULTS.read_text(encoding="utf-8")))
        return 0
    if args.runs is None:
        parser.error("name the folder of the trainings, or pass --page")
    if not (SHARED / "faces").is_dir():
        print(f"skipped: no photographs in {SHARED}. Set PKD_SHARED to the folder that holds faces/ and models/.")
        return 0
    if not (args.runs / "start" / "student.pt").is_file():
        source = ("--student", str(SHARED / "models" / STUDENT[0]), "--student-preprocess", STUDENT[1])
        train(args.runs / "start", (*source, *SHRINK), everybody())
    runs = {}
    for seed in range(args.seeds):
        for name in args.rows:
            if seed and name not in TIED:
                continue
            run = args.runs / f"{name.replace(', ', '-').replace(' ', '-')}-s{seed}"
            if args.no_training and not (run / "student.pt").is_file():
                continue
            if not (run / "student.pt").is_file():
                people = many(args.runs) if "many photographs" in name else everybody()
                options = ("--student", str(args.runs / "start"), *BUDGET, "--seed", str(seed), *ROWS[name])
                train(run, options, people)
            runs[name, seed] = run
    if args.train_only:
        return 0
    results = measure(args.runs, runs)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_table(results)
    print(f"wrote {RESULTS.relative_to(ROOT)}")
    return 0


def everybody() -> Path:
    """Find the list of all training images."""
    return SHARED / "faces" / "splits" / "train.txt"


def many(runs: Path) -> Path:
    """Write the list of the training images of people with ``MANY`` photographs or more."""
    faces = FaceSet.read(everybody())
    count = np.bincount(faces.labels, minlength=len(faces.identities))
    kept = np.flatnonzero(count[faces.labels] >= MANY)
    path = runs / "many.txt"
    path.write_text("".join(f"{faces.path(int(i))}\n" for i in kept), encoding="utf-8")
    return path


def train(run: Path, options: tuple[str, ...], faces: Path) -> None:
    """Run pkd-distill."""
    teacher = ("--teacher", str(SHARED / "models" / TEACHER[0]), "--teacher-preprocess", TEACHER[1])
    if distill([*teacher, "--faces", str(faces), *options, "--out", str(run)]):
        raise SystemExit(f"pkd-distill failed for {run.name}")


def measure(folder: Path, runs: Mapping[tuple[str, int], Path]) -> Report:
    """Measure the start and every run on val.txt, on which options are chosen, and on test.txt."""
    splits = SHARED / "faces" / "splits"
    teacher = open_onnx(SHARED / "models" / TEACHER[0], Preprocess())
    training = FaceSet.read(everybody())
    adopted = adopt(str(SHARED / "models" / STUDENT[0]), STUDENT[1], training.load(range(16), 112))
    places = {name: Bench(teacher, adopted, FaceSet.read(splits / f"{name}.txt")) for name in ("val", "test")}
    rows = []
    for (name, seed), run in {("start", 0): folder / "start", **runs}.items():
        student = load_student(run)
        report: Report = {"row": name, "seed": seed}
        report |= {key: student.training.get(key) for key in ("method", "images", "identities", "parameters", "steps")}
        report["lost"] = bool(student.training.get("lost"))
        for part, place in places.items():
            own = embed_stored(student, place.test, cache=place.cache)[:]
            cosine = float(np.einsum("nd,nd->n", own, place.expected).mean())
            report[part] = {"cosine": cosine, "S–T": place.rates(own, place.expected)}
            if part == "test":
                report[part]["S–S"] = place.rates(own, own)
        rows.append(report)
        print(name, seed, {part: report[part]["S–T"]["tar"]["0.001"] for part in places}, flush=True)
    return {"rows": rows, "test_images": len(places["test"].test), "people": len(places["test"].test.identities)}


def write_table(results: Report) -> None:
    """Put the table between the marks of docs/adoption.md."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table(results) + "\n" + END + rest.split(END)[1], encoding="utf-8")


def table(results: Report) -> str:
    """Write the text and the rows of the section."""
    rows, by_name = results["rows"], dict[str, list[Report]]()
    for row in rows:
        by_name.setdefault(row["row"], []).append(row)
    shown = []
    for name, seeds in by_name.items():
        figures = [f"{len(seeds)}"]
        for pair in ("S–T", "S–S"):
            values = np.array([row["test"][pair]["tar"]["0.001"] for row in seeds])
            low, high = seeds[0]["test"][pair]["interval"]["0.001"]
            spread = f"{values.min():.3f}–{values.max():.3f}" if len(seeds) > 1 else f"({low:.3f}–{high:.3f})"
            figures += [f"{values.mean():.3f}", spread]
        figures.append(f"{np.mean([row['test']['cosine'] for row in seeds]):.3f}")
        figures.append(f"{np.mean([row['val']['S–T']['tar']['0.001'] for row in seeds]):.3f}")
        shown.append((name, *figures))
    one = rows[1]
    text = prose(
        f"Every row begins with the same student: MobileFaceNet Y1, shrunk to {rows[0]['parameters']:,} parameters "
        f"behind its map ({one['parameters']:,} when its last layer is whole and batch normalisation is back). It "
        f"trains the last quarter of its arithmetic for {one['steps']:,} steps of 128 images of train.txt "
        f"({one['images']:,} images of {one['identities']:,} people after a tenth of the people was held out). TAR at "
        f"FMR 1e-3 on test.txt ({results['test_images']:,} images of {results['people']:,} people), every identity "
        "weighing the same: the mean over the seeds with the least and the greatest, or of one seed with its 95 % "
        "identity-level bootstrap interval. Margin ArcFace 0.5, scale 64 and the head `means` where a row does not say "
        "otherwise."
    )
    head = ("loss", "seeds", "S–T", "", "S–S", "", "cosine to the teacher", "S–T on val.txt")
    return f"{text}\n\n{markdown_table(head, shown)}"


if __name__ == "__main__":
    raise SystemExit(main())
