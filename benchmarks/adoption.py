"""Adopt a mobile face model for a teacher's space by the closed-form map and by training; measure it on real faces.

Run as: python benchmarks/adoption.py [--runs DIR]

It needs the photographs and models of PKD_SHARED (or ../shared), which are for research only and not part of the
project, and writes benchmarks/results/adoption.json and the table of docs/adoption.md. Embeddings are cached in
$PKD_CACHE; the first time takes an hour of one core for 58,000 images. Layer and ridge weight are chosen on held-out
people of the fitting data; test.txt is used for the figures alone. It draws docs/images/adoption.svg, too; --page
writes table and picture from the last figures.

With --runs the trainings of ``RECIPES`` are run, too, by pkd-distill as users call it, and kept in DIR; a run that is
there already is measured and not trained again. --only NAME … measures some of them; other rows stay as they were.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pkd.toolkit.cli.distill import main as distill
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.data.face_set import FaceSet, join
from pkd.toolkit.distill.models.adopted import Adopted, adopt
from pkd.toolkit.distill.models.student import load_student
from pkd.toolkit.distill.training.closed_form import fit_map
from pkd.toolkit.encoders.base import Embeddings, OnnxEncoder, open_onnx, unit_rows
from pkd.toolkit.encoders.embed import default_cache, embed_stored
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PKD_SHARED") or ROOT.parent / "shared")
RESULTS = ROOT / "benchmarks" / "results" / "adoption.json"
PAGE = ROOT / "docs" / "adoption.md"
PICTURE = ROOT / "docs" / "images" / "adoption.svg"
BEGIN, END = "<!-- figures: benchmarks/adoption.py -->\n", "<!-- end of figures -->\n"
FMRS = (1e-2, 1e-3, 1e-4)
AMOUNTS = (100, 300, 1000, 3000, 14_000)
Report = dict[str, Any]
MIRRORED = ("--method", "l2kd", "--ema", "0.999", "--threads", "1")
L2KD = (*MIRRORED, "--no-mirror")
SHRUNK = ("--batch", "128", "--shrink", "390000", "--map-rank", "96", "--freeze", "0.9", "--lr", "3e-3", *MIRRORED)


@dataclass(frozen=True)
class Recipe:
    """Hold one training: what it is, and what pkd-distill is told."""

    what: str
    options: tuple[str, ...]
    images: Literal["all", "train", "few"] = "all"
    """All that there are, train.txt alone, or a newcomer's 800."""


ALONE = ("--steps", "800", "--batch", "128", *L2KD, "--ema", "0.995", "--freeze", "0.9")
RECIPES = {
    "trained": Recipe(
        "map, then 20 minutes of training of its last layers, with images without identity",
        ("--max-minutes", "20", *L2KD),
    ),
    "trained-infonce": Recipe(
        "the same by infonce", ("--steps", "1581", "--batch", "128", *L2KD, "--method", "infonce")
    ),
    "alone": Recipe("map, then 800 steps of its last layers, on train.txt alone", ALONE, "train"),
    "kept": Recipe("the same with --keep 0.15", (*ALONE, "--keep", "0.15"), "train"),
    "shrunk": Recipe(
        "shrunk to 0.39 M parameters, then 6,000 steps, with images without identity", ("--steps", "6000", *SHRUNK)
    ),
    "shrunk-infonce": Recipe(
        "shrunk to 0.39 M parameters, then 2,000 steps of infonce, with images without identity",
        ("--steps", "2000", *SHRUNK, "--method", "infonce"),
    ),
    "newcomer": Recipe(
        "newcomer: map, then 4 minutes of training", ("--max-minutes", "4", "--method", "l2kd", "--threads", "1"), "few"
    ),
}
"""Trainings by the name of their run."""


def main() -> int:
    """Measure, and write the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unlabelled", type=int, default=50_000, help="images without identity; 0: no such row")
    parser.add_argument("--seeds", type=int, default=3, help="draws of each row that draws its images")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="train, too: folder of the runs, kept and used again")
    parser.add_argument(
        "--only", nargs="+", choices=list(RECIPES), metavar="NAME", help="these trainings; other rows are the last ones"
    )
    parser.add_argument("--page", action="store_true", help="write table and picture of the last figures alone")
    args = parser.parse_args()
    if args.only and not args.runs:
        parser.error("--only: needs --runs DIR")
    if args.page:
        write_page(json.loads(RESULTS.read_text(encoding="utf-8")))
        return 0
    seeds = range(args.seeds)
    if not (SHARED / "faces").is_dir():
        print(f"skipped: no photographs in {SHARED}. Set PKD_SHARED to the folder that holds faces/ and models/.")
        return 0
    faces = SHARED / "faces"
    teacher = open_onnx(SHARED / "models" / "teacher_edgeface_xs_512.onnx", Preprocess())
    train, test = (FaceSet.read(faces / "splits" / f"{name}.txt") for name in ("train", "test"))
    student = adopt(
        str(SHARED / "models" / "teacher_mobilefacenet_y1_128.onnx"), "mean=0,std=1", train.load(range(16), 112)
    )
    place = Bench(teacher, student, test)
    if args.only:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        measured = {name: place.trained(args.runs / name, train) for name in args.only}
        write_results(results | {"rows": replaced(results["rows"], measured)})
        return 0
    rows: list[Report] = [{"images": 0, "what": "the teacher itself", **place.rates(place.expected, place.expected)}]
    random = np.random.default_rng(0)
    for count in AMOUNTS:
        for seed in seeds:
            chosen = np.sort(np.random.default_rng(seed).choice(len(train), count, replace=False))
            rows.append(
                {"what": f"{count:,} images of train.txt", "seed": seed, **place.row(train.select(chosen), seed)}
            )
    rows.append({"what": "train.txt", "seed": 0, **place.row(train, 0)})
    more = FaceSet.read(*sorted(faces.glob("unlabelled/fairface-*.tar")), labelled=False)
    if args.unlabelled:
        both = join(train, more.select(np.arange(min(len(more), args.unlabelled))))
        rows.append({"what": "train.txt and images without identity", "seed": 0, **place.row(both, 0)})
    for seed in seeds:
        few = place.row(newcomer(train, random), seed)
        rows.append({"what": "newcomer: 800 photographs of 400 people", "seed": seed, **few})
    rows += [place.trained(args.runs / name, train) for name in RECIPES if args.runs]
    write_results({"rows": rows, "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024})
    return 0


def replaced(rows: list[Report], measured: Mapping[str, Report]) -> list[Report]:
    """Put newly measured trainings beside the other rows, all in the order of ``RECIPES``."""
    order = [recipe.what for recipe in RECIPES.values()]
    new = {row["what"] for row in measured.values()}
    trainings = [row for row in rows if row["what"] in order and row["what"] not in new]
    trainings = sorted([*trainings, *measured.values()], key=lambda row: order.index(row["what"]))
    return [row for row in rows if row["what"] not in order] + trainings


def write_results(results: Mapping[str, Any]) -> None:
    """Keep the figures, and write table and picture."""
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_page(results)
    print(f"wrote {RESULTS.relative_to(ROOT)}")


class Bench:
    """Hold what every row is measured with."""

    def __init__(self, teacher: OnnxEncoder, student: Adopted, test: FaceSet) -> None:
        self.teacher, self.student, self.cache = teacher, student, default_cache()
        self.test = test
        self.expected = embed_stored(teacher, test, cache=self.cache)[:]
        self.features = embed_stored(student.features, test, cache=self.cache)[:]
        files = np.arange(len(test))
        self.pairing = Pairing(test.labels, test.labels, files, files, len(test.identities), unordered=False)

    def row(self, faces: FaceSet, seed: int) -> Report:
        """Fit on ``faces`` and measure S–T and S–S on the test set."""
        targets = embed_stored(self.teacher, faces, cache=self.cache)
        embed_stored(self.student.features, faces, cache=self.cache)
        began = time.process_time()
        fitted = fit_map(
            self.student, targets, faces, cache=self.cache, measure=lambda *rows: {}, refit=True, seed=seed
        )  # fmt: skip
        seconds = time.process_time() - began
        mapped = unit_rows((self.features @ fitted.weight + fitted.bias).astype(np.float32))
        report = {key: fitted.report[key] for key in ("layer", "kind", "penalty")}
        print(f"{len(faces):,} images: {report['layer']}, {seconds:.1f} s", flush=True)
        return {
            "images": len(faces), **report, "fit_seconds": round(seconds, 2),
            "held_out_cosine": fitted.report["held_out"]["cosine"],
            "cosine": float(np.einsum("nd,nd->n", mapped, self.expected).mean()),
            **self.rates(mapped, self.expected), "student_alone": self.rates(mapped, mapped),
        }  # fmt: skip

    def trained(self, run: Path, train: FaceSet) -> Report:
        """Train a recipe by pkd-distill unless ``run`` is there, and measure its student on the test set."""
        faces, models, recipe = SHARED / "faces", SHARED / "models", RECIPES[run.name]
        if not (run / "student.pt").is_file():
            shown = run.with_suffix(".txt")
            shown.parent.mkdir(parents=True, exist_ok=True)
            chosen = newcomer(train, np.random.default_rng(0))
            shown.write_text("".join(f"{chosen.path(i)}\n" for i in range(len(chosen))), encoding="utf-8")
            more = [str(faces / "splits" / "train_unlabelled.txt")]
            more += map(str, sorted(faces.glob("unlabelled/fairface-*.tar")))
            command = [
                "--teacher", str(models / "teacher_edgeface_xs_512.onnx"),
                "--teacher-preprocess", "mean=127.5,std=127.5",
                "--student", str(models / "teacher_mobilefacenet_y1_128.onnx"),
                "--student-preprocess", "mean=0,std=1",
                "--faces", str(shown if recipe.images == "few" else faces / "splits" / "train.txt"),
                *(["--unlabelled", *more] if recipe.images == "all" else []), *recipe.options, "--out", str(run),
            ]  # fmt: skip
            if distill(command):
                raise SystemExit(f"pkd-distill {' '.join(command)} failed")
        student = load_student(run)
        rows = embed_stored(student, self.test, cache=self.cache)[:]
        training = student.training
        return {
            "what": recipe.what, "seed": 0,
            "images": training["images"], "layer": "trained", "steps": training["steps"], "batch": training["batch"],
            "parameters": training["parameters"], "fit_seconds": None, "lost": training.get("lost"),
            "cosine": float(np.einsum("nd,nd->n", rows, self.expected).mean()),
            **self.rates(rows, self.expected), "student_alone": self.rates(rows, rows),
        }  # fmt: skip

    def rates(self, query: Embeddings, gallery: Embeddings) -> Report:
        """TAR, every identity weighing the same, at each FMR, with its 95 % interval."""
        scores = score_pairs(self.pairing, query, gallery, seed=0)
        info = self.teacher.info
        comparison, _ = measure(scores, "S–T", info, info, fmrs=FMRS, resamples=100, seed=0)
        return {
            "tar": {f"{p.fmr:g}": p.tar_balanced for p in comparison.points},
            "interval": {f"{p.fmr:g}": p.tar_balanced_ci95 for p in comparison.points},
        }


def newcomer(train: FaceSet, random: np.random.Generator) -> FaceSet:
    """Two photographs each of 400 people, drawn from those that have two or more."""
    counts = np.bincount(train.labels, minlength=len(train.identities))
    people = random.choice(np.flatnonzero(counts > 1), 400, replace=False)
    rows = [random.choice(np.flatnonzero(train.labels == person), 2, replace=False) for person in people]
    return train.select(np.sort(np.concatenate(rows)))


def write_page(results: Mapping[str, Any]) -> None:
    """Put the figures between the marks of docs/adoption.md, and draw them."""
    lines = [
        "| fitted on | images | S–T TAR at FMR 1e-2 / 1e-3 / 1e-4 | S–S at 1e-3 | layer | fit |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    by_what: dict[str, list[Report]] = {}
    for row in results["rows"]:
        by_what.setdefault(row["what"], []).append(row)
    for what, rows in by_what.items():
        mean = {fmr: float(np.mean([row["tar"][fmr] for row in rows])) for fmr in rows[0]["tar"]}
        rates = " / ".join(f"{value:.3f}" for value in mean.values())
        alone = [row["student_alone"]["tar"]["0.001"] for row in rows if "student_alone" in row]
        if not alone:
            lines.append(f"| {what} | | {rates} | | | |")
            continue
        layer = ", ".join(sorted({row["layer"] for row in rows}))
        if rows[0]["fit_seconds"] is None:
            steps, batch = rows[0]["steps"], rows[0]["batch"]
            layer, time_ = f"{rows[0]['parameters'] / 1e6:.1f} M parameters", f"{steps:,} steps of {batch}"
            if rows[0].get("lost"):
                time_ += ", which lost: the map is kept"
        else:
            time_ = f"{np.mean([row['fit_seconds'] for row in rows]):.1f} s"
        lines.append(f"| {what} | {rows[0]['images']:,} | {rates} | {np.mean(alone):.3f} | {layer} | {time_} |")
    if PAGE.is_file():
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END, 1)[1]
        PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after, encoding="utf-8")
    draw(by_what)


def draw(by_what: Mapping[str, list[Report]]) -> None:
    """Draw the map's TAR by the number of images that it is fitted on, as the mean and the range over the draws."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "pkd"
    import matplotlib.pyplot as plt

    maps = {
        rows[0]["images"]: rows
        for what, rows in by_what.items()
        if rows[0].get("kind") and not what.startswith("newcomer")
    }
    counts = sorted(maps)
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for fmr, colour in (("0.01", "#0b63c5"), ("0.001", "#b45309"), ("0.0001", "#475569")):
        values = [[row["tar"][fmr] for row in maps[count]] for count in counts]
        axes.plot(counts, [np.mean(each) for each in values], marker="o", color=colour, label=f"FMR {fmr}")
        axes.fill_between(counts, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, lw=0)
        axes.axhline(by_what["the teacher itself"][0]["tar"][fmr], color=colour, lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.set_xlabel("images that the map is fitted on")
    axes.set_ylabel("S–T TAR (dotted: T–T)")
    axes.set_ylim(0, 1)
    axes.grid(color="#e2e8f0")
    axes.legend(loc="lower right")
    figure.savefig(PICTURE, metadata={"Date": None, "Creator": None})
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
