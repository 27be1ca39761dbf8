"""DistillConfig: every choice of a training run. Defaults live here alone; the command line is made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, model_validator

from pkd.toolkit.errors import InputError
from pkd.toolkit.record import Record


class DistillConfig(Record):
    """What to train, on what, and for how long."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    out: str
    """Run folder to write: student.pt, config.json, audit.json, log.csv, checkpoint.pt and tb/."""
    faces: tuple[str, ...]
    """Aligned crops with identities: folders of one folder per identity, or list files."""
    unlabelled: tuple[str, ...] = ()
    """Aligned crops without identity, used by the methods that need no label."""
    teacher: str | None = None
    """FILE.onnx, FILE.pt (arcface_torch IResNet), insightface:PACK, a bundle or a run; none trains a teacher."""
    teacher_preprocess: str | None = None
    """How the teacher's pixels are scaled: channels=rgb,mean=127.5,std=127.5 or a JSON file."""
    head: str = "auto"
    """Frozen classifier: means (of the teacher's embeddings), FILE.npz, or auto: the teacher run's own, else means."""
    student: str = "mobilefacenet:1.0"
    """Backbone and, after the colon, its width multiplier."""
    init: str | None = None
    """Run whose weights to start from, instead of random ones; its backbone must be the same."""
    dim: int | None = None
    """Embedding dimension; only without a teacher, whose space decides otherwise (then 512 if not given)."""
    name: str | None = None
    """Name of the encoder that is trained, first part of its id; by default made from backbone and method."""
    method: str = "proxylesskd"
    """proxylesskd, l2kd, none (no distillation), or a weighted sum such as proxylesskd+l2kd:0.5."""
    margin: str = "arcface:0.5"
    """softmax, cosface:M (cosine units) or arcface:M (radians)."""
    scale: float = 64.0
    """Factor on the cosine logits."""
    epochs: float = 10.0
    """Passes over the images; ignored where steps or max_minutes is given."""
    steps: int | None = None
    """Optimiser steps."""
    max_minutes: float | None = None
    """Time budget in minutes, turned into steps by a short measurement at the start."""
    batch: int = 64
    """Images per step."""
    lr: float = 2e-2
    """Peak learning rate of AdamW, after the warm-up and before a cosine down to zero; less for small batches."""
    weight_decay: float = 0.05
    """AdamW's decoupled weight decay; not applied to biases, normalisation and PReLU slopes."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises linearly."""
    augment: float = 0.2
    """Strength of the augmentation, 0 (mirroring only) to 1 (strong light, blur, low resolution, occlusion)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the student's forward and backward pass; auto is bf16 where the CPU or GPU has it."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the augmentation."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints; a killed run loses at most this."""
    threads: int | None = None
    """CPU threads of the training; by default all cores."""
    cache: str | None = None
    """Folder for cached teacher embeddings; by default $PKD_CACHE or the user's cache folder."""

    @model_validator(mode="after")
    def _sensible(self) -> DistillConfig:
        for field in ("scale", "epochs", "steps", "max_minutes", "batch", "lr", "dim", "threads"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise InputError(f"--{field.replace('_', '-')} {value}: must be above 0.")
        if self.batch < 2:
            raise InputError("--batch 1: batch normalisation needs at least 2 images.")
        for field in ("warmup", "augment"):
            if not 0 <= getattr(self, field) <= 1:
                raise InputError(f"--{field} {getattr(self, field)}: must lie between 0 and 1.")
        if self.steps is not None and self.max_minutes is not None:
            raise InputError("--steps and --max-minutes: give one of them.")
        if self.teacher is not None and self.dim is not None:
            raise InputError(f"--dim {self.dim}: the teacher's space decides the dimension. Leave --dim out.")
        if not self.faces and not self.unlabelled:
            raise InputError("no images: give --faces (with identities) or --unlabelled.")
        return self

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self.out)
