"""The training loop: steps, schedule, checkpoints, resume, and what is left on disk at the end."""

from __future__ import annotations

import copy
import fcntl
import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import normalize

from pkd.toolkit.command import StopRequest, tool_version
from pkd.toolkit.distill.backbones import build, parameters
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.data import CropBatch, Loader
from pkd.toolkit.distill.head import FILE as HEAD_FILE
from pkd.toolkit.distill.head import Head, save_head
from pkd.toolkit.distill.log import RunLog, StepLog
from pkd.toolkit.distill.margin import Margin
from pkd.toolkit.distill.methods import Step, WeightedSum
from pkd.toolkit.distill.prepare import Prepared
from pkd.toolkit.distill.student import FILE, load_weights, save_atomically, save_student, weights_digest
from pkd.toolkit.errors import InputError, TrainingDiverged
from pkd.toolkit.images import read_rgb
from pkd.toolkit.preprocess import Preprocess
from pkd.toolkit.runtime import Encoder
from pkd.toolkit.space import EncoderInfo, describe

CHECKPOINT = "checkpoint.pt"
CONFIG = "config.json"


class Trainer:
    """A student, its optimiser and everything that one step needs."""

    def __init__(self, config: DistillConfig, prepared: Prepared, dim: int, size: int) -> None:
        self.config = config
        self.prepared = prepared
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.method = WeightedSum.parse(config.method)
        self.margin = Margin.parse(config.margin)
        torch.manual_seed(config.seed)
        student = build(config.student, dim, size)
        self.student = student.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.centres: Tensor | None = None
        if self.method.head == "trained":
            self.centres = nn.Parameter(torch.randn(len(prepared.identities), dim, device=self.device) * 0.05)
        elif prepared.head is not None:
            self.centres = torch.from_numpy(prepared.head.centres).to(self.device)
        self.optimiser = torch.optim.AdamW(self._groups(), lr=config.lr, betas=(0.9, 0.999))
        self.loader = Loader(prepared.faces, config.batch, size, augment=config.augment, seed=config.seed)
        self.preprocess = Preprocess(size=size)
        self.bf16 = config.precision == "bf16"

    def step(self, batch: CropBatch, lr: float) -> tuple[float, float]:
        """One optimiser step. Returns the loss and the mean teacher–student cosine (NaN without a teacher)."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        pixels = torch.from_numpy(batch.crops).to(self.device).permute(0, 3, 1, 2)  # channels last, no copy
        inputs = (pixels.float() - self.preprocess.mean) / self.preprocess.std
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            embeddings = self.student(inputs)
        embeddings = embeddings.float()
        teacher = self._targets(batch)
        centres = self.centres
        if centres is not None and centres.requires_grad:
            centres = normalize(centres)
        labels = torch.from_numpy(self.prepared.labels[batch.indices]).to(self.device)
        loss = self.method.loss(Step(embeddings, labels, teacher, centres, self.margin, self.config.scale))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingDiverged(f"the loss is {value}")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        if teacher is None:
            return value, math.nan
        return value, float((normalize(embeddings.detach()) * teacher).sum(dim=1).mean())

    def finite(self) -> bool:
        """Whether every weight, running statistic and centre is finite."""
        tensors = [*self.student.state_dict().values(), *([self.centres] if self.centres is not None else [])]
        return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())

    def state(self) -> dict[str, Any]:
        """All that a bit-for-bit continuation needs; order and augmentation follow from the step alone."""
        state = {"student": self.student.state_dict(), "optimiser": self.optimiser.state_dict()}
        if self.method.head == "trained":
            assert self.centres is not None
            state["centres"] = self.centres.detach()
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of ``state``."""
        self.student.load_state_dict(state["student"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.method.head == "trained":
            assert self.centres is not None
            with torch.no_grad():
                self.centres.copy_(state["centres"])

    def _targets(self, batch: CropBatch) -> Tensor | None:
        if self.prepared.targets is None:
            return None
        plain, mirrored = self.prepared.targets
        rows = np.where(batch.mirrored[:, None], mirrored[batch.indices], plain[batch.indices])
        return torch.from_numpy(rows).to(self.device)

    def _groups(self) -> list[dict[str, Any]]:
        matrices = [p for p in self.student.parameters() if p.ndim > 1]
        vectors = [p for p in self.student.parameters() if p.ndim <= 1]
        if self.centres is not None and self.centres.requires_grad:
            matrices.append(self.centres)
        return [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]


def learning_rate(step: int, steps: int, config: DistillConfig) -> float:
    """Linear warm-up to ``config.lr``, then half a cosine down to zero."""
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def distill(config: DistillConfig, prepared: Prepared, teacher: Encoder | None, console: Console) -> dict[str, Any]:
    """Train and write the run folder. Continues from its checkpoint if there is one. Returns the run's summary.

    Raises TrainingDiverged (the last good checkpoint stays) and KeyboardInterrupt (a checkpoint is written first).
    """
    run = config.run
    size = teacher.info.preprocess.size if teacher else len(read_rgb(prepared.faces.paths[0]))
    dim = teacher.info.space.dim if teacher else config.dim or 512
    if config.threads:
        torch.set_num_threads(config.threads)
    config = resolve(config, prepared, dim, size, console)
    with ExitStack() as stack:
        stack.enter_context(_exclusive(run))
        trainer = Trainer(config, prepared, dim, size)
        start = _restore(trainer, run, prepared.data_digest)
        _write_json(run / CONFIG, json.loads(config.model_dump_json()))
        if prepared.audit:
            _write_json(run / "audit.json", json.loads(prepared.audit.model_dump_json()))
        log = stack.enter_context(RunLog(run, start, config.steps or 0, config.batch, console))
        stop = stack.enter_context(StopRequest())
        _train(trainer, start, run, log, stop)
        return _finish(trainer, run, teacher, log.last)


def _train(trainer: Trainer, start: int, run: Path, log: RunLog, stop: StopRequest) -> None:
    config, steps = trainer.config, trainer.config.steps or 0
    saved = time.monotonic()
    trainer.student.train()
    for step, batch in enumerate(trainer.loader.run(start, steps), start=start):
        lr = learning_rate(step, steps, config)
        try:
            loss, cosine = trainer.step(batch, lr)
        except TrainingDiverged as error:
            raise _diverged(f"{error} at step {step + 1:,} of {steps:,}", run) from None
        log.write(StepLog(step + 1, loss, cosine, lr))
        last = step + 1 == steps
        if last or stop.requested or time.monotonic() - saved > config.checkpoint_seconds:
            if not trainer.finite():
                raise _diverged(f"a weight is not finite after step {step + 1:,} of {steps:,}", run)
            content = {"step": step + 1, "data": trainer.prepared.data_digest, "state": trainer.state()}
            save_atomically(content, run / CHECKPOINT)
            saved = time.monotonic()
        if stop.requested and not last:
            raise KeyboardInterrupt


def resolve(config: DistillConfig, prepared: Prepared, dim: int, size: int, console: Console) -> DistillConfig:
    """Turn ``auto`` precision and the time or epoch budget into facts, so that a resumed run repeats them."""
    if config.precision == "auto":
        config = config.model_copy(update={"precision": _faster_precision(config, prepared, dim, size)})
    if config.steps is None:
        if config.max_minutes is not None:
            seconds = _seconds_per_step(config, prepared, dim, size)
            steps = max(1, int(config.max_minutes * 60 / seconds))
            console.print(f"measured {seconds:.2f} s a step: {steps:,} steps fit {config.max_minutes:g} minutes")
        else:
            steps = max(1, math.ceil(config.epochs * len(prepared.faces) / config.batch))
        config = config.model_copy(update={"steps": steps, "max_minutes": None})
    return config


def _faster_precision(config: DistillConfig, prepared: Prepared, dim: int, size: int) -> str:
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fp32"
    timed = {
        p: _seconds_per_step(config.model_copy(update={"precision": p}), prepared, dim, size) for p in ("bf16", "fp32")
    }
    return min(timed, key=lambda p: timed[p])


def _seconds_per_step(config: DistillConfig, prepared: Prepared, dim: int, size: int, count: int = 5) -> float:
    """Median over ``count`` steps of a throwaway trainer, decoding included, after two to warm up."""
    trainer = Trainer(config, prepared, dim, size)
    trainer.student.train()
    times: list[float] = []
    before = time.monotonic()
    for batch in trainer.loader.run(0, count + 2):
        trainer.step(batch, config.lr * 1e-3)
        times.append(time.monotonic() - before)
        before = time.monotonic()
    return statistics.median(times[2:])


def _restore(trainer: Trainer, run: Path, data_digest: str) -> int:
    path = run / CHECKPOINT
    if not path.is_file():
        return 0
    content = load_weights(path)
    if content["data"] != data_digest:
        raise InputError(f"{run}: the images have changed since its checkpoint. Use another --out for the new images.")
    trainer.restore(content["state"])
    return int(content["step"])


def _finish(trainer: Trainer, run: Path, teacher: Encoder | None, last: StepLog | None) -> dict[str, Any]:
    config, prepared = trainer.config, trainer.prepared
    student = copy.deepcopy(trainer.student).cpu().to(memory_format=torch.contiguous_format)
    info = _identify(trainer, student, teacher)
    training: dict[str, str | int | float | bool | None] = {
        "tool": tool_version(),
        "teacher": teacher.info.id if teacher else None,
        "method": config.method,
        "margin": config.margin if trainer.method.head != "none" else None,
        "scale": config.scale if trainer.method.head != "none" else None,
        "head": prepared.head.source if prepared.head else trainer.method.head,
        "backbone": config.student,
        "parameters": parameters(student),
        "images": len(prepared.faces),
        "identities": len(prepared.identities),
        "data_digest": prepared.data_digest,
        "steps": config.steps,
        "batch": config.batch,
        "precision": config.precision,
        "seed": config.seed,
    }
    if trainer.method.head == "trained":
        assert trainer.centres is not None
        centres = normalize(trainer.centres.detach().float()).cpu().numpy()
        save_head(Head(centres, prepared.identities, "trained"), run / HEAD_FILE)
    save_student(run, student, config.student, info, training)
    cosine = last.cosine if last and math.isfinite(last.cosine) else None
    return {"run": str(run), "encoder": info.id, **training, "loss": last.loss if last else None, "cosine": cosine}


def _identify(trainer: Trainer, student: nn.Module, teacher: Encoder | None) -> EncoderInfo:
    config = trainer.config
    name = config.name or f"{config.student}-{config.method}".replace(":", "-").replace("+", "-")
    digest = weights_digest(student.state_dict())
    dim = teacher.info.space.dim if teacher else config.dim or 512
    if trainer.method.needs_teacher and teacher:
        preprocess = trainer.preprocess.model_copy(update={"template": teacher.info.preprocess.template})
        return describe(name, "student", digest, preprocess, dim, space=teacher.info.space)
    own = describe(name, "teacher", digest, trainer.preprocess, dim)  # nothing tied it to a teacher: a space of its own
    return own if teacher is None else own.model_copy(update={"role": "student"})


def _diverged(what: str, run: Path) -> TrainingDiverged:
    kept = (
        f"The last good checkpoint is kept in {run}."
        if (run / CHECKPOINT).is_file()
        else "No checkpoint was written yet."
    )
    return TrainingDiverged(
        f"training diverged: {what}. {kept} Start again in another --out with a lower --lr, a smaller --margin or "
        "--scale, or --precision fp32."
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


@contextmanager
def _exclusive(run: Path) -> Iterator[None]:
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{run}: another pkd-distill is writing this run. Wait for it or choose another --out."
            ) from None
        yield


__all__ = ["CHECKPOINT", "CONFIG", "FILE", "Trainer", "distill", "learning_rate", "resolve"]
