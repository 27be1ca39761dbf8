"""Backbones at equal latency: accuracy on val.txt, size, onnxruntime milliseconds and training speed.

Run as: python benchmarks/backbones.py             (about 5 minutes of one core for each student)
        python benchmarks/backbones.py --students mobilefacenet-relu:0.5 --steps 50 --out runs/quick

Every student is trained by pkd-distill with l2kd on the same images in the same order, then judged by pkd-evaluate as a
query against the teacher's gallery. What the output folder already holds is kept; an unfinished training is resumed.
Latency and training speed are measured here, all students by turns, and kept as ratios to the first. Students that are
not asked for keep their rows in benchmarks/results/backbones.json; each row names the commit that measured it, since
BACKBONES keeps only what was chosen. Needs the photographs of PKD_SHARED (or ../shared).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_faces import EDGEFACE, ROOT, SHARED, Report, command, evaluate, markdown_table, prose, teacher_options
from torch import nn
from torch.nn.functional import normalize

from pkd.export.draft import open_run
from pkd.export.graph.build import serialise, uint8_graph
from pkd.toolkit.distill.models.backbones import build, parameters
from pkd.toolkit.encoders.base import make_session

RESULTS = ROOT / "benchmarks" / "results" / "backbones.json"
STUDENTS = ("mobilefacenet-relu:0.5", "repvit:0.67")
DIM, SIZE, BATCH = 512, 112, 64


def main() -> int:
    """Train and judge what is missing, measure everything, write the JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=STUDENTS, help=f"the first is the baseline ({STUDENTS[0]} …)")
    parser.add_argument("--steps", type=int, default=250, help=f"of {BATCH} images (250)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "backbones", help="trainings and evaluations")
    args = parser.parse_args()
    if not (SHARED / "faces").is_dir():
        print(f"skipped: no photographs in {SHARED}. Set PKD_SHARED to the folder that holds faces/ and models/.")
        return 0
    torch.set_num_threads(1)
    runs = {student: trained(args, student) for student in args.students}
    accuracies = {student: accuracy(run) for student, run in runs.items()}
    latencies, rates, commit = milliseconds(runs), training_rates(args.students), head_commit()
    settings = {"steps": args.steps, "batch": BATCH, "seed": args.seed, "method": "l2kd", "baseline": args.students[0]}
    settings["fmr"] = "every two people alike"
    rows = earlier(settings)
    for student in args.students:
        rows[student] = {
            "parameters": parameters(build(student, DIM)),
            "multiply_adds": multiply_adds(student),
            "onnxruntime_ms": latencies[student],
            "latency_ratio": latencies[student] / latencies[args.students[0]],
            "training_images_per_cpu_second": rates[student],
            "training_ratio": rates[student] / rates[args.students[0]],
            "accuracy": accuracies[student],
            "commit": commit,
        }
    results = {"settings": settings, "students": rows}
    RESULTS.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {RESULTS.relative_to(ROOT)}\n\n{table(results)}")
    return 0


def earlier(settings: dict[str, Any]) -> dict[str, Any]:
    """Rows of the last results, where they were made with the same settings."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    rows: dict[str, Any] = found["students"] if found.get("settings") == settings else {}
    return rows


def head_commit() -> str:
    """Return the commit that is checked out, or nothing outside a repository."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def trained(args: argparse.Namespace, student: str) -> Path:
    """Return the run folder of ``student`` at the common budget."""
    run: Path = args.out / student.replace(":", "-")
    splits = SHARED / "faces" / "splits"
    if not (run / "student.pt").is_file():
        resume = ["--resume"] if (run / "checkpoint.pt").is_file() else []
        command(
            "pkd-distill", *teacher_options(EDGEFACE), "--method", "l2kd", "--faces", str(splits / "train.txt"),
            "--unlabelled", str(splits / "train_unlabelled.txt"), "--student", student, "--steps", str(args.steps),
            "--batch", str(BATCH), "--lr", "0.02", "--augment", "0.1", "--precision", "fp32", "--threads", "1",
            "--seed", str(args.seed), "--out", str(run), *resume,
        )  # fmt: skip
    return run


def accuracy(run: Path) -> dict[str, Any]:
    """Points of student query against teacher gallery on val.txt, from pkd-evaluate's report."""
    val = str(SHARED / "faces" / "splits" / "val.txt")
    report = evaluate(run / "evaluation", EDGEFACE, "--student", str(run), "--faces", val)
    found = next(c for c in report["comparisons"] if c["name"] == "S–T")
    kept = ("genuine_identities", "genuine_pairs", "impostor_pairs", "eer", "points")
    return {key: found[key] for key in kept} | {"cosine": report["agreement"]["mean"]}


def milliseconds(runs: dict[str, Path], rounds: int = 100) -> dict[str, float]:
    """Median CPU time of one crop through the exported graph, one thread, the students by turns."""
    sessions = {}
    for student, run in runs.items():
        source = open_run(str(run))
        graph = uint8_graph(source.network, source.info.preprocess, DIM)
        sessions[student] = make_session(serialise(graph), 1)
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
    target = normalize(torch.randn(BATCH, DIM))
    networks: dict[str, nn.Module] = {s: build(s, DIM).train().to(memory_format=torch.channels_last) for s in students}  # type: ignore[call-overload]
    optimisers = {s: torch.optim.AdamW(network.parameters(), lr=1e-3) for s, network in networks.items()}
    times: dict[str, list[float]] = {student: [] for student in students}
    for _ in range(rounds):
        for student, network in networks.items():
            before = time.process_time()
            loss = (normalize(network(pixels)) - target).square().sum(dim=1).mean()
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


def table(results: Report) -> str:
    """Write the rows as Markdown, the best S–T rate at FMR 1e-2 first."""
    settings, rows = results["settings"], results["students"]
    images = settings["steps"] * settings["batch"]
    pairs = rows[settings["baseline"]]["accuracy"]
    fmr = settings.get("fmr", "every pair of images alike: measured before pkd weighed every two people alike")
    text = prose(
        f"Teacher EdgeFace-XS, method `{settings['method']}`, {settings['steps']:,} steps of {settings['batch']} "
        f"images ({images:,} in all, less than one pass), the same images in the same order for every student. One "
        f"seed ({settings['seed']}): differences between seeds are not in the intervals. Latency: one crop on one "
        "thread through the exported graph. Training speed: forward, backward and AdamW on random pixels, one thread. "
        f"Ratios are to `{settings['baseline']}` in the same run. Accuracy: student query against teacher gallery on "
        "val.txt, "
        f"{pairs['genuine_pairs']:,} genuine pairs of {pairs['genuine_identities']:,} people, every identity weighing "
        f"the same, with 95 % intervals; FMR: {fmr}. The budget is far too small to train any of them out: the order "
        "is what counts. Students that pkd does not ship are in the commit named with them."
    )
    head = (
        "student", "commit", "parameters", "multiply-adds", "onnxruntime CPU ms", "training images per CPU-second",
        "TAR at FMR 1e-2", "TAR at FMR 1e-3", "mean cosine to the teacher",
    )  # fmt: skip
    best = sorted(rows.items(), key=lambda item: -point(item[1], 1e-2)["tar_balanced"])
    return f"{text}\n\n{markdown_table(head, [cells(student, row) for student, row in best])}"


def cells(student: str, row: Report) -> tuple[str, ...]:
    """One line of the table."""
    return (
        f"`{student}`",
        row["commit"],
        f"{row['parameters'] / 1e6:.2f} M",
        f"{row['multiply_adds'] / 1e6:.0f} M",
        f"{row['onnxruntime_ms']:.2f} ({row['latency_ratio']:.2f}×)",
        f"{row['training_images_per_cpu_second']:.0f} ({row['training_ratio']:.2f}×)",
        *(interval(point(row, fmr)) for fmr in (1e-2, 1e-3)),
        f"{row['accuracy']['cosine']:.3f}",
    )


def point(row: Report, fmr: float) -> Report:
    """Return the operating point at ``fmr``."""
    found: Report = next(p for p in row["accuracy"]["points"] if abs(p["fmr"] / fmr - 1) < 1e-6)
    return found


def interval(at: Report) -> str:
    """``0.401 (0.377–0.424)``."""
    low, high = at["tar_balanced_ci95"]
    return f"{at['tar_balanced']:.3f} ({low:.3f}–{high:.3f})"


if __name__ == "__main__":
    sys.exit(main())
