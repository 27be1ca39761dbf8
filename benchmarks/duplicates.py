"""Plant people under two names among 5,000 subjects, and count who is found and who is doubted by chance.

Run as: python benchmarks/duplicates.py

Made-up people come from benchmarks/drift.py, real ones from PKD_SHARED (or ../shared), for research only and not part
of the project. The certificate is of other people each time. Writes benchmarks/results/duplicates.json and the table of
docs/galleries.md.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from drift import FMRS, World, certify
from numpy.typing import NDArray

from pkd.serving.galleries.review import review
from pkd.serving.galleries.store import Subject, Template
from pkd.serving.matching.identification import per_comparison
from pkd.toolkit.certificates.certificate import Certificate
from pkd.toolkit.certificates.extrapolation import threshold_for
from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.encoders.base import open_onnx
from pkd.toolkit.encoders.embed import default_cache, embed_stored
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PKD_SHARED") or ROOT.parent / "shared")
RESULTS = ROOT / "benchmarks" / "results" / "duplicates.json"
PAGE = ROOT / "docs" / "galleries.md"
BEGIN, END = "<!-- figures: benchmarks/duplicates.py -->\n", "<!-- end of figures of duplicates -->\n"
SUBJECTS, PLANTED = 5000, 200
EXPECTED = (0.1, 1.0, 10.0)
FPIR = 0.01
Rows = NDArray[np.float32]
Report = dict[str, Any]


def main() -> int:
    """Measure, and write the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--galleries", type=int, default=10, help="made-up galleries, each with a certificate of its own"
    )
    parser.add_argument("--real", action="store_true", help="measure real faces alone")
    args = parser.parse_args()
    results: Report = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if not args.real:
        made = [simulated(i) for i in range(args.galleries)]
        results = {
            "subjects": SUBJECTS, "planted": PLANTED, "galleries": len(made),
            "simulated": {name: _mean([one[name] for one in made]) for name in made[0]},
        }  # fmt: skip
    if (SHARED / "faces").is_dir():
        results["real"] = real_faces()
    else:
        print(f"skipped: no photographs in {SHARED}. Set PKD_SHARED to the folder that holds faces/ and models/.")
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_table(results)
    print(json.dumps(results, indent=1))
    return 0


def simulated(seed: int) -> Report:
    """Certify 1,700 made-up people, enrol 5,000 others and 200 of them twice, and look."""
    random = np.random.default_rng([3, seed])
    certificate = certify(random, 1700)
    world = World(random)
    people = world.people(SUBJECTS)
    twice = random.permutation(SUBJECTS)[:PLANTED]
    gallery, second = world.images(people), world.images(people[twice])
    strangers = world.images(world.people(2000))
    return found(certificate, gallery, second, [f"p{i}" for i in twice]) | enrolments(
        certificate, gallery, second, twice, strangers
    )


def found(certificate: Certificate, gallery: Rows, second: Rows, planted: Sequence[str]) -> Report:
    """Review a gallery of one template each; ``planted``: subjects whose second image has a name of its own."""
    subjects = [_subject(f"p{i}", row) for i, row in enumerate(gallery)]
    subjects += [_subject(f"{name} again", row) for name, row in zip(planted, second, strict=True)]
    right = {frozenset((name, f"{name} again")) for name in planted}
    report: Report = {}
    for expected in EXPECTED:
        pairs = review(subjects, {(ENCODER, ENCODER): certificate}, expected_false=expected).pairs
        hits = sum(frozenset((one.subject, one.other)) in right for one in pairs)
        report[f"at {expected:g}"] = {
            "recall": hits / len(right), "precision": hits / max(len(pairs), 1), "false_pairs": len(pairs) - hits,
        }  # fmt: skip
    return report


def enrolments(
    certificate: Certificate, gallery: Rows, second: Rows, twice: NDArray[np.int64], strangers: Rows
) -> Report:
    """Enrol one by one: new people, and people who are there under another name."""
    needed = threshold_for(certificate, per_comparison(FPIR, len(gallery)))
    own = np.einsum("nd,nd->n", second, gallery[twice])
    return {
        "enrolment": {
            "strangers_doubted": float(((strangers @ gallery.T).max(axis=1) >= needed.score).mean()),
            "twice_doubted": float((own >= needed.score).mean()),
            "promised": FPIR,
        }
    }


def real_faces() -> Report:
    """Certify on the people of test.txt; enrol those of LFW in train.txt but for 500, and 200 of them twice.

    Other sets there hold relatives, and people of LFW under other names: no false alarms could be counted.
    """
    cache, faces = default_cache(), SHARED / "faces" / "splits"
    encoder = open_onnx(SHARED / "models" / "teacher_edgeface_xs_512.onnx", Preprocess())
    test, train = FaceSet.read(faces / "test.txt"), FaceSet.read(faces / "train.txt")
    rows, others = (embed_stored(encoder, faces, cache=cache)[:] for faces in (test, train))
    certificate = _certified(rows, test.labels)
    random = np.random.default_rng(0)
    counts = np.bincount(train.labels)
    lfw = np.array(["lfw/" in name or name.split("/")[0] == "lfw" for name in train.identities])
    order = random.permutation(np.flatnonzero(lfw))[500:]
    first = {int(label): row for row, label in reversed(list(enumerate(train.labels)))}
    last = {int(label): row for row, label in enumerate(train.labels)}
    several = random.permutation([i for i, label in enumerate(order) if counts[label] > 1 and lfw[label]])[:PLANTED]
    gallery = others[[first[int(label)] for label in order]]
    second = others[[last[int(order[i])] for i in several]]
    report = found(certificate, gallery, second, [f"p{i}" for i in several])
    left_out = np.setdiff1d(np.flatnonzero(lfw), order)
    strangers = others[[first[int(label)] for label in left_out]]
    return {
        "subjects": len(order), "strangers": len(strangers), **report,
        **enrolments(certificate, gallery, second, np.asarray(several), strangers),
    }  # fmt: skip


def _certified(rows: Rows, labels: NDArray[np.int64]) -> Certificate:
    files, people = np.arange(len(labels)), int(labels.max()) + 1
    pairing = Pairing(labels, labels, files, files, people, unordered=True)
    info = describe("encoder", "teacher", "00", Preprocess(), rows.shape[1])
    c, _ = measure(score_pairs(pairing, rows, rows, seed=0), "T–T", info, info, fmrs=FMRS, resamples=100, seed=0)
    return certify(np.random.default_rng(0), 60).model_copy(
        update={
            "points": c.points, "calibration": c.calibration, "min_fmr": c.min_fmr, "identities": people,
            "resolved_scores": c.calibration.resolved_scores,
            "identity_pairs": c.identity_pairs, "impostor_pairs": c.impostor_pairs,
        }
    )  # fmt: skip


ENCODER = "encoder"


def _subject(name: str, row: Rows) -> Subject:
    return Subject(name, (Template(name, ENCODER, "space", 0.0, None, row),), {}, None)


def _mean(many: Sequence[Report]) -> Report:
    return {name: float(np.mean([one[name] for one in many])) for name in many[0]}


def write_table(results: Report) -> None:
    """Put the figures between the marks of docs/galleries.md."""
    if not PAGE.is_file() or BEGIN not in PAGE.read_text(encoding="utf-8"):
        return
    lines = [
        "| people | false pairs allowed | false pairs | found | of the list right |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, title in (("simulated", "made up, mean of ten galleries"), ("real", "real, one gallery")):
        for expected in EXPECTED if name in results else ():
            one = results[name][f"at {expected:g}"]
            lines.append(
                f"| {title} | {expected:g} | {one['false_pairs']:.1f} | {100 * one['recall']:.1f} % "
                f"| {100 * one['precision']:.1f} % |"
            )
    for name, title in (("simulated", "Made-up"), ("real", "Real")):
        if name in results:
            one = results[name]["enrolment"]
            lines += [
                "",
                f"{title} people at enrolment, FPIR {FPIR:g} promised: {100 * one['strangers_doubted']:.2f} % of new "
                f"people are doubted, and {100 * one['twice_doubted']:.1f} % of those who are there under another one.",
            ]
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END, 1)[1]
    PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
