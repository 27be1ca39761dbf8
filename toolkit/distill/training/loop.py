"""Run the training loop: steps, log, checkpoints, resume, and the run folder that is left at the end."""

from __future__ import annotations

import copy
import fcntl
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from torch.nn.functional import normalize

from pkd.toolkit.core.cli_support import StopRequest, tool_version
from pkd.toolkit.core.encoder_info import EncoderInfo, describe
from pkd.toolkit.core.errors import InputError, TrainingDiverged
from pkd.toolkit.core.malloc import keep_freed_memory
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.heads.head import FILE as HEAD_FILE
from pkd.toolkit.distill.heads.head import Head, save_head
from pkd.toolkit.distill.models.backbones import parameters
from pkd.toolkit.distill.models.student import (
    TorchEncoder,
    load_weights,
    save_atomically,
    save_student,
    weights_digest,
)
from pkd.toolkit.distill.training.distributed import SINGLE_PROCESS, DistributedContext
from pkd.toolkit.distill.training.run_log import RunLog, StepLog
from pkd.toolkit.distill.training.schedule import learning_rate, resolve
from pkd.toolkit.distill.training.setup import Prepared
from pkd.toolkit.distill.training.trainer import Trainer
from pkd.toolkit.encoders.base import Embeddings, Encoder
from pkd.toolkit.encoders.embed import default_cache, embed_stored

CHECKPOINT = "checkpoint.pt"
CONFIG = "config.json"


def distill(
    config: DistillConfig,
    prepared: Prepared,
    teacher: Encoder | None,
    console: Console,
    context: DistributedContext = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Train and write the run folder. Continues from its checkpoint if there is one. Returns the run's summary.

    Raises TrainingDiverged, RankLost (the last good checkpoint stays) and KeyboardInterrupt (one is written first).
    """
    with context.report_lost_ranks(lambda: _resume_hint(config.run, context)):
        return _distill(config, prepared, teacher, console, context)


def _distill(
    config: DistillConfig, prepared: Prepared, teacher: Encoder | None, console: Console, context: DistributedContext
) -> dict[str, Any]:
    run = config.run
    size = teacher.info.preprocess.size if teacher else prepared.faces.crop_size()
    dim = teacher.info.space.dim if teacher else config.dim or 512
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    context.require_same("images", prepared.data_digest)
    config = resolve(config, prepared, dim, size, console, context)
    with ExitStack() as stack:
        if context.is_rank_zero:
            stack.enter_context(_exclusive(run))
        trainer = Trainer(config, prepared, dim, size, context)
        start = _restore(trainer, run, prepared.data_digest)
        context.require_same("checkpoints", str(start))
        stop = stack.enter_context(StopRequest())
        if not context.is_rank_zero:
            train(trainer, start, run, None, stop)
            return context.broadcast({})
        _write_json(run / CONFIG, json.loads(config.model_dump_json()))
        if prepared.audit:
            _write_json(run / "audit.json", json.loads(prepared.audit.model_dump_json()))
        log = stack.enter_context(RunLog(run, start, config.steps or 0, config.batch, console))
        train(trainer, start, run, log.write, stop)
        return context.broadcast(_finish(trainer, run, teacher, log.last))


def train(
    trainer: Trainer, start: int, run: Path | None, write_log: Callable[[StepLog], None] | None, stop: StopRequest
) -> None:
    """Take all steps from ``start`` on. ``run``: folder in which rank 0 keeps checkpoints; None keeps nothing.

    Raises TrainingDiverged, and KeyboardInterrupt once ``stop`` is requested.
    """
    config, steps, context = trainer.config, trainer.config.steps or 0, trainer.context
    saved = -math.inf if context.world > 1 else time.monotonic()  # a lost process always leaves something to resume
    trainer.student.train()
    for step, batch in enumerate(trainer.loader.run(start, steps), start=start):
        lr = learning_rate(step, steps, config)
        try:
            loss, cosine = trainer.step(batch, lr)
        except TrainingDiverged as error:
            raise _diverged(f"{error} at step {step + 1:,} of {steps:,}", run) from None
        last, stopping = step + 1 == steps, context.any(stop.requested)
        if write_log:
            write_log(StepLog(step + 1, loss, cosine, lr))
        if context.is_rank_zero and (last or stopping or time.monotonic() - saved > config.checkpoint_seconds):
            if not trainer.finite():
                raise _diverged(f"a weight is not finite after step {step + 1:,} of {steps:,}", run)
            if run:
                content = {"step": step + 1, "data": trainer.prepared.data_digest, "state": trainer.state()}
                save_atomically(content, run / CHECKPOINT)
            saved = time.monotonic()
        if stopping and not last:
            kept = f"Step {step + 1:,} of {steps:,} is saved: {_resume_command(context)} --resume --out {run}"
            raise KeyboardInterrupt(kept if run else "Nothing was written.")


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
    backbone = prepared.start.name if prepared.start else config.student
    student = trainer.trained_student()
    info = _identify(trainer, student, teacher, config.method)
    lost = _lost(trainer, TorchEncoder(info, student, {}), teacher) if teacher else None
    if lost and prepared.start:
        student = copy.deepcopy(prepared.start.network)
        info = _identify(trainer, student, teacher, "map")
    training: dict[str, str | int | float | bool | None] = {
        "tool": tool_version(),
        "teacher": teacher.info.id if teacher else None,
        "method": "map" if lost else str(trainer.method),
        "lost": lost,
        "margin": config.margin if trainer.method.head != "none" else None,
        "scale": config.scale if trainer.method.head != "none" else None,
        "head": Path(prepared.head.source).name if prepared.head else trainer.method.head,
        "backbone": backbone,
        "parameters": parameters(student),
        "images": len(prepared.faces),
        "identities": len(prepared.identities),
        "merged_identities": sum(len(group.others) for group in prepared.audit.merged) if prepared.audit else 0,
        "data_digest": prepared.data_digest,
        "init": prepared.start.source if prepared.start else trainer.started_from,
        "steps": config.steps,
        "batch": config.batch,
        "precision": config.precision,
        "optimizer": config.optimizer,
        "ema": config.ema,
        "freeze": config.freeze,
        "keep": config.keep,
        "shrink": config.shrink,
        "views": config.views,
        "teacher_live": config.teacher_live,
        "mix": config.mix,
        "seed": config.seed,
    }
    if trainer.own is not None:
        centres = normalize(trainer.own.detach().float()).cpu()
        save_head(Head(centres, prepared.identities, "trained"), run / HEAD_FILE)
    save_student(run, student, backbone, info, training)
    cosine = last.cosine if last and math.isfinite(last.cosine) else None
    return {"run": str(run), "encoder": info.id, **training, "loss": last.loss if last else None, "cosine": cosine}


def _lost(trainer: Trainer, student: Encoder, teacher: Encoder) -> str | None:
    """Say by how much the training lost against the map that it began with, on held-out people; None if it did not.

    With few images, seen many times, a training learns them by heart; the mean cosine to the teacher tells that sooner
    than TAR. Losses with class centres raise TAR while that cosine falls: ``separation`` judges them. A student that
    lost is not kept.
    """
    config, start, held_out = trainer.config, trainer.prepared.start, trainer.prepared.held_out
    if start is None or held_out is None:
        return None
    cache = Path(config.cache) if config.cache else default_cache()
    expected, found = (embed_stored(each, held_out, cache=cache, jobs=config.threads)[:] for each in (teacher, student))
    mapped = start.mapped(held_out)
    if trainer.method.head == "none":
        cosines = [float(np.einsum("nd,nd->n", rows, expected).mean()) for rows in (found, mapped)]
        if cosines[0] >= cosines[1]:
            return None
        return f"{trainer.method}: mean cosine {cosines[0]:.3f} on held-out people, {cosines[1]:.3f} of the map"
    after, before = separation(found, expected), separation(mapped, expected)
    if after >= before:
        return None
    return (
        f"{trainer.method}: on held-out people a query lies {after:.2f} standard deviations nearer to its own gallery "
        f"image than to others, {before:.2f} with the map"
    )


def separation(queries: Embeddings, gallery: Embeddings) -> float:
    """Average how far cosines to the own image lie above those to all images, in standard deviations of the latter.

    ``queries``, ``gallery``: unit rows N×D of the same images by student and teacher. It does not depend on a scale of
    the cosines, as their mean does: classification losses raise TAR while the mean cosine falls.
    """
    centred = gallery - gallery.mean(axis=0)
    above = np.einsum("nd,nd->n", queries, centred)
    spread = np.sqrt(np.einsum("nd,nd->n", queries @ (centred.T @ centred / len(gallery)), queries))
    return float((above / np.maximum(spread, 1e-12)).mean())


def _identify(trainer: Trainer, student: nn.Module, teacher: Encoder | None, method: str) -> EncoderInfo:
    config = trainer.config
    backbone = trainer.prepared.start.name if trainer.prepared.start else config.student
    name = config.name or f"{backbone}-{method}".replace(":", "-").replace("+", "-")
    digest = weights_digest(student.state_dict())
    dim = teacher.info.space.dim if teacher else config.dim or 512
    template = teacher.info.preprocess.template if teacher else config.template or Preprocess().template
    preprocess = trainer.preprocess.model_copy(update={"template": template})
    if trainer.method.aligns and teacher:
        return describe(name, "student", digest, preprocess, dim, space=teacher.info.space)
    own = describe(name, "teacher", digest, preprocess, dim)  # nothing tied it to a teacher: a space of its own
    return own if teacher is None else own.model_copy(update={"role": "student"})


def _resume_hint(run: Path, context: DistributedContext) -> str:
    if (run / CHECKPOINT).is_file():
        return f"The last checkpoint is kept: {_resume_command(context)} --resume --out {run}"
    return "No checkpoint was written yet."


def _resume_command(context: DistributedContext) -> str:
    one = "pkd-distill"
    return one if context.world == 1 else f"torchrun --nproc_per_node {context.world} -m pkd.toolkit.cli.distill"


def _diverged(what: str, run: Path | None) -> TrainingDiverged:
    if run is None:
        return TrainingDiverged(f"training diverged: {what}.")
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
