"""Define every choice of a training run and its default; the command line of pkd-distill is made from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, field_validator, model_validator

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.models import Record

SGD_DEFAULTS = {"lr": 0.1, "weight_decay": 5e-4}
"""Defaults that differ where the optimiser is SGD."""
VIEWS = ("augment", "views", "teacher_live", "mix")
"""Choices that show an image in other ways than it is."""
CLASSIFIER = ("head", "head_labels", "margin", "gradient", "scale")
"""Choices that mean nothing without class centres: whoever names one has proxylesskd in mind."""
ADOPTED = {"lr": 2e-3, "trunk_lr": 1.0, "batch": 128}
"""Defaults that are other ones for an adopted student."""
UNFROZEN = {"lr": 1e-3, "trunk_lr": 0.1, "batch": 64}
"""Defaults of an adopted student that is trained from its first layer on."""


class DistillConfig(Record):
    """Choose what to train, on which images, and for how long."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    out: str
    """Run folder to write: student.pt, config.json, audit.json, log.csv, checkpoint.pt and tb/."""
    faces: tuple[str, ...] = ()
    """Aligned crops with identities: folders of one folder per identity, lists, RecordIO (.rec) or tar shards."""
    unlabelled: tuple[str, ...] = ()
    """Aligned crops without identity, in the same forms; used by the methods that need no label."""
    teacher: str | None = None
    """Teacher: FILE.onnx, FILE.pt (arcface_torch IResNet), insightface:PACK, bundle or run; none trains one."""
    teacher_preprocess: str | None = None
    """Scaling of the teacher's pixels: channels=rgb,mean=127.5,std=127.5 or a JSON file."""
    head: tuple[str, ...] = ("auto",)
    """Class centres: head.npz, an arcface_torch checkpoint or all its shards (files, folder, pattern); or made from the
    teacher's embeddings: means, fit (margin softmax), images or images:SHARE (a centre per image, SHARE of it its
    own embedding, the rest the class mean); or auto: the teacher run's own, else means."""
    head_labels: str | None = None
    """Label map of the head's files: identities in order of the class rows, one a line, or JSON."""
    merge_duplicates: float | None = None
    """Cosine of class centres from which classes count as one identity and are merged, for example 0.7."""
    student: str = "mobilefacenet:1.0"
    """Backbone and, after the colon, its width multiplier; or a model that exists and is adopted: FILE.onnx, FILE.pt,
    insightface:PACK, bundle or run."""
    student_preprocess: str | None = None
    """Scaling of an adopted student's pixels, in the form of --teacher-preprocess."""
    map_rank: int | None = None
    """Number of values between two halves of an adopted student's last layer, for a smaller file; none: one layer, or
    as many as the student has."""
    shrink: int | None = None
    """Number of parameters to which an adopted student is shrunk, its map included: channels inside its blocks are
    removed and the rest fitted anew, in closed form. For a smaller and faster student, which training then mends."""
    keep: float = 0.0
    """Length, 0 to 1, of an adopted student's own embedding, rotated into the teacher's space, in the sum with the
    teacher's that it is taught, so that two of its own embeddings tell people apart as before. Needs a whole last
    layer."""
    init: str | None = None
    """Initial weights of the student: a run or FILE.pth of arcface_torch with the same backbone."""
    dim: int | None = None
    """Number of embedding dimensions; only without a teacher, whose space decides otherwise (then 512 if not given)."""
    template: str | None = None
    """Template that the crops are aligned to, none for images other than faces; only without a teacher, whose
    preprocessing decides otherwise (then arcface5pt if not given)."""
    name: str | None = None
    """Name of the trained encoder, first part of its id; by default made from backbone and method."""
    method: str = "l2kd"
    """Loss of the training: proxylesskd, l2kd, raml, d3still, csd, infonce, kd, adadistill, margindistillation, none
    (undistilled), fitnets, at, fsp, rkd, cckd, or a weighted sum such as proxylesskd+l2kd:0.5. The last five, named
    alone, are added to the student's own classifier. map, for an adopted student and alone, fits its last layer in
    closed form and trains nothing. MODULE:NAME is a loss of your own, alone or in a sum. The default is infonce for a
    student that starts weak, a new or a shrunk one, and proxylesskd where --head, --head-labels, --margin, --gradient
    or --scale is given."""
    margin: str = "arcface:0.5"
    """Margin of the classification losses: softmax, cosface:M (cosine units) or arcface:M (radians)."""
    gradient: Literal["exact", "straight-through"] = "exact"
    """Slope of the margin in the backward pass: exact, or 1 as in code that computes the margin without autograd."""
    scale: float = 64.0
    """Factor on the cosines that makes them logits."""
    temperature: float = 4.0
    """Divisor of kd's logits, the teacher's and the student's alike."""
    teacher_stages: tuple[str, ...] = ()
    """Teacher stages for fitnets, at, fsp: tensors of an ONNX graph or torch submodules; by default by resolution."""
    epochs: float = 10.0
    """Number of passes over the images; ignored where --steps or --max-minutes is given."""
    steps: int | None = None
    """Number of optimiser steps."""
    max_minutes: float | None = None
    """Time budget in minutes, the teacher's embeddings included; a short measurement turns it into steps."""
    batch: int = 64
    """Number of images per step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimiser: AdamW, or SGD with Nesterov momentum 0.9, whose defaults are --lr 0.1 and --weight-decay 5e-4."""
    lr: float = 2e-2
    """Peak learning rate, after the warm-up and before a cosine down to zero; smaller batches need less."""
    trunk_lr: float = 0.1
    """Factor on the learning rate of everything but the last layer of an adopted student; 1 where layers are frozen."""
    freeze: float | None = None
    """Share, 0 to 1, of an adopted student's arithmetic, from the first layer on, that stays as it is: what it gives
    for an image, not augmented, is computed once and kept in --cache, and a step costs only the rest. By default 0.9
    without a GPU, for up to 100,000 images, where no other views of the images are asked for; else 0."""
    weight_decay: float = 0.05
    """Weight decay; not applied to biases, normalisation and PReLU slopes."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises linearly."""
    clip_norm: float | None = None
    """Largest Euclidean norm of a step's gradient, which is scaled down to it; by default gradients are not clipped."""
    ema: float | None = None
    """Decay per step, such as 0.999, of a moving average of the weights, which is kept instead of the last ones."""
    augment: float = 0.2
    """Strength of the augmentation, a fraction: 0 (mirroring only) to 1 (strong light, blur, occlusion)."""
    views: int = 0
    """Number of fixed augmented views per image, each taught by the teacher's embedding of that very view, which is
    cached as half floats; 0 draws new views in every step and teaches the embedding of the clean image."""
    views_in_memory: bool = False
    """Keep the decoded views in memory, on the GPU where there is one; 300 KB an image with 8 views of 112 pixels."""
    teacher_live: bool = False
    """Let the teacher embed every augmented crop as it is shown, in each step; slower, and nothing is cached of it."""
    mix: float = 0.0
    """Share of the crops, 0 to 1, that are blended with another image; needs --views or --teacher-live."""
    mirror: bool = True
    """Mirror half of the images; not for images, such as digits, that then show something else."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the student's forward and backward pass; auto is bf16 where the CPU or GPU has it."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the augmentation."""
    held_out: float = 0.1
    """Share of the people that are kept out of the training, at most 500, for the check at its end; 0 for none."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints; a killed run loses at most this time."""
    threads: int | None = None
    """Number of CPU threads of the training; by default all cores."""
    cache: str | None = None
    """Folder for cached teacher embeddings; by default $PKD_CACHE or the user's cache folder."""

    @field_validator("head", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        adopted = ADOPTED if _adopts(str(values.get("student", ""))) else {}
        more: dict[str, Any] = dict(SGD_DEFAULTS) if values.get("optimizer") == "sgd" else {}
        if any(values.get(name) for name in CLASSIFIER):
            more["method"] = "proxylesskd"
        elif not adopted or values.get("shrink"):
            more["method"] = "infonce"
        if any(values.get(name) for name in VIEWS):
            more["freeze"] = 0.0
            adopted = adopted and adopted | UNFROZEN
        elif values.get("freeze"):
            more["augment"] = 0.0
        elif values.get("freeze") == 0:
            adopted = adopted and adopted | UNFROZEN
        return {**adopted, **more, **values}

    @model_validator(mode="after")
    def _sensible(self) -> DistillConfig:
        for field in (
            "scale",
            "temperature",
            "epochs",
            "steps",
            "max_minutes",
            "batch",
            "lr",
            "dim",
            "threads",
            "clip_norm",
            "map_rank",
        ):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise InputError(f"--{field.replace('_', '-')} {value}: must be above 0.")
        if self.batch < 2:
            raise InputError("--batch 1: batch normalisation needs at least 2 images.")
        for field in ("warmup", "augment", "mix", "held_out", "trunk_lr", "keep"):
            if not 0 <= getattr(self, field) <= 1:
                raise InputError(f"--{field} {getattr(self, field)}: must lie between 0 and 1.")
        if self.steps is not None and self.max_minutes is not None:
            raise InputError("--steps and --max-minutes: give one of them.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"--ema {self.ema}: a decay between 0 and 1, for example 0.999.")
        if self.views < 0:
            raise InputError(f"--views {self.views}: a number of views per image, for example 8, or 0.")
        if self.views_in_memory and not self.views:
            raise InputError("--views-in-memory: there are none. Add --views 8.")
        if self.views and self.teacher_live:
            raise InputError("--views and --teacher-live: give one of them.")
        if (self.views or self.teacher_live) and self.teacher is None:
            raise InputError("--views and --teacher-live: need --teacher, which embeds what the student sees.")
        if self.mix and not (self.views or self.teacher_live):
            raise InputError(f"--mix {self.mix}: the teacher must see mixed faces. Add --views 8 or --teacher-live.")
        if self.freeze and not 0 < self.freeze < 1:
            raise InputError(f"--freeze {self.freeze}: a share of the student's arithmetic, for example 0.9, or 0.")
        if self.freeze and not self.adopts:
            raise InputError(f"--freeze {self.freeze}: needs an adopted student, --student FILE.onnx.")
        if self.shrink is not None and not (self.shrink > 0 and self.adopts):
            raise InputError(f"--shrink {self.shrink}: a number of parameters for --student FILE.onnx, say 400000.")
        if self.keep and (not self.adopts or self.mix):
            raise InputError(
                f"--keep {self.keep}: is for an adopted student, --student FILE.onnx, and for faces that are not mixed."
            )
        if self.freeze and any(getattr(self, name) for name in VIEWS):
            raise InputError(
                f"--freeze {self.freeze}: frozen layers see each image as it is. Leave out --augment, --views, "
                "--teacher-live and --mix, or use --freeze 0."
            )
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
    def adopts(self) -> bool:
        """Tell whether the student is a model that exists, not a backbone of the zoo."""
        return _adopts(self.student)

    @property
    def run(self) -> Path:
        """Return the run folder as a path."""
        return Path(self.out)


def _adopts(student: str) -> bool:
    named = re.fullmatch(r"[^/:.]+(:[^/:]*)?", student) and not student.startswith("insightface:")
    return bool(student) and (not named or Path(student).exists())
