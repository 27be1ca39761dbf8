"""Backbones at equal latency: accuracy on val.txt, size, onnxruntime milliseconds and training speed.

Run as: python benchmarks/backbones.py             (about 7 minutes of one core for each student)
        python benchmarks/backbones.py --students mobilefacenet-relu:0.5 --steps 50 --out runs/quick

Every student is trained by pkd-distill with l2kd on the same images in the same order, then judged by pkd-evaluate as a
query against the teacher's gallery. What the output folder already holds is kept; an unfinished training is resumed.
Latency is measured through pkd-export's graph, all students by turns. Rows of students that BACKBONES no longer has
stay in benchmarks/results/backbones.json with the commit that had them. Needs the photographs of PKD_SHARED (or
../shared).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pkd.export.to_onnx import serialise, torch_network, uint8_graph
from pkd.toolkit.distill.backbones import build, parameters
from pkd.toolkit.distill.student import load_student
from pkd.toolkit.runtime import make_session

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PKD_SHARED") or ROOT.parent / "shared")
TEACHER = ("teacher_edgeface_xs_512.onnx", "channels=rgb,mean=127.5,std=127.5")
RESULTS = ROOT / "benchmarks" / "results" / "backbones.json"
BASELINE = "mobilefacenet-relu:0.5"
STUDENTS = (BASELINE, "mobilenetv4:0.6", "repvit:0.67", "starnet:0.33")
DIM, SIZE, BATCH = 512, 112, 64


def main() -> int:
    """Train and judge what is missing, measure everything, write the JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=STUDENTS, help=f"the first is the baseline ({BASELINE} …)")
    parser.add_argument("--steps", type=int, default=500, help=f"of {BATCH} images (500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "backbones", help="trainings and evaluations")
    args = parser.parse_args()
    if not (SHARED / "faces").is_dir():
        print(f"skipped: no photographs in {SHARED}. Set PKD_SHARED to the folder that holds faces/ and models/.")
        return 0
    torch.set_num_threads(1)
    runs = {student: trained(args, student) for student in args.students}
    latencies, rates = milliseconds(runs), training_rates(args.students)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    rows = {
        student: {
            "parameters": parameters(build(student, DIM)),
            "multiply_adds": multiply_adds(student),
            "onnxruntime_ms": latencies[student],
            "training_images_per_cpu_second": rates[student],
            "accuracy": accuracy(run),
            "commit": commit,
        }
        for student, run in runs.items()
    }
    settings = {"steps": args.steps, "batch": BATCH, "seed": args.seed, "method": "l2kd", "baseline": args.students[0]}
    results = {"settings": settings, "students": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {RESULTS.relative_to(ROOT)}\n\n{table(results)}")
    return 0


def trained(args: argparse.Namespace, student: str) -> Path:
    """The run folder of ``student`` at the common budget."""
    run: Path = args.out / student.replace(":", "-")
    splits = SHARED / "faces" / "splits"
    if not (run / "student.pt").is_file():
        resume = ["--resume"] if (run / "checkpoint.pt").is_file() else []
        command(
            "pkd-distill", *teacher_options(), "--method", "l2kd", "--faces", str(splits / "train.txt"),
            "--unlabelled", str(splits / "train_unlabelled.txt"), "--student", student, "--steps", str(args.steps),
            "--batch", str(BATCH), "--lr", "0.02", "--augment", "0.1", "--precision", "fp32", "--threads", "1",
            "--seed", str(args.seed), "--out", str(run), *resume,
        )  # fmt: skip
    return run


def accuracy(run: Path) -> dict[str, Any]:
    """Points of student query against teacher gallery on val.txt, from pkd-evaluate's report."""
    folder = run / "evaluation"
    if not (folder / "report.json").is_file():
        faces = str(SHARED / "faces" / "splits" / "val.txt")
        command("pkd-evaluate", *teacher_options(), "--student", str(run), "--faces", faces, "--out", str(folder))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    found = next(c for c in report["comparisons"] if c["name"] == "S–T")
    kept = ("genuine_identities", "genuine_pairs", "impostor_pairs", "eer", "points")
    return {key: found[key] for key in kept} | {"cosine": report["agreement"]["mean"]}


def teacher_options() -> list[str]:
    """``--teacher`` and ``--teacher-preprocess``."""
    return ["--teacher", str(SHARED / "models" / TEACHER[0]), "--teacher-preprocess", TEACHER[1]]


def command(name: str, *options: str) -> None:
    """Run one of pkd's commands; a failure ends the benchmark with its message."""
    print("$", name, *options, flush=True)
    subprocess.run([str(Path(sys.executable).with_name(name)), *options], check=True)


def milliseconds(runs: dict[str, Path], rounds: int = 100) -> dict[str, float]:
    """Median CPU time of one crop through the exported graph, one thread, the students by turns."""
    sessions = {}
    for student, run in runs.items():
        encoder = load_student(run)
        for part in encoder.module.modules():
            if hasattr(part, "fuse"):
                part.fuse()
        network = torch_network(encoder.module, SIZE)
        sessions[student] = make_session(serialise(uint8_graph(network, encoder.info.preprocess, DIM)), 1)
    crop = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
    times: dict[str, list[float]] = {student: [] for student in runs}
    for _ in range(rounds):
        for student, session in sessions.items():
            for _ in range(3):  # the last of three: caches warm, as in a stream of requests
                before = time.thread_time()
                session.run(None, {"crops": crop})
                taken = time.thread_time() - before
            times[student].append(1e3 * taken)
    return {student: statistics.median(t) for student, t in times.items()}


def training_rates(students: list[str], rounds: int = 6) -> dict[str, float]:
    """Images per CPU-second of forward, backward and AdamW on random pixels, the students by turns (median)."""
    pixels = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    target = torch.nn.functional.normalize(torch.randn(BATCH, DIM))
    networks = {s: build(s, DIM).train().to(memory_format=torch.channels_last) for s in students}  # type: ignore[call-overload]
    optimisers = {s: torch.optim.AdamW(network.parameters(), lr=1e-3) for s, network in networks.items()}
    times: dict[str, list[float]] = {student: [] for student in students}
    for _ in range(rounds):
        for student, network in networks.items():
            before = time.process_time()
            loss = (torch.nn.functional.normalize(network(pixels)) - target).square().sum(dim=1).mean()
            optimisers[student].zero_grad(set_to_none=True)
            loss.backward()
            optimisers[student].step()
            times[student].append(time.process_time() - before)
    return {student: BATCH / statistics.median(t[1:]) for student, t in times.items()}


def multiply_adds(student: str) -> int:
    """Multiplications of convolutions and linear layers for one crop."""
    total = 0

    def count(module: nn.Module, _: Any, out: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d | nn.Linear):
            total += out.numel() * module.weight[0].numel()

    with torch.device("meta"):
        network = build(student, DIM).eval()
        for module in network.modules():
            module.register_forward_hook(count)
        network(torch.zeros(1, 3, SIZE, SIZE))
    return total


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown, the best S–T rate first."""
    settings, rows = results["settings"], results["students"]
    base = rows[settings["baseline"]]
    images = settings["steps"] * settings["batch"]
    pairs = base["accuracy"]
    head = (
        "student", "parameters", "multiply-adds", "onnxruntime CPU ms", "training images per CPU-second",
        "S–T TAR at FMR 1e-2", "S–T TAR at FMR 1e-3", "mean cosine to the teacher",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for student, row in sorted(rows.items(), key=lambda item: -rate(item[1], 1e-3)["tar_balanced"]):
        ratio = row["onnxruntime_ms"] / base["onnxruntime_ms"]
        cells = (
            f"`{student}`",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['multiply_adds'] / 1e6:.0f} M",
            f"{row['onnxruntime_ms']:.2f} ({ratio:.2f}×)",
            f"{row['training_images_per_cpu_second']:.0f}",
            *(interval(rate(row, fmr)) for fmr in (1e-2, 1e-3)),
            f"{row['accuracy']['cosine']:.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return (
        f"Teacher EdgeFace-XS, method `{settings['method']}`, {settings['steps']:,} steps of {settings['batch']} "
        f"images ({images:,} in all), the same images in the same order for every student; one seed "
        f"({settings['seed']}), so that differences between seeds are not in the intervals. Latency: one crop on one "
        f"thread through the exported graph, against `{settings['baseline']}`. Accuracy: val.txt, {pairs['genuine_pairs']:,} genuine pairs of "
        f"{pairs['genuine_identities']:,} people, every identity weighing the same, with 95 % intervals.\n\n"
        + "\n".join(lines)
    )


def rate(row: dict[str, Any], fmr: float) -> dict[str, Any]:
    """The operating point at ``fmr``."""
    point: dict[str, Any] = next(p for p in row["accuracy"]["points"] if abs(p["fmr"] / fmr - 1) < 1e-6)
    return point


def interval(point: dict[str, Any]) -> str:
    """``0.401 (0.377–0.424)``."""
    low, high = point["tar_balanced_ci95"]
    return f"{point['tar_balanced']:.3f} ({low:.3f}–{high:.3f})"


if __name__ == "__main__":
    sys.exit(main())
