"""The browser against Python: the same photographs in Chromium and in pkd, accuracy, visits, milliseconds per step.

Run as: python benchmarks/browser.py              (about 15 minutes, 10 of them for the student, on two cores)
        python benchmarks/browser.py --photographs 600 --out runs/browser
        python benchmarks/browser.py --without-accuracy     (3 minutes; accuracy and steps stay those of the last run)

Student: MobileFaceNet Y1 behind a map into EdgeFace-XS (docs/adoption.md), fitted on 1,500 photographs of people of LFW
who are in no test set. A real pkd-serve hands page, student and detector out to Debian's Chromium, headless; the
browser decodes, detects, aligns and embeds LFW's DevTest photographs and one photograph in every awkward form, and
Python does the same with OpenCV and onnxruntime. S–T TAR: queries by the student, from the browser or from Python,
against the teacher's embeddings of the same photographs; people weigh the same. Times are of the wall clock inside the
tab, on the machine as it is, beside native times in the same state. Bytes are what came over the network, headers
included. Needs chromium and PKD_SHARED (or ../shared). Writes benchmarks/results/browser.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.encoders.base import Encoder, open_bundle
from pkd.toolkit.encoders.detector import Detector, choose, open_detector
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.protocols.all_pairs import pair_up
from pkd.toolkit.images.alignment import warp
from pkd.toolkit.images.codec import decode_rgb, read_rgb

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support import browser_device  # noqa: E402
from tests.support.browser import browsing, missing  # noqa: E402
from tests.support.server_process import serving  # noqa: E402

SHARED = Path(os.environ.get("PKD_SHARED") or ROOT.parent / "shared")
RESULTS = ROOT / "benchmarks" / "results" / "browser.json"
RAW = SHARED / "faces/lfw/raw-devtest"
DETECTOR = SHARED / "models/yunet_n_640_640.onnx"
COMPARED = 100
"""Photographs of which every intermediate result is compared."""
FMRS = (1e-2, 1e-3)
Figures = dict[str, Any]


def main() -> int:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=600, help="photographs for the accuracy")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "browser", help="student and bundles (runs/browser)"
    )
    parser.add_argument(
        "--without-accuracy", action="store_true", help="keep accuracy and milliseconds of the last run"
    )
    args = parser.parse_args()
    if reason := missing() or (None if RAW.is_dir() else f"no photographs in {SHARED}; set PKD_SHARED"):
        print(f"skipped: {reason}")
        return 0
    cv2.setNumThreads(1)
    teacher, student = bundles(args.out)
    encoder, detector = open_bundle(Bundle.open(student)), open_detector(str(DETECTOR))
    with tempfile.TemporaryDirectory() as folder, serving(teacher, student, "--detector", DETECTOR) as server:
        results: Figures = {"visits": visits(server.url, Path(folder))}
        print(json.dumps(results), flush=True)
        with browsing(Path(folder) / "profile") as browser:
            page = browser.page()
            opened = browser_device.open_device(page, server.url, "student")
            results["browser"] = page.run("navigator.userAgent").rpartition("HeadlessChrome/")[2].split()[0]
            results["threads"] = page.run("navigator.hardwareConcurrency")
            results["golden_error"] = opened["goldenError"]
            paths = photographs(args.photographs)
            compared = [(path.name, path.read_bytes()) for path in paths[:COMPARED]]
            results["photographs"] = compare(page, compared, encoder, detector)
            del results["photographs"]["each"]  # names of people
            print(json.dumps(results["photographs"]["worst"]), flush=True)
            awkward = browser_device.awkward(read_rgb(paths[0]))
            results["awkward"] = compare(page, list(awkward.items()), encoder, detector)
            print(json.dumps(results["awkward"]["worst"]), flush=True)
            if args.without_accuracy:
                before = json.loads(RESULTS.read_text(encoding="utf-8"))
                results |= {name: before[name] for name in ("accuracy", "milliseconds")} | {"accuracy_kept": True}
            else:
                gallery = open_bundle(Bundle.open(teacher))
                results["accuracy"], results["milliseconds"] = accuracy(page, paths, encoder, gallery, detector)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))
    return 0


def bundles(out: Path) -> tuple[Path, Path]:
    """Make teacher and student, unless ``out`` holds them already."""
    made = out / "teacher", out / "student"
    if all((path / "manifest.json").is_file() for path in made):
        return made
    lines = [one.split()[0] for one in (SHARED / "faces/splits/train.txt").read_text(encoding="utf-8").splitlines()]
    taken = [line for line in lines if line.startswith("lfw")]
    random.Random(1).shuffle(taken)
    for line in taken[:1500]:
        path = out / "faces" / Path(line).parent.name / Path(line).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(SHARED / "faces" / line)
    models = SHARED / "models"
    teacher = ["--teacher", models / "teacher_edgeface_xs_512.onnx", "--teacher-preprocess", "mean=127.5,std=127.5"]
    student = ["--student", models / "teacher_mobilefacenet_y1_128.onnx", "--student-preprocess", "mean=0,std=1"]
    student += ["--method", "map", "--faces", out / "faces", "--name", "student", "--out", out / "run"]
    run("pkd-distill", *teacher, *student)
    run("pkd-export", out / "run", "-o", made[1])
    run("pkd-export", *teacher, "-o", made[0])
    return made


def run(command: str, *arguments: object) -> None:
    """Run a command of pkd."""
    subprocess.run([str(Path(sys.executable).with_name(command)), *map(str, arguments)], check=True)


def photographs(count: int) -> list[Path]:
    """Choose photographs of people who have several, and then of others; the first ones of as many people as can be."""
    folders = [sorted(one.glob("*.jpg")) for one in sorted(RAW.iterdir())]
    folders.sort(key=lambda paths: len(paths) < 2)
    rounds = [paths[turn] for turn in range(2) for paths in folders if len(paths) > turn]
    several = [path for paths in folders if len(paths) > 1 for path in paths[:4]]
    chosen = dict.fromkeys([*rounds[:COMPARED], *several, *rounds])
    return list(chosen)[:count]


def compare(page: Any, files: Sequence[tuple[str, bytes]], encoder: Encoder, detector: Detector) -> Figures:
    """Compare each step in the tab with Python's → the worst of those with equal pixels, and all."""
    each: Figures = {}
    for name, data in files:
        image = decode_rgb(data)
        landmarks = choose(detector.detect(image), image).landmarks
        crop = warp(image, landmarks)
        wanted = encoder.embed(crop[None])[0].astype(np.float64)
        made = browser_device.embed(page, data, pixels=image.size < 10e6)
        if "error" in made:
            each[name] = made
            continue
        got = made["embedding"].astype(np.float64)
        each[name] = {
            "pixels": None if made["rgb"] is None else int(np.abs(made["rgb"].astype(int) - image).max()),
            "landmarks": float(np.linalg.norm(made["landmarks"] - landmarks, axis=1).max()),
            "crop": int(np.abs(made["crop"].astype(int) - crop).max()),
            "one_minus_cosine": float(1 - got @ wanted / np.linalg.norm(got) / np.linalg.norm(wanted)),
        }
    fields = ("pixels", "landmarks", "crop", "one_minus_cosine")
    alike = [one for one in each.values() if not one.get("pixels")]
    worst = {field: max(one.get(field) or 0 for one in alike) for field in fields}
    failed = [name for name, one in each.items() if "error" in one]
    return {"files": len(each), "failed": failed, "worst": worst, "each": each}


def accuracy(
    page: Any, paths: Sequence[Path], encoder: Encoder, teacher: Encoder, detector: Detector
) -> tuple[Figures, Figures]:
    """Measure S–T TAR with queries of the browser and of Python, and the median milliseconds of each step in both."""
    queries: dict[str, list[Any]] = {"browser": [], "python": []}
    gallery, times = [], {"browser": list[Figures](), "python": list[Figures]()}
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(paths):
            made = browser_device.embed(page, path.read_bytes(), crop=False)
            clock = [time.perf_counter()]
            image = decode_rgb(path.read_bytes())
            clock.append(time.perf_counter())
            face = choose(detector.detect(image), image)
            clock.append(time.perf_counter())
            crop = warp(image, face.landmarks)
            clock.append(time.perf_counter())
            queries["python"].append(encoder.embed(crop[None])[0])
            clock.append(time.perf_counter())
            queries["browser"].append(made["embedding"])
            gallery.append(teacher.embed(crop[None])[0])
            times["browser"].append(made["ms"])
            steps = zip(("decode", "detect", "align", "embed"), np.diff(clock) * 1000, strict=True)
            times["python"].append(dict(steps))
            place = Path(folder) / path.parent.name / path.name
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(path)
            if number % 100 == 99:
                print(f"{number + 1} photographs", flush=True)
        faces = FaceSet.read(folder)
        place_of = {path.name: number for number, path in enumerate(paths)}
        order = [place_of[Path(faces.name(number)).name] for number in range(len(faces))]
        _, pairing = pair_up(faces, faces, "DevTest", None)
    figures: Figures = {"photographs": len(paths), "people": len(faces.identities)}
    figures["genuine_pairs"] = int(pairing.genuine_pairs)
    for name, vectors in queries.items():
        scores = score_pairs(pairing, np.stack(vectors)[order], np.stack(gallery)[order])
        found, _ = measure(scores, "S–T", encoder.info, teacher.info, fmrs=FMRS, resamples=1000, seed=0)
        figures[name] = [
            {"fmr": one.fmr, "tar": one.tar_balanced, "ci95": list(one.tar_balanced_ci95), "raw_tar": one.tar}
            for one in found.points
        ]
    figures["within"] = [
        inner["ci95"][0] <= outer["tar"] <= inner["ci95"][1]
        for outer, inner in zip(figures["browser"], figures["python"], strict=True)
    ]
    medians = {
        name: {step: float(statistics.median(one[step] for one in found[10:])) for step in found[0]}
        for name, found in times.items()
    }
    return figures, medians


VISIT = """(() => {
  const loaded = [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")];
  const mark = (name) => performance.getEntriesByName(name)[0]?.startTime ?? null;
  return {
    bytes: loaded.reduce((sum, one) => sum + one.transferSize, 0),
    requests: loaded.length,
    ready_ms: mark("pkd-ready"),
    first_embedding_ms: mark("pkd-embedded"),
  };
})()"""


def visits(url: str, folder: Path) -> Figures:
    """Open the page twice with one profile, in two browsers → bytes and milliseconds of each visit."""
    found: Figures = {}
    for name in ("first", "second"):
        with browsing(folder / "visitor") as browser:
            page = browser.page()
            page.open(url)
            page.until("document.querySelector('#work')?.hidden === false")
            page.choose_files("#file", next(RAW.glob("*/*.jpg")))
            page.until("performance.getEntriesByName('pkd-embedded').length")
            page.run("new Promise((done) => setTimeout(done, 500))")
            found[name] = page.run(VISIT)
            processes = browser.call("SystemInfo.getProcessInfo", {})["processInfo"]
            found[name]["tab_cpu_s"] = sum(one["cpuTime"] for one in processes if one["type"] == "renderer")
            page.send("Browser.close")  # writes its cache to the disk
            browser.process.wait(30)
    return found


def table(made: Figures) -> str:
    """Write the section of docs/performance.md."""
    visits, times, accuracy = made["visits"], made["milliseconds"], made["accuracy"]
    lines = [
        f"Chromium {made['browser']}, {made['threads']} threads, headless, against Python on the same machine.",
        "Student: an adopted MobileFaceNet (4.8 MB) behind a map into EdgeFace-XS. Times are of the wall clock, of",
        "both in turns on a machine that was busy with other work: compare them with one another. Bytes do not depend",
        "on it, CPU seconds little."
        + (" Accuracy and steps are of the run before this one." if made.get("accuracy_kept") else ""),
        "",
        "| against Python, worst | files | pixels | landmarks, pixels | crop, grey levels | 1 − cosine |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    others = [
        f"{name} (1 − cosine {one['one_minus_cosine']:.1e})"
        for name, one in made["awkward"]["each"].items()
        if one.get("pixels")
    ]
    for name, what in (("photographs", "photographs of DevTest"), ("awkward", "one in awkward forms")):
        one = made[name]["worst"]
        row = f"{one['pixels']} | {one['landmarks']:.1e} | {one['crop']} | {one['one_minus_cosine']:.1e}"
        files = made[name]["files"] - (len(others) if name == "awkward" else 0)
        lines.append(f"| {what} | {files} | {row} |")
    lines += ["", f"Decoded in another way by the browser alone: {', '.join(others) or 'none'}.", ""]
    lines += ["| visit | bytes | requests | ready, s | first embedding, s | CPU seconds of the tab |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for name, one in visits.items():
        ready, first = one["ready_ms"] / 1000, one["first_embedding_ms"] / 1000
        numbers = f"{one['bytes']:,} | {one['requests']} | {ready:.1f} | {first:.1f} | {one['tab_cpu_s']:.1f}"
        lines.append(f"| {name} | {numbers} |")
    lines += ["", "| median ms | decode | detect | align | embed |", "| --- | --- | --- | --- | --- |"]
    for name, one in times.items():
        cells = " | ".join(f"{one[step]:.1f}" for step in ("decode", "detect", "align", "embed"))
        lines.append(f"| {name} | {cells} |")
    people = f"{accuracy['photographs']} photographs of {accuracy['people']} people"
    lines += ["", f"S–T TAR on {people}, people weighing the same:", ""]
    lines += ["| queries embedded in | FMR | TAR | 95 % interval |", "| --- | --- | --- | --- |"]
    for name in ("browser", "python"):
        for one in accuracy[name]:
            low, high = one["ci95"]
            lines.append(f"| {name} | {one['fmr']:g} | {one['tar']:.4f} | {low:.4f} to {high:.4f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
