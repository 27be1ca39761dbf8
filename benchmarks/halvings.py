"""Do thresholds carry over to other people? Random halvings of the identities of the real test list.

Run as: python benchmarks/halvings.py                    (about 20 minutes of a core)
        python benchmarks/halvings.py --student runs/methods/l2kd-continued   (keeps the others that were measured)

Certify student against teacher at FMR 1e-3 on one half of the people, measure the false match rate at that threshold on
the other half, and see whether it lies in the certificate's prediction interval. Beside it the mistake this is made to
prevent: the threshold of teacher against teacher, used for the student's queries. It needs the photographs and teachers
of PKD_SHARED (or ../shared). Writes benchmarks/results/halvings.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.models.open_encoder import open_encoder
from pkd.toolkit.encoders.embed import default_cache, embed_faces
from pkd.toolkit.evaluation.metrics.error_rates import fmr_at, raw_fmr_at
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores, score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Floats, Ints, Pairing

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PKD_SHARED") or ROOT.parent / "shared")
RESULTS = ROOT / "benchmarks" / "results" / "halvings.json"
TEACHER = ("teacher_edgeface_xs_512.onnx", "channels=rgb,mean=127.5,std=127.5")
FMR = 1e-3
STUDENTS = ("l2kd-continued", "proxylesskd")
ROWS = (
    ("S–T's own", "its prediction interval", "prediction95", "measured", "threshold"),
    ("S–T's own", "its confidence interval", "ci95", "measured", "threshold"),
    (
        "T–T's, used for S–T",
        "T–T's prediction interval",
        "teacher_prediction95",
        "measured_at_teacher_threshold",
        "teacher_threshold",
    ),
    ("S–T's own, for the raw FMR", "", "", "raw_measured", "raw_threshold"),
)
"""Threshold and interval in words, and their keys in the results."""


def main() -> int:
    """Halve, certify, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = [ROOT / "runs" / "methods" / name for name in STUDENTS]
    parser.add_argument("--student", type=Path, nargs="+", default=runs)
    parser.add_argument("--halvings", type=int, default=50)
    parser.add_argument("--resamples", type=int, default=300)
    args = parser.parse_args()
    missing = [str(run) for run in args.student if not run.exists()]
    if not (SHARED / "faces").is_dir() or missing:
        print(f"skipped: needs the photographs of PKD_SHARED and {', '.join(missing)}: python benchmarks/real_faces.py")
        return 0
    faces = FaceSet.read(SHARED / "faces" / "splits" / "test.txt")
    teacher = open_encoder(str(SHARED / "models" / TEACHER[0]), TEACHER[1])
    vectors = {"T": embed_faces(teacher, faces, cache=default_cache())}
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"students": {}}
    found |= {"identities": len(faces.identities), "images": len(faces), "fmr": FMR, "resamples": args.resamples}
    for run in args.student:
        student = open_encoder(str(run))
        vectors["S"] = embed_faces(student, faces, cache=default_cache())
        halves = []
        for seed in range(args.halvings):
            order = np.random.default_rng(seed).permutation(len(faces.identities))
            sides = order[: len(order) // 2], order[len(order) // 2 :]
            halves.append(_halving(sides, faces.labels, vectors, teacher.info, student.info, args.resamples, seed))
            print(f"{run.name}, halving {seed + 1} of {args.halvings}: {halves[-1]}", flush=True)
        found["students"][run.name] = halves
        RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    return 0


def _halving(
    sides: tuple[Ints, Ints],
    labels: Ints,
    vectors: dict[str, Floats],
    teacher: EncoderInfo,
    student: EncoderInfo,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    own, other = (np.isin(labels, side) for side in sides)
    points = {}
    for query, info in (("S", student), ("T", teacher)):
        scores = _scores(labels[own], vectors[query][own], vectors["T"][own], ordered=query == "S")
        comparison, _ = measure(scores, f"{query}–T", info, teacher, fmrs=[FMR], resamples=resamples, seed=seed)
        points[query] = comparison.points[0]
    fresh = _scores(labels[other], vectors["S"][other], vectors["T"][other], ordered=True)
    right, wrong = fmr_at(fresh, np.array([points["S"].threshold, points["T"].threshold]))
    (raw,) = raw_fmr_at(fresh, np.array([points["S"].raw_threshold]))
    return {
        "threshold": points["S"].threshold,
        "ci95": points["S"].fmr_ci95,
        "prediction95": points["S"].prediction95,
        "measured": float(right),
        "raw_threshold": points["S"].raw_threshold,
        "raw_measured": float(raw),
        "teacher_threshold": points["T"].threshold,
        "teacher_prediction95": points["T"].prediction95,
        "measured_at_teacher_threshold": float(wrong),
    }


def _scores(labels: Ints, query: Floats, gallery: Floats, *, ordered: bool) -> PairScores:
    people, dense = np.unique(labels, return_inverse=True)
    files = np.arange(len(labels))
    dense = dense.astype(np.int64)
    return score_pairs(Pairing(dense, dense, files, files, len(people), unordered=not ordered), query, gallery)


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    count = len(next(iter(found["students"].values())))
    lines = [
        f"{count} random halvings of {found['identities']:,} test identities ({found['images']:,} images), "
        f"{found['resamples']} resamples: the threshold for FMR {found['fmr']:g} comes from one half, the rate is "
        "measured on the other. Median with the 5th and 95th percentile.",
        "",
        "| student | threshold | FMR on the other half inside | halvings | FMR measured there | threshold |",
        "| --- | --- | --- | ---: | --- | ---: |",
    ]
    for student, halves in found["students"].items():
        for name, what, interval, measured, threshold in ROWS:
            inside = "no interval"
            if interval:
                held = sum(h[interval][0] <= h[measured] <= h[interval][1] for h in halves)
                inside = f"{held} of {len(halves)}"
            low, middle, high = np.percentile([h[measured] for h in halves], (5, 50, 95))
            rate, at = f"{middle:.2e} ({low:.2e} to {high:.2e})", np.median([h[threshold] for h in halves])
            lines.append(f"| {student} | {name} | {what} | {inside} | {rate} | {at:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
