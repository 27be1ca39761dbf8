"""Accuracy on real faces: teachers on LFW View 2, alignment on DevTest, and methods compared at equal budget.

Run as: python benchmarks/real_faces.py            (all of it; the trainings take about 25 minutes of one core each)
        python benchmarks/real_faces.py --methods l2kd --steps 200
        python benchmarks/real_faces.py --page     (the page from the last figures, and those of adoption.py)

It runs the commands that a user runs, skips what its output folder already holds (an unfinished training is resumed),
and writes benchmarks/results/real_faces.json and docs/results.md from their reports. It needs the photographs and
teachers of PKD_SHARED (or ../shared), which are for research only and not part of the project.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from pkd.toolkit.distill.models.student import load_student

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PKD_SHARED") or ROOT.parent / "shared")
EDGEFACE = ("teacher_edgeface_xs_512.onnx", "channels=rgb,mean=127.5,std=127.5")
MOBILEFACENET = ("teacher_mobilefacenet_y1_128.onnx", "channels=rgb,mean=0,std=1")
CONTINUED = "l2kd-continued"
MORE_STEPS = 1350
FMRS = (1e-2, 1e-3, 1e-4)
Report = dict[str, Any]


def main() -> int:
    """Measure what is missing, then write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="trainings and evaluations (runs/)")
    parser.add_argument("--methods", nargs="+", default=["proxylesskd", "l2kd", "none", CONTINUED])
    parser.add_argument("--student", default="mobilefacenet-relu:0.5")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", action="store_true", help="write the page of the last figures, and measure nothing")
    args = parser.parse_args()
    target = ROOT / "benchmarks" / "results" / "real_faces.json"
    if args.page:
        return write_page(json.loads(target.read_text(encoding="utf-8")))
    if not (SHARED / "faces").is_dir():
        print(f"skipped: no photographs in {SHARED}. Set PKD_SHARED to the folder that holds faces/ and models/.")
        return 0
    results = {
        "view2": {name: view2(args.out, name, *which) for name, which in VIEW2.items()},
        "devtest": devtest(args.out),
        "settings": {k: getattr(args, k) for k in ("student", "steps", "batch", "seed")},
        "methods": {method: compare(args, method) for method in args.methods},
        "baselines": {name: baselines(args.out, name, *control) for name, control in CONTROLS.items()},
    }
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return write_page(results)


def write_page(results: Report) -> int:
    """Write docs/results.md."""
    (ROOT / "docs" / "results.md").write_text(page(results), encoding="utf-8")
    print("wrote docs/results.md")
    return 0


VIEW2: dict[str, tuple[tuple[str, str], list[str]]] = {
    "EdgeFace-XS, 512-d": (EDGEFACE, []),
    "EdgeFace-XS, 512-d, flip": (EDGEFACE, ["--flip"]),
    "MobileFaceNet-Y1, 128-d, flip": (MOBILEFACENET, ["--flip"]),
}


def view2(out: Path, name: str, teacher: tuple[str, str], more: list[str]) -> Report:
    """Official LFW View 2 of a teacher on the aligned crops."""
    folder = out / "view2" / name.replace(", ", "-").replace(" ", "-")
    faces = ["--pairs", str(SHARED / "faces/lfw/protocol/pairs.txt"), "--faces", str(SHARED / "faces/lfw/aligned")]
    return evaluate(folder, teacher, *faces, *more)["pair_accuracies"][0]


def devtest(out: Path) -> Report:
    """DevTest accuracy of EdgeFace on the given crops and on crops that pkd-align makes from the photographs."""
    crops = out / "devtest" / "crops"
    if not (crops / "skipped.csv").is_file():
        detector = SHARED / "models/yunet_n_dynamic.onnx"
        command("pkd-align", str(SHARED / "faces/lfw/raw-devtest"), str(crops), "--detector", str(detector))
    pairs = ["--pairs", str(SHARED / "faces/lfw/protocol/pairsDevTest.txt")]
    pairs += ["--threshold-pairs", str(SHARED / "faces/lfw/protocol/pairsDevTrain.txt")]
    given = evaluate(out / "devtest" / "given", EDGEFACE, *pairs, "--faces", str(SHARED / "faces/lfw/aligned"))
    # The photographs of DevTrain are not there, so the threshold of both comes from the same pairs here.
    same = ["--pairs", str(SHARED / "faces/lfw/protocol/pairsDevTest.txt")]
    shared = evaluate(out / "devtest" / "given-same", EDGEFACE, *same, "--faces", str(SHARED / "faces/lfw/aligned"))
    ours = evaluate(out / "devtest" / "pkd-align", EDGEFACE, *same, "--faces", str(crops))
    reports = {"given crops, threshold from DevTrain": given, "given crops": shared, "crops of pkd-align": ours}
    return {name: report["pair_accuracies"][0] for name, report in reports.items()}


def compare(args: argparse.Namespace, method: str) -> Report:
    """Train one method at the common budget, or l2kd on beyond it, and evaluate it on the test split."""
    run = args.out / "methods" / method
    splits = SHARED / "faces/splits"
    steps, init = (MORE_STEPS, ["--init", str(run.with_name("l2kd"))]) if method == CONTINUED else (args.steps, [])
    if not (run / "student.pt").is_file():
        resume = ["--resume"] if (run / "checkpoint.pt").is_file() else []
        command(
            "pkd-distill", *teacher_options(EDGEFACE), "--faces", str(splits / "train.txt"),
            "--unlabelled", str(splits / "train_unlabelled.txt"), "--student", args.student,
            "--method", method.removesuffix("-continued"), *init,
            "--steps", str(steps), "--batch", str(args.batch), "--lr", "0.02", "--augment", "0.1",
            "--precision", "fp32", "--threads", "1", "--seed", str(args.seed), "--out", str(run), *resume,
        )  # fmt: skip
    more = ["--student", str(run), "--faces", str(splits / "test.txt")]
    report = evaluate(run / "evaluation", EDGEFACE, *more, *(["--any-space"] if method == "none" else []))
    agreement = report["agreement"]
    summary = {
        comparison["name"]: {
            "identities": comparison["genuine_identities"],
            "genuine_pairs": comparison["genuine_pairs"],
            "impostor_pairs": comparison["impostor_pairs"],
            "eer": comparison["eer"],
            "points": comparison["points"],
        }
        for comparison in report["comparisons"]
    }
    training = dict(load_student(run).training)
    cosine = agreement and agreement["mean"]
    return {"training": training, "cosine": cosine, "data": report["data"], "comparisons": summary}


CONTROLS: dict[str, tuple[str, ...]] = {
    "the same student, undistilled (`none`)": ("runs", "none"),
    "MobileFaceNet-Y1, 128-d, a model of its own": MOBILEFACENET,
}


def baselines(out: Path, name: str, kind: str, control: str) -> Report:
    """Compare the best student with a control from an independent space, mapped by maps that are fitted on val.txt."""
    splits = SHARED / "faces/splits"
    spec = [str(out / "methods" / control)] if kind == "runs" else [str(SHARED / "models" / kind)]
    preprocess = [] if kind == "runs" else ["--control-preprocess", control]
    report = evaluate(
        out / "baselines" / Path(spec[0]).stem, EDGEFACE, "--student", str(out / "methods" / CONTINUED),
        "--control", *spec, *preprocess, "--fit-faces", str(splits / "val.txt"), "--faces", str(splits / "test.txt"),
    )  # fmt: skip
    return {
        "name": name,
        "control": report["control"],
        "gains": report["gains"],
        "comparisons": {c["name"]: {"points": c["points"]} for c in report["comparisons"]},
    }


def evaluate(folder: Path, teacher: tuple[str, str], *options: str) -> Report:
    """Run pkd-evaluate into ``folder`` unless its report is there."""
    if not (folder / "report.json").is_file():
        command("pkd-evaluate", *teacher_options(teacher), *options, "--out", str(folder))
    report: Report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def teacher_options(teacher: tuple[str, str]) -> list[str]:
    """``--teacher`` and ``--teacher-preprocess`` of a file in shared/models."""
    return ["--teacher", str(SHARED / "models" / teacher[0]), "--teacher-preprocess", teacher[1]]


def command(name: str, *options: str) -> None:
    """Run one of pkd's commands; a failure ends the benchmark with its message."""
    print("$", name, *options, flush=True)
    subprocess.run([str(Path(sys.executable).with_name(name)), *options], check=True)


def page(results: Report) -> str:
    """docs/results.md."""
    settings, methods = results["settings"], results["methods"]
    one = next(iter(methods.values()))
    pairs = one["comparisons"]["S–T"]
    images = settings["steps"] * settings["batch"]
    lines = [
        "# Results on real faces",
        prose(
            "Here you can see how accurate students of real teachers are on real people. `python "
            "benchmarks/real_faces.py` measures it again by the commands that a user runs; it needs the research-only "
            "photographs and teachers of `PKD_SHARED`. Intervals are 95 % identity-level bootstrap intervals."
        ),
        "## Adopted students",
        prose(
            "A mobile face model that exists, behind a linear map into the teacher's space, and trained from there: "
            "[adoption.md](adoption.md) has the recipes, the map's accuracy by the number of images, the losses from "
            "one start, the ablation and more sizes. TAR at FMR 1e-3 on test.txt, every identity weighing the same."
        ),
        adopted_students(json.loads((ROOT / "benchmarks" / "results" / "adoption.json").read_text(encoding="utf-8"))),
        "## Teachers on LFW View 2",
        prose(
            "`pkd-evaluate --pairs pairs.txt`: 6,000 pairs, ten folds, the threshold of each from the nine others; ± "
            "is the standard deviation over the folds."
        ),
        markdown_table(
            ("teacher", "accuracy", "interval"),
            [
                (name, f"{r['accuracy']:.2%} ± {r['fold_std']:.2%}", percent(r["ci95"]))
                for name, r in results["view2"].items()
            ],
        ),
        "## Alignment",
        prose(
            "EdgeFace-XS on `pairsDevTest.txt` (1,000 pairs). The second and third row choose the threshold on the "
            "pairs they report, alike for both, since the photographs of DevTrain are not at hand."
        ),
        markdown_table(
            ("crops", "accuracy", "interval"),
            [(name, f"{r['accuracy']:.2%}", percent(r["ci95"])) for name, r in results["devtest"].items()],
        ),
        "## Methods from scratch, at equal budget",
        prose(
            f"Teacher EdgeFace-XS (512-d); student `{settings['student']}` "
            f"({one['training']['parameters']:,} parameters); {settings['steps']:,} steps of {settings['batch']} "
            f"images ({images:,} in all), peak learning rate 0.02. One seed ({settings['seed']}): differences "
            "between seeds are not in the intervals. ProxylessKD uses head `means` with `arcface:0.5` at scale 64. "
            "Methods that need labels see train.txt only, l2kd train_unlabelled.txt as well. `none` is the undistilled "
            "control: the same student with its own classifier; its space is its own, so that its S–T is chance. "
            f"`{CONTINUED}` is l2kd trained on for {MORE_STEPS:,} steps with a second schedule, beyond that "
            "budget; it was added after the other rows had been seen."
        ),
        prose(
            f"Test: {one['data']['images']:,} images of {one['data']['identities']:,} people, none of them in "
            f"training; {pairs['genuine_pairs']:,} genuine pairs of {pairs['identities']:,} people and "
            f"{pairs['impostor_pairs']:,} impostor pairs in S–T."
        ),
    ]
    titles = {
        "tar_balanced": "Every identity weighing the same",
        "tar": "Every pair weighing the same (two people hold half of the genuine pairs)",
    }
    for key, title in titles.items():
        rows = [row("teacher", "T–T", one["comparisons"]["T–T"], key)]
        rows += [row(m, pair, r["comparisons"][pair], key) for m, r in methods.items() for pair in ("S–T", "S–S")]
        lines += [
            f"**{title}**: TAR at FMR",
            markdown_table(("method", "query–gallery", *(f"{f:g}" for f in FMRS)), rows),
        ]
    cosines = [f"{m} {r['cosine']:.3f}" for m, r in methods.items() if r["cosine"] is not None]
    lines.append(f"Mean cosine of student and teacher on the same test image: {', '.join(cosines)}.")
    lines += bought(results["baselines"])
    return "\n\n".join(lines) + "\n"


def adopted_students(results: Report) -> str:
    """Write the table of the teacher and of the adopted students; rows of several draws are left to adoption.md."""
    lines = []
    for found in results["rows"]:
        if found["what"].startswith("newcomer: 800") or found["images"] in {100, 300, 1000, 3000, 14_000}:
            continue
        what = f"map, fitted on {found['what']}" if found.get("kind") else found["what"]
        cells = [what, f"{found['images']:,}" if found["images"] else ""]
        for rates in (found, found.get("student_alone")):
            low, high = rates["interval"]["0.001"] if rates else (0, 0)
            cells.append(f"{rates['tar']['0.001']:.3f} ({low:.3f}–{high:.3f})" if rates else "")
        lines.append(tuple(cells))
    return markdown_table(("student", "images", "S–T (teacher: T–T)", "S–S"), lines)


def bought(found: Report) -> list[str]:
    """Tell what distillation bought, beside linear maps between independent spaces."""
    names = {"R–T": "affine ridge map", "P–T": "orthogonal Procrustes map", "C–C": "the control alone, C–C"}
    rows = [row(CONTINUED, "S–T", next(iter(found.values()))["comparisons"]["S–T"], "tar_balanced")]
    rows += [
        row(name, words, f["comparisons"][cell], "tar_balanced")
        for name, f in found.items()
        for cell, words in names.items()
    ]
    fit = next(iter(found.values()))["control"]["fit"]
    gains = [
        f"{100 * d['difference']:+.1f} points ({100 * d['ci95'][0]:+.1f} to {100 * d['ci95'][1]:+.1f}, p {d['p']:.3f})"
        f" beside the ridge map of {name}"
        for name, f in found.items()
        for gain in f["gains"]
        if gain["baseline"] == "R–T" and gain["fmr"] == 1e-3 and (d := gain["difference"])
    ]
    return [
        "## What distillation bought",
        prose(
            "`pkd-evaluate --control C --fit-faces val.txt`: linear maps from an independent space into the "
            f"teacher's, fitted on {fit['images']:,} images of {fit['identities']:,} people not in the test list. TAR "
            "at FMR, every identity weighing the same. Only the first control has the student's size and training; the "
            "second shows how far a map of a strong model goes, for whom a device can carry it."
        ),
        markdown_table(("encoder", "query–gallery", *(f"{f:g}" for f in FMRS)), rows),
        prose(f"`{CONTINUED}` S–T at FMR 1e-3, paired over the same people: {'; '.join(gains)}."),
    ]


def prose(text: str) -> str:
    """Write a paragraph in lines of at most 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Write a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))


def row(method: str, pair: str, comparison: Report, key: str) -> tuple[str, ...]:
    """One line of the table; a rate that the pairs do not resolve stays empty."""
    cells = []
    for fmr in FMRS:
        point = next((p for p in comparison["points"] if abs(p["fmr"] / fmr - 1) < 1e-6), None)
        low, high = point[f"{key}_ci95"] if point else (0, 0)
        cells.append(f"{point[key]:.3f} ({low:.3f}–{high:.3f})" if point else "")
    return (method, pair, *cells)


def percent(ci: list[float]) -> str:
    """``99.30–99.70 %``."""
    return f"{100 * ci[0]:.2f}–{100 * ci[1]:.2f} %"


if __name__ == "__main__":
    sys.exit(main())
