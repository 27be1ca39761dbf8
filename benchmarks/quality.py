"""See which measures of quality tell misses in advance on real photographs: error against discard, measure by measure.

Run as: python benchmarks/quality.py [--student RUN]    # for example DIR/shrunk of benchmarks/adoption.py --runs DIR

Without --student it is MobileFaceNet Y1, adopted by the closed-form map.

Real faces come from PKD_SHARED (or ../shared), for research only and not part of the project. Sharpness and exposure
are measured on all crops of test.txt. Eye distance and pose need photographs: those of LFW's DevTest, aligned here by
pkd-align. Writes benchmarks/results/quality.json and the table of docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pkd.toolkit.cli import align, distill, evaluate

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PKD_SHARED") or ROOT.parent / "shared")
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
PAGE = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- figures: benchmarks/quality.py -->\n", "<!-- end of figures of quality -->\n"
TEACHER = ["--teacher", str(SHARED / "models" / "teacher_edgeface_xs_512.onnx"), "--teacher-preprocess"]
TEACHER += ["mean=127.5,std=127.5"]
SHOWN = 0.2
"""Share of the genuine pairs whose discarding the table shows."""
Report = dict[str, Any]


def main() -> int:
    """Measure, and write the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", metavar="RUN", help="run or bundle of a student of EdgeFace-XS")
    parser.add_argument("--bootstrap", type=int, default=100, help="resamples")
    args = parser.parse_args()
    if not (SHARED / "faces").is_dir():
        print(f"skipped: no photographs in {SHARED}. Set PKD_SHARED to the folder that holds faces/ and models/.")
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        crops = folder / "aligned"
        photographs, detector = SHARED / "faces" / "lfw" / "raw-devtest", SHARED / "models" / "yunet_n_dynamic.onnx"
        if align.main([str(photographs), str(crops), "--detector", str(detector), "--jobs", "1"]):
            return 1
        student = args.student or _adopted(folder / "run")
        found: Report = {}
        for what, faces in (("crops", SHARED / "faces" / "splits" / "test.txt"), ("photographs", crops)):
            found[what] = _discards(faces, folder / f"evaluation of {what}", student, args.bootstrap)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_table(found)
    print(f"wrote {RESULTS.relative_to(ROOT)}")
    return 0


def _adopted(run: Path) -> str:
    models = SHARED / "models"
    teacher = [
        "--teacher",
        str(models / "teacher_edgeface_xs_512.onnx"),
        "--teacher-preprocess",
        "mean=127.5,std=127.5",
    ]
    student = ["--student", str(models / "teacher_mobilefacenet_y1_128.onnx"), "--student-preprocess", "mean=0,std=1"]
    faces = ["--faces", str(SHARED / "faces" / "splits" / "train.txt")]
    if distill.main([*teacher, *student, *faces, "--method", "map", "--out", str(run)]):
        raise SystemExit("pkd-distill failed")
    return str(run)


def _discards(faces: Path, out: Path, student: str, resamples: int) -> list[Report]:
    options = [*TEACHER, "--student", student, "--faces", str(faces), "--protocol", "reject"]
    options += ["--fmr", "1e-2", "1e-3", "--bootstrap", str(resamples)]
    if evaluate.main([*options, "--jobs", "1", "--out", str(out)]):
        raise SystemExit(f"pkd-evaluate failed on {faces}")
    report: Report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    discards: list[Report] = report["discards"]
    return discards


def write_table(found: Report) -> None:
    """Put the figures between the marks of docs/evidence.md."""
    lines = [
        "| measure | measured on | genuine pairs, people | misses of all | without the worst fifth | limit there |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for what, discards in found.items():
        for one in discards:
            if one["name"] != "S–T" or (what == "photographs" and one["measure"] in ("sharpness", "exposure")):
                continue
            at = one["fractions"].index(SHOWN)
            low, high = (100 * value for value in one["change_ci95"][at])
            sure = "**" if low > 0 or high < 0 else ""
            lines.append(
                f"| {one['measure']} | {what} | {one['pairs']:,}, {one['identities']:,} | {100 * one['fnmr'][0]:.1f} % "
                f"| {sure}{100 * one['change'][at]:+.1f} points{sure} ({low:+.1f} to {high:+.1f}) "
                f"| {one['limits'][at]:.3g} {one['unit']} |"
            )
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END, 1)[1]
    PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
