"""Fix the steps, learning rates and arithmetic of a training before its first step."""

from __future__ import annotations

import math
import statistics
import time

import torch
from rich.console import Console

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.training.distributed import SINGLE_PROCESS, DistributedContext
from pkd.toolkit.distill.training.setup import FROZEN, Prepared
from pkd.toolkit.distill.training.trainer import Trainer


def learning_rate(step: int, steps: int, config: DistillConfig) -> float:
    """Return the learning rate of a step: linear warm-up to ``config.lr``, then half a cosine down to zero."""
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def resolve(
    config: DistillConfig,
    prepared: Prepared,
    dim: int,
    size: int,
    console: Console,
    context: DistributedContext = SINGLE_PROCESS,
) -> DistillConfig:
    """Replace ``auto`` precision, share to freeze and time or epoch budget by numbers that a resumed run repeats."""
    if config.freeze is None:
        frozen = {"freeze": FROZEN, "augment": 0.0} if prepared.frozen else {"freeze": 0.0}
        config = config.model_copy(update=frozen)
    if config.precision == "auto":
        faster = context.broadcast(_faster_precision(config, prepared, dim, size, context))
        config = config.model_copy(update={"precision": faster})
    if config.steps is None:
        if config.max_minutes is not None:
            seconds = context.broadcast(_seconds_per_step(config, prepared, dim, size, context))
            left = context.broadcast(config.max_minutes * 60 - prepared.seconds)
            if left < seconds:
                raise InputError(
                    f"--max-minutes {config.max_minutes:g}: preparing took {prepared.seconds / 60:.1f} minutes, and "
                    "nothing is left for training. The embeddings are cached now: run it again, or give more minutes."
                )
            steps = max(1, int(left / seconds))
            console.print(
                f"measured {seconds:.2f} s a step: {steps:,} steps fit into {config.max_minutes:g} minutes, of which "
                f"{prepared.seconds / 60:.1f} were used before"
            )
        else:
            steps = max(1, math.ceil(config.epochs * len(prepared.faces) / config.batch))
        config = config.model_copy(update={"steps": steps, "max_minutes": None})
    return config


def _faster_precision(
    config: DistillConfig, prepared: Prepared, dim: int, size: int, context: DistributedContext
) -> str:
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fp32"
    timed = {
        p: _seconds_per_step(config.model_copy(update={"precision": p}), prepared, dim, size, context)
        for p in ("bf16", "fp32")
    }
    return min(timed, key=lambda p: timed[p])


def _seconds_per_step(
    config: DistillConfig, prepared: Prepared, dim: int, size: int, context: DistributedContext, count: int = 5
) -> float:
    """Measure a throwaway trainer: the median of ``count`` steps, decoding included, after two to warm up."""
    trainer = Trainer(config, prepared, dim, size, context)
    trainer.student.train()
    times: list[float] = []
    before = time.monotonic()
    for batch in trainer.loader.run(0, count + 2):
        trainer.step(batch, config.lr * 1e-3)
        times.append(time.monotonic() - before)
        before = time.monotonic()
    return statistics.median(times[2:])
