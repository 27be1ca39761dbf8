"""Does the certificate of few real people hold on others? Disjoint sets of 60 to 850 people of the real test list.

Run as: python benchmarks/halvings_by_size.py --student BUNDLE        (ten minutes of a core, embeddings included)
        python benchmarks/halvings_by_size.py --student BUNDLE --people 850 --scenarios "two names"   (keeps other rows)

Certify the student against the teacher on one set of people, and measure on another one of the same size, drawn from
the same list: is its FMR inside the prediction interval, no more than the target at the thresholds as a point and as a
bound? The interval of the balanced TAR is compared with the TAR of everyone in the list. Scenarios of who is in a set:
anyone; people with several images only; and anyone, one in fifty of whom stands under two names. It needs the
photographs and teachers of PKD_SHARED (or ../shared). Writes benchmarks/results/halvings_by_size.json.
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
from pkd.toolkit.evaluation.metrics.error_rates import fmr_at, rates
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores, score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Floats, Ints, Pairing

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PKD_SHARED") or ROOT.parent / "shared")
RESULTS = ROOT / "benchmarks" / "results" / "halvings_by_size.json"
TEACHER = ("teacher_edgeface_xs_512.onnx", "channels=rgb,mean=127.5,std=127.5")
RATES = {60: 1e-2, 120: 1e-2, 250: 1e-3, 850: 1e-4}
"""Target false match rate by number of people: about the smallest that they resolve."""
SCENARIOS = ("anyone", "several images", "two names")
TWO_NAMES = 0.02


def main() -> int:
    """Embed, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="bundle or run of a student of the EdgeFace teacher")
    parser.add_argument("--draws", type=int, default=40, help="pairs of sets; a quarter for the largest")
    parser.add_argument("--resamples", type=int, default=100)
    parser.add_argument("--people", type=int, nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    args = parser.parse_args()
    if not (SHARED / "faces").is_dir():
        print("skipped: needs the photographs of PKD_SHARED")
        return 0
    faces = FaceSet.read(SHARED / "faces" / "splits" / "test.txt")
    encoders = open_encoder(args.student), open_encoder(str(SHARED / "models" / TEACHER[0]), TEACHER[1])
    student, teacher = (embed_faces(encoder, faces, cache=default_cache()) for encoder in encoders)
    infos = encoders[0].info, encoders[1].info
    everyone = _scores(faces.labels, student, teacher)
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"rows": []}
    found["identities"] = len(faces.identities)
    for scenario in args.scenarios:
        for people, fmr in ((people, RATES[people]) for people in args.people):
            if scenario == "several images" and people > 250:
                continue  # 711 people have several
            real = float(rates(everyone, np.array([fmr])).tar_balanced[0])
            draws = max(8, args.draws // 4) if people > 250 else args.draws
            made = [_draw(faces.labels, student, teacher, infos, people, fmr, scenario, s, args) for s in range(draws)]
            row = {"people": people, "fmr": fmr, "scenario": scenario, "tar": real, "draws": made}
            others = [r for r in found["rows"] if (r["people"], r["scenario"]) != (people, scenario)]
            found["rows"] = sorted(
                [*others, row | {"student": encoders[0].info.name}],
                key=lambda r: (SCENARIOS.index(r["scenario"]), r["people"]),
            )
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))
    return 0


def _draw(
    labels: Ints,
    student: Floats,
    teacher: Floats,
    infos: tuple[EncoderInfo, EncoderInfo],
    people: int,
    fmr: float,
    scenario: str,
    seed: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    random = np.random.default_rng([seed, people, SCENARIOS.index(scenario)])
    if scenario == "two names":
        twice = random.random(labels.max() + 1) < TWO_NAMES
        labels = np.where(twice[labels] & (random.random(len(labels)) < 0.5), labels + labels.max() + 1, labels)
    owners, count = np.unique(labels, return_counts=True)
    order = random.permutation(owners[count > 1] if scenario == "several images" else owners)
    own, other = (np.isin(labels, side) for side in (order[:people], order[people : 2 * people]))
    scores = _scores(labels[own], student[own], teacher[own])
    comparison, _ = measure(scores, "S–T", *infos, fmrs=[fmr], resamples=args.resamples, seed=seed)
    fresh = _scores(labels[other], student[other], teacher[other])
    point = comparison.points[0]
    assured = [one.threshold if one else 2.0 for one in (point.as_point, point.as_bound)]
    at = fmr_at(fresh, np.array([point.threshold, *assured]))
    return {
        "prediction95": point.prediction95,
        "tar_ci95": point.tar_balanced_ci95,
        "people": comparison.effective_people[0],
        "measured": at.tolist(),
        "resolved": [point.as_point is not None, point.as_bound is not None],
        "tar": [point.tar_balanced, *(one.tar_balanced if one else None for one in (point.as_point, point.as_bound))],
    }


def _scores(labels: Ints, query: Floats, gallery: Floats) -> PairScores:
    people, dense = np.unique(labels, return_inverse=True)
    files, dense = np.arange(len(labels)), dense.astype(np.int64)
    return score_pairs(Pairing(dense, dense, files, files, len(people), unordered=False), query, gallery)


def table(found: dict[str, Any]) -> str:
    """Write the table in Markdown."""
    lines = [
        f"Disjoint sets of people of the {found['identities']:,} of the test list, students against EdgeFace. FMR of "
        "the other set: inside the prediction interval; its mean over the target at the measured threshold, as a point "
        "and as a bound. TAR interval: of how many it holds everyone's TAR.",
        "",
        "| student | people | FMR | who | draws | effective people | in prediction | mean rate over target | "
        "TAR interval | bound costs, points |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found["rows"]:
        draws = row["draws"]
        inside = sum(d["prediction95"][0] <= d["measured"][0] <= d["prediction95"][1] for d in draws)
        held = sum(d["tar_ci95"][0] <= row["tar"] <= d["tar_ci95"][1] for d in draws)
        ratios, cost = [], []
        for place in range(3):
            usable = [d for d in draws if place == 0 or d["resolved"][place - 1]]
            ratios.append(f"{np.mean([d['measured'][place] for d in usable]) / row['fmr']:.2f}" if usable else "–")
        cost = [100 * (d["tar"][0] - d["tar"][2]) for d in draws if d["resolved"][1]]
        costs = f"{np.mean(cost):.1f}" if cost else "–"
        lines.append(
            f"| {row['student']} | {row['people']} | {row['fmr']:g} | {row['scenario']} | {len(draws)} | "
            f"{np.median([d['people'] for d in draws]):.0f} | {inside} | {'; '.join(ratios)} | {held} | {costs} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
