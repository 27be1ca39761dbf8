"""Everything a training needs before its first step: images, teacher targets, an audited head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from pkd.toolkit.command import progress
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.head import FILE as HEAD_FILE
from pkd.toolkit.distill.head import Audit, Head, audit, class_means, read_head, require_sound
from pkd.toolkit.distill.methods import WeightedSum
from pkd.toolkit.embed import default_cache, embed_faces
from pkd.toolkit.errors import InputError
from pkd.toolkit.faces import FaceSet, join
from pkd.toolkit.runtime import Encoder

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Prepared:
    """``targets``: the teacher's unit embeddings of every image, plain and mirrored, each N×D; None without a teacher.

    ``labels``: int64 N into the head's classes (or the identities, where the head is trained), −1 where unknown.
    """

    faces: FaceSet
    labels: NDArray[np.int64]
    data_digest: str
    targets: tuple[Float, Float] | None
    head: Head | None
    audit: Audit | None
    identities: tuple[str, ...]


def prepare(config: DistillConfig, teacher: Encoder | None, console: Console) -> Prepared:
    """Read the images, embed them with the teacher (cached), resolve the head and refuse it if the audit does."""
    method = WeightedSum.parse(config.method)
    if method.needs_teacher and teacher is None:
        raise InputError(f"--method {config.method}: needs --teacher. Without one, --method none trains a teacher.")
    faces = _read_faces(config, method, console)
    if len(faces) < config.batch:
        raise InputError(f"{len(faces):,} images are fewer than --batch {config.batch}. Give more or a smaller batch.")
    targets = _targets(config, teacher, faces, console) if teacher else None
    head, labels = None, faces.labels
    found = None
    if method.head == "frozen":
        assert teacher is not None and targets is not None
        head = _resolve_head(config, targets, faces, teacher.info.space.dim)
        row = {identity: i for i, identity in enumerate(head.identities)}
        remap = np.array([row[identity] for identity in faces.identities] + [-1], np.int64)
        labels = remap[faces.labels]
        found = audit(head, *targets, labels)
        require_sound(found, teacher.info.space.dim)
    return Prepared(faces, labels, faces.digest(), targets, head, found, faces.identities)


def _read_faces(config: DistillConfig, method: WeightedSum, console: Console) -> FaceSet:
    nothing = FaceSet.read()
    faces = FaceSet.read(*config.faces) if config.faces else nothing
    unlabelled = FaceSet.read(*config.unlabelled, labelled=False) if config.unlabelled else nothing
    if method.needs_labels:
        if len(faces.identities) < 2:
            raise InputError(
                f"{' '.join(config.faces) or '--faces'}: {len(faces.identities)} identities; --method {config.method} "
                "classifies people and needs at least 2. Give --faces with a folder per person, or --method l2kd."
            )
        if len(unlabelled):
            console.print(f"--method {config.method} uses labels only: {len(unlabelled):,} unlabelled images left out.")
        return faces
    return join(faces, unlabelled)


def _targets(config: DistillConfig, teacher: Encoder, faces: FaceSet, console: Console) -> tuple[Float, Float]:
    cache = Path(config.cache) if config.cache else default_cache()
    with progress(console, "teacher embeddings", 2 * len(faces)) as advance:
        plain = embed_faces(teacher, faces, cache=cache, jobs=config.threads, advance=advance)
        mirrored = embed_faces(teacher, faces, flip=True, cache=cache, jobs=config.threads, advance=advance)
    return plain, mirrored


def _resolve_head(config: DistillConfig, targets: tuple[Float, Float], faces: FaceSet, dim: int) -> Head:
    own = Path(config.teacher or "") / HEAD_FILE
    if config.head == "auto" and own.is_file():
        return read_head(own, faces.identities, dim)
    if config.head in {"auto", "means"}:
        return class_means(*targets, faces.labels, faces.identities)
    return read_head(config.head, faces.identities, dim)
