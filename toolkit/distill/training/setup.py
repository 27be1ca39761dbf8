"""Prepare a training before its first step: images, teacher embeddings, an audited head."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from pkd.toolkit.core.cli_support import progress
from pkd.toolkit.core.errors import BadHead, InputError
from pkd.toolkit.data.face_set import FaceSet, join
from pkd.toolkit.data.row_store import Rows
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.heads.audit import Audit
from pkd.toolkit.distill.heads.head import Head
from pkd.toolkit.distill.heads.margin import Margin
from pkd.toolkit.distill.heads.resolve import Classes, HeadChoice, resolve_head
from pkd.toolkit.distill.losses.feature_hooks import StagePlan, plan_stages
from pkd.toolkit.distill.losses.registry import WeightedSum
from pkd.toolkit.distill.models.backbones import build
from pkd.toolkit.distill.training.views import StoredViews, Teaching, ViewMaker
from pkd.toolkit.encoders.base import Encoder
from pkd.toolkit.encoders.embed import default_cache, embed_stored


@dataclass(frozen=True)
class Prepared:
    """Hold the data of a training.

    ``targets``: the teacher's unit embeddings of every image, plain and mirrored, each N×D and read by index from
    disk; None without a teacher.

    ``labels``: int64 N into the head's rows (or the identities, where the head is trained), −1 where unknown.
    ``exclude``: int64 C×2 by row of the head, the range of rows that a sample's denominator leaves out; None where that
    is its own row alone.
    """

    faces: FaceSet
    labels: NDArray[np.int64]
    data_digest: str
    targets: tuple[Rows, Rows] | None
    head: Head | None
    audit: Audit | None
    identities: tuple[str, ...]
    exclude: NDArray[np.int64] | None = None
    stages: StagePlan | None = None
    views: StoredViews | None = None
    live: Encoder | None = None

    @property
    def teaching(self) -> Teaching:
        """Say where the teacher's embeddings of a batch come from."""
        return Teaching(self.targets, self.views, self.live)

    @property
    def people(self) -> NDArray[np.int64]:
        """Return int64 N: the identity of every image, −1 where unknown; rows of one person may be many in a head."""
        return self.labels if self.exclude is None else self.faces.labels


def prepare(config: DistillConfig, teacher: Encoder | None, console: Console) -> Prepared:
    """Read the images, embed them with the teacher (cached), resolve the head and refuse it if the audit does."""
    method = WeightedSum.parse(config.method)
    if method.needs_teacher and teacher is None:
        raise InputError(f"--method {config.method}: needs --teacher. Without one, --method none trains a teacher.")
    if "margindistillation" in method.names and Margin.parse(config.margin).kind == "softmax":
        raise InputError(f"--method {config.method}: varies a margin and --margin softmax has none. Use arcface:0.5.")
    if config.mix and method.needs_labels:
        raise InputError(
            f"--mix {config.mix}: --method {config.method} needs labels, and a mixed face has none. Add l2kd."
        )
    stages = _plan(config, teacher, method.stages) if teacher and method.stages else None
    choice = HeadChoice.parse(config.head, config.teacher) if method.head in {"frozen", "ema"} else None
    faces = _read_faces(config, method, choice, console)
    if len(faces) < config.batch:
        raise InputError(f"{len(faces):,} images are fewer than --batch {config.batch}. Give more or a smaller batch.")
    targets = _targets(config, teacher, faces, console) if teacher else None
    classes = Classes(None, faces.labels, faces.identities, None)
    if teacher and targets:
        key = f"{teacher.info.id} {faces.digest()}{'' if config.mirror else ' not mirrored'}"
        classes = resolve_head(config, choice, targets, faces.labels, faces.identities, key, console)
    if classes.audit and classes.audit.fault and choice:
        raise BadHead(classes.audit.fault)
    exclude = classes.head.exclude if classes.head else None
    views = _views(config, teacher, faces, console) if teacher and config.views else None
    live = teacher if config.teacher_live else None
    return Prepared(
        faces, classes.labels, faces.digest(), targets, classes.head, classes.audit, classes.identities, exclude,
        stages, views, live,
    )  # fmt: skip


def _plan(config: DistillConfig, teacher: Encoder, least: int) -> StagePlan:
    size = teacher.info.preprocess.size
    student = build(config.student, teacher.info.space.dim, size)
    return plan_stages(teacher, config.teacher_stages, student, size, least, config.threads or os.cpu_count() or 1)


def _read_faces(config: DistillConfig, method: WeightedSum, choice: HeadChoice | None, console: Console) -> FaceSet:
    nothing = FaceSet.read()
    faces = FaceSet.read(*config.faces) if config.faces else nothing
    unlabelled = FaceSet.read(*config.unlabelled, labelled=False) if config.unlabelled else nothing
    if method.needs_labels and not (choice and choice.kind == "images"):
        if len(faces.identities) < 2:
            raise InputError(
                f"{' '.join(config.faces) or '--faces'}: {len(faces.identities)} identities; --method {config.method} "
                "classifies them and needs at least 2. Give --faces with a folder for each, or --method l2kd."
            )
        if len(unlabelled):
            console.print(f"--method {config.method} uses labels only: {len(unlabelled):,} unlabelled images left out.")
        return faces
    return join(faces, unlabelled)


def _views(config: DistillConfig, teacher: Encoder, faces: FaceSet, console: Console) -> StoredViews:
    """Embed the augmented views that the student will see."""
    size = teacher.info.preprocess.size
    maker = ViewMaker(faces, size, augment=config.augment, mirror=config.mirror, mix=config.mix)
    views = StoredViews(maker, config.views, config.seed, Path(config.cache) if config.cache else default_cache())
    with progress(console, "teacher embeddings of views", config.views * len(faces)) as advance:
        views.embed(teacher, config.threads, advance)
    return views


def _targets(config: DistillConfig, teacher: Encoder, faces: FaceSet, console: Console) -> tuple[Rows, Rows]:
    cache = Path(config.cache) if config.cache else default_cache()
    with progress(console, "teacher embeddings", (1 + config.mirror) * len(faces)) as advance:
        plain = embed_stored(teacher, faces, cache=cache, jobs=config.threads, advance=advance)
        if not config.mirror:
            return plain, plain
        mirrored = embed_stored(teacher, faces, flip=True, cache=cache, jobs=config.threads, advance=advance)
    return plain, mirrored
