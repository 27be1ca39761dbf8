"""Train a run's student on for a few steps, computing as INT8 will (quantisation-aware distillation).

Teacher, head, method and images are those of the run; loop and losses are those of every training.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.console import Console
from torch import nn

from pkd.toolkit.core.cli_support import StopRequest
from pkd.toolkit.core.encoder_info import EncoderInfo, describe, require_same_space
from pkd.toolkit.core.errors import InputError, TrainingDiverged
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.losses.registry import WeightedSum
from pkd.toolkit.distill.models.open_encoder import open_encoder
from pkd.toolkit.distill.models.student import weights_digest
from pkd.toolkit.distill.quantization.fake_quant import Int8Student
from pkd.toolkit.distill.training.loop import CONFIG, train
from pkd.toolkit.distill.training.setup import Prepared, prepare
from pkd.toolkit.distill.training.trainer import Trainer

LR_FACTOR = 0.1
"""Peak learning rate as a share of the run's: its weights are near where they should end up."""


def read_config(run: Path, faces: Path | None, steps: int) -> DistillConfig:
    """Read the configuration of ``run``, for ``steps`` more. ``faces``: instead of its own, which may be gone.

    Raises InputError where there is none, where images or teacher are gone, or the student is in no teacher's space.
    """
    folder = run if run.is_dir() else run.parent
    try:
        config = DistillConfig.model_validate_json((folder / CONFIG).read_bytes())
    except (OSError, ValidationError):
        raise InputError(f"{folder}: holds no {CONFIG} of pkd-distill, so that --qat cannot go on with it.") from None
    if config.teacher is None or not WeightedSum.parse(config.method).aligns:
        raise InputError(
            f"--qat: {run} was trained by --method {config.method}, which leaves it outside its teacher's space."
        )
    if faces:
        config = config.model_copy(update={"faces": (str(faces),), "unlabelled": ()})
    gone = [name for name in (*config.faces, *config.unlabelled) if not Path(name).exists()]
    if gone:
        raise InputError(f"--qat: {gone[0]}, which {run} was trained on, is gone. Pass --qat-faces DIR or LIST.")
    teacher = config.teacher or ""
    if not teacher.startswith("insightface:") and not Path(teacher).exists():
        raise InputError(f"--qat: {teacher}, the teacher of {run}, is gone. Put it back, or run without --qat.")
    changes = {
        "init": None,
        "steps": steps,
        "max_minutes": None,
        "precision": "fp32",
        "ema": None,
        "lr": LR_FACTOR * config.lr,
    }
    return config.model_copy(update={**changes, "weight_decay": 0.0})  # biases carry what normalisation did


def prepare_again(config: DistillConfig, info: EncoderInfo) -> Prepared:
    """Prepare images, cached teacher embeddings and head as when the run of ``info`` began. Raises InputError."""
    assert config.teacher is not None
    teacher = open_encoder(config.teacher, config.teacher_preprocess)
    require_same_space(info, teacher.info)
    return prepare(config, teacher, Console(quiet=True))


def train_int8(
    config: DistillConfig, prepared: Prepared, student: Int8Student, info: EncoderInfo, advance: Callable[[int], None]
) -> tuple[nn.Module, EncoderInfo]:
    """Train ``student`` of the run's encoder ``info``. Returns its new weights, frozen and on the CPU, and their info.

    The same run, images, ranges and steps give the same weights. Raises TrainingDiverged and KeyboardInterrupt.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    trainer = Trainer(config, prepared, info.space.dim, info.preprocess.size, student=student)
    try:
        with StopRequest() as stop:
            train(trainer, 0, None, lambda step: advance(1), stop)
    except TrainingDiverged as error:
        raise TrainingDiverged(f"--qat: {error} Nothing was written. Try fewer --qat-steps, or leave it out.") from None
    module = student.plain.cpu().to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    digest = weights_digest(module.state_dict())
    made = describe(info.name, info.role, digest, info.preprocess, info.space.dim, space=info.space)
    return module.requires_grad_(False), made
