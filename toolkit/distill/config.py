"""DistillConfig: every choice of a training run. Defaults live here alone; the command line is made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, field_validator, model_validator

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.models import Record


class DistillConfig(Record):
    """What to train, on what, and for how long."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    out: str
    """Run folder to write: student.pt, config.json, audit.json, log.csv, checkpoint.pt and tb/."""
    faces: tuple[str, ...] = ()
    """Aligned crops with identities: folders of one folder per identity, lists, RecordIO (.rec) or tar shards."""
    unlabelled: tuple[str, ...] = ()
    """Aligned crops without identity, used by the methods that need no label."""
    teacher: str | None = None
    """FILE.onnx, FILE.pt (arcface_torch IResNet), insightface:PACK, a bundle or a run; none trains a teacher."""
    teacher_preprocess: str | None = None
    """How the teacher's pixels are scaled: channels=rgb,mean=127.5,std=127.5 or a JSON file."""
    head: tuple[str, ...] = ("auto",)
    """The teacher's classifier: head.npz, an arcface_torch checkpoint or all shards of one (files, folder, pattern); or
    made from its embeddings: means, fit (margin softmax), images or images:SHARE (a centre per image, SHARE of it the
    image's own embedding, the rest its class mean); or auto: the teacher run's own, else means."""
    head_labels: str | None = None
    """Label map of the head's files: identities in order of the class rows, one a line, or JSON."""
    merge_duplicates: float | None = None
    """Cosine of class centres from which classes count as one identity and are merged, for example 0.7."""
    student: str = "mobilefacenet:1.0"
    """Backbone and, after the colon, its width multiplier."""
    init: str | None = None
    """Run, or FILE.pth of arcface_torch, whose weights to start from; its backbone must be the same."""
    dim: int | None = None
    """Embedding dimension; only without a teacher, whose space decides otherwise (then 512 if not given)."""
    template: str | None = None
    """Template that the crops are aligned to, none for images other than faces; only without a teacher, whose
    preprocessing decides otherwise (then arcface5pt if not given)."""
    name: str | None = None
    """Name of the encoder that is trained, first part of its id; by default made from backbone and method."""
    method: str = "proxylesskd"
    """proxylesskd, l2kd, kd, adadistill, margindistillation, none (no distillation), fitnets, at, fsp, rkd, cckd, or a
    weighted sum such as proxylesskd+l2kd:0.5. The last five alone stand beside the student's own classifier."""
    margin: str = "arcface:0.5"
    """softmax, cosface:M (cosine units) or arcface:M (radians)."""
    gradient: Literal["exact", "straight-through"] = "exact"
    """Slope of the margin in the backward pass: its own, or 1 as in code that computes the margin without autograd."""
    scale: float = 64.0
    """Factor on the cosine logits."""
    temperature: float = 4.0
    """Divides the logits of kd, teacher's and student's alike."""
    teacher_stages: tuple[str, ...] = ()
    """For fitnets, at, fsp: tensors of an ONNX teacher or submodules of a torch one; by default by resolution."""
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
    mirror: bool = True
    """Show half of the images mirrored; not for images, such as digits, that then show something else."""
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

    @field_validator("head", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _sensible(self) -> DistillConfig:
        for field in ("scale", "temperature", "epochs", "steps", "max_minutes", "batch", "lr", "dim", "threads"):
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
        if not self.head:
            raise InputError("--head: names no head. Give auto, means, fit, images or files.")
        if self.merge_duplicates is not None and not 0 < self.merge_duplicates < 1:
            raise InputError(f"--merge-duplicates {self.merge_duplicates}: a cosine between 0 and 1, for example 0.7.")
        if self.merge_duplicates is not None and self.teacher is None:
            raise InputError("--merge-duplicates: needs --teacher, whose embeddings tell which classes are the same.")
        if self.teacher is not None and self.dim is not None:
            raise InputError(f"--dim {self.dim}: the teacher's space decides the dimension. Leave --dim out.")
        if self.teacher is not None and self.template is not None:
            raise InputError(f"--template {self.template}: the teacher's preprocessing decides. Leave --template out.")
        if not self.faces and not self.unlabelled:
            raise InputError("no images: give --faces (with identities) or --unlabelled.")
        return self

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self.out)
