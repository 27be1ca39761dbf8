"""How much of a training's CPU time is the network: training images per CPU-second against the bare network.

Run as: python benchmarks/training_speed.py            (about four minutes of one core)

The bare network is forward and backward of the same student on random tensors, in the same process and arithmetic.
Training is everything that ``pkd-distill`` does for the same number of steps: reading, decoding and augmenting crops,
teacher targets from disk, loss, optimiser, log. Rows of an adopted student (MobileFaceNet Y1 of PKD_SHARED, behind its
map) train all of it, or the last tenth of its arithmetic on stored outputs of the rest. Both take turns; a ratio is the
median over the turns. CPU time is of the whole process, all threads. Writes benchmarks/results/training_speed.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from pkd.toolkit.core.malloc import keep_freed_memory
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.row_store import KeyedRows, StoredRows
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.heads.head import Head
from pkd.toolkit.distill.training.loader import Loader
from pkd.toolkit.distill.training.run_log import RunLog, StepLog
from pkd.toolkit.distill.training.schedule import learning_rate
from pkd.toolkit.distill.training.setup import Prepared, prepare
from pkd.toolkit.distill.training.trainer import Trainer
from pkd.toolkit.encoders.base import open_onnx
from pkd.toolkit.synthetic.faces import write_faces

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PKD_SHARED") or ROOT.parent / "shared")
RESULT = ROOT / "benchmarks" / "results" / "training_speed.json"
DIM, SIZE = 512, 112
CASES = {
    "mobilefacenet-relu:0.5": (64, "fp32", 2),
    "mobilefacenet:1.0": (64, "bf16", 1),
    "iresnet18": (16, "bf16", 1),
}
"""Student: batch, the faster arithmetic of the two on a CPU with bf16 instructions, steps a turn."""
ADOPTED = {"adopted, all layers": (0.0, 64, 1), "adopted, last layers": (0.9, 128, 4)}
"""Adopted student: share of its arithmetic that is frozen, batch, steps a turn."""
ADOPTED_IMAGES = 640
Report = dict[str, Any]


def main() -> int:
    """Measure and write the JSON; students that are not measured keep the rows they have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="turns of each, of which the median counts (3)")
    parser.add_argument("--method", default="proxylesskd+l2kd")
    parser.add_argument("--students", nargs="+", default=[*CASES, *ADOPTED], choices=[*CASES, *ADOPTED])
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        faces, kind = crops(Path(folder))
        built = [student for student in args.students if student in CASES]
        unkept = {student: step_cost(student, *CASES[student][:2]) for student in built}
        keep_freed_memory()
        rows = {
            student: case(Path(folder), faces, args.method, student, turns=args.turns) | {"unkept_ms": unkept[student]}
            for student in built
        }
        if kind == "real":
            rows |= {
                student: adopted_case(Path(folder), student, turns=args.turns)
                for student in args.students
                if student in ADOPTED
            }
        loader = loader_cost(faces)
    before = json.loads(RESULT.read_text(encoding="utf-8"))["students"] if RESULT.is_file() else {}
    results: Report = {"crops": kind, "method": args.method, "loader": loader, "students": before | rows}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))
    return 0


def crops(folder: Path) -> tuple[FaceSet, str]:
    """Real crops where they are, else procedural ones."""
    listing = SHARED / "faces" / "splits" / "train.txt"
    if listing.is_file():
        return FaceSet.read(listing), "real"
    write_faces(folder / "faces", 7, 60, 10)
    return FaceSet.read(folder / "faces"), "synthetic"


def case(folder: Path, faces: FaceSet, method: str, student: str, *, turns: int) -> Report:
    """One student: CPU milliseconds of an image, bare and in training, by turns."""
    batch, precision, steps = CASES[student]
    trainer = Trainer(_config(folder, student, method, precision, batch), prepared(folder, faces), DIM, SIZE)
    trainer.config.run.mkdir()
    return {"precision": precision, **by_turns(trainer, torch.randn(batch, 3, SIZE, SIZE), steps, turns)}


def adopted_case(folder: Path, student: str, *, turns: int) -> Report:
    """Measure an adopted student, all of it or its last layers, by l2kd with the options that pkd-distill takes."""
    freeze, batch, steps = ADOPTED[student]
    models, listing = SHARED / "models", folder / "adopted.txt"
    train = FaceSet.read(SHARED / "faces" / "splits" / "train.txt")
    listing.write_text("".join(f"{train.path(i)}\n" for i in range(ADOPTED_IMAGES)), encoding="utf-8")
    config = DistillConfig.model_validate(
        {
            "out": str(folder / f"adopted-{freeze}"), "faces": (str(listing),), "cache": str(folder / "cache"),
            "teacher": str(models / "teacher_edgeface_xs_512.onnx"), "teacher_preprocess": "mean=127.5,std=127.5",
            "student": str(models / "teacher_mobilefacenet_y1_128.onnx"), "student_preprocess": "mean=0,std=1",
            "method": "l2kd", "freeze": freeze, "batch": batch, "precision": "bf16", "steps": 10**6, "held_out": 0.0,
        }
    )  # fmt: skip
    teacher = open_onnx(Path(str(config.teacher)), Preprocess())
    trainer = Trainer(config, prepare(config, teacher, Console(quiet=True)), DIM, SIZE)
    shape = next(iter(trainer.loader.run(0, 1))).crops.shape if freeze else (batch, 3, SIZE, SIZE)
    trainer.config.run.mkdir()
    return {"precision": "bf16", "method": "l2kd", **by_turns(trainer, torch.randn(*shape), steps, turns)}


def by_turns(trainer: Trainer, noise: Tensor, steps: int, turns: int) -> Report:
    """Measure CPU milliseconds of an image, bare on ``noise`` and in training, by turns."""
    trainer.student.train()
    batch, bare, training = len(noise), list[float](), list[float]()
    noise = noise.contiguous(memory_format=torch.channels_last)
    with RunLog(trainer.config.run, 0, 10**6, batch, Console(quiet=True)) as log:
        run = _trainer_steps(trainer, log, steps)
        for turn in range(turns + 1):
            here, there = _cpu(lambda: bare_steps(trainer, noise, steps)), _cpu(lambda turn=turn: run(turn))  # type: ignore[misc]
            if turn:  # the first is for caches and memory
                bare.append(here / steps / batch * 1e3)
                training.append(there / steps / batch * 1e3)
    ratios = [b / t for b, t in zip(bare, training, strict=True)]
    return {
        "batch": batch,
        "bare_ms": statistics.median(bare),
        "training_ms": statistics.median(training),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def bare_steps(trainer: Trainer, inputs: Tensor, steps: int) -> None:
    """Forward and backward on a random tensor; nothing else."""
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=trainer.bf16):
            out = trainer.student(inputs, True) if trainer.prepared.frozen else trainer.student(inputs)
        out.float().backward(torch.randn(len(out), DIM))  # a mean of squares has no gradient behind a batch norm
        trainer.optimiser.zero_grad(set_to_none=True)


def step_cost(student: str, batch: int, precision: str) -> float:
    """CPU milliseconds of an image of the bare network while freed memory goes back to the kernel."""
    from pkd.toolkit.distill.models.backbones import build

    network = build(student, DIM, SIZE).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    inputs = torch.randn(batch, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = network(inputs)
        out.float().backward(torch.randn(len(out), DIM))
        network.zero_grad(set_to_none=True)

    return statistics.median([_cpu(step) for _ in range(3)][1:]) / batch * 1e3


def loader_cost(faces: FaceSet) -> Report:
    """CPU milliseconds of an image for reading, decoding and augmenting, and images a second of 1 and 2 threads."""
    batches, report = 8, {}
    for workers in (1, 2):
        loader = Loader(faces, 64, SIZE, augment=0.2, seed=1, workers=workers)
        began = time.monotonic()
        spent = _cpu(lambda loader=loader: sum(len(b.indices) for b in loader.run(0, batches)))  # type: ignore[misc]
        report[f"images_per_second_{workers}"] = 64 * batches / (time.monotonic() - began)
        report["ms"] = spent / 64 / batches * 1e3
    return report


def prepared(folder: Path, faces: FaceSet) -> Prepared:
    """Make what a training starts from, with random unit vectors in the place of a teacher's, on disk as its are."""
    random = np.random.default_rng(0)
    store = KeyedRows(folder / "targets", "random", "f32", DIM, np.float32)
    count = min(len(faces), 4096)
    if not len(store.rows()):
        store.append(np.arange(count, dtype=np.uint64), _units(random, count))
    targets = StoredRows(store.rows(), np.arange(len(faces)) % count)
    head = Head(torch.from_numpy(_units(random, len(faces.identities))), faces.identities, "random")
    made = {"faces": faces, "labels": faces.labels, "data_digest": "", "targets": (targets, targets), "head": head}
    rest = {f.name: None for f in dataclasses.fields(Prepared) if f.name not in made}
    return Prepared(**{**rest, **made, "identities": faces.identities})  # type: ignore[arg-type]


def table(results: Report) -> str:
    """Write the results as a Markdown table."""
    lines = [
        "| student | batch | arithmetic | bare network, CPU ms an image | training | of bare speed | memory kept |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for student, row in results["students"].items():
        kept = f"{row['unkept_ms'] / row['bare_ms']:.2f}× as fast" if "unkept_ms" in row else ""
        lines.append(
            f"| {student} | {row['batch']} | {row['precision']} | {row['bare_ms']:.2f} "
            f"| {row['training_ms']:.2f} | {row['ratio']:.1%} | {kept} |"
        )
    loader = results["loader"]
    lines += [
        "",
        f"Training is {results['method']} on {results['crops']} crops (l2kd where the student is adopted): reading, "
        f"decoding and augmenting take {loader['ms']:.2f} CPU ms an image in threads beside the network. Memory kept: "
        "the bare network against itself while the C library gives freed memory back to the kernel.",
    ]
    return "\n".join(lines)


def _trainer_steps(trainer: Trainer, log: RunLog, steps: int) -> Callable[[int], None]:
    def run(turn: int) -> None:
        first = turn * steps
        for step, batch in enumerate(trainer.loader.run(first, first + steps), start=first):
            lr = learning_rate(step, 10**6, trainer.config)
            loss, cosine = trainer.step(batch, lr)
            log.write(StepLog(step + 1, loss, cosine, lr))

    return run


def _config(folder: Path, student: str, method: str, precision: str, batch: int) -> DistillConfig:
    given = {"out": str(folder / student), "faces": ("faces",), "teacher": "teacher", "steps": 10**6}
    return DistillConfig.model_validate(
        given | {"student": student, "method": method, "precision": precision, "batch": batch}
    )


def _units(random: np.random.Generator, count: int) -> np.ndarray:
    rows = random.normal(size=(count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _cpu(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    raise SystemExit(main())
