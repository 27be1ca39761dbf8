"""Resolve the head of a run: inherited, or made from the teacher's embeddings; audited before training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from pkd.toolkit.core.errors import BadHead, InputError
from pkd.toolkit.core.progress import ConsoleProgress
from pkd.toolkit.data.row_store import Rows
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.heads.audit import Audit, audit
from pkd.toolkit.distill.heads.duplicates import (
    MAX_UNASKED_CLASSES,
    SUSPECT_COSINE,
    Duplicates,
    Merge,
    merge,
    neighbours,
    report_duplicates,
)
from pkd.toolkit.distill.heads.fit import MARGIN, SCALE, fit_head, steps_of
from pkd.toolkit.distill.heads.head import FILE, Head, class_means, image_centres, merge_classes, read_head, save_head
from pkd.toolkit.distill.heads.rows import Int


@dataclass(frozen=True)
class HeadChoice:
    """Say where the centres come from.

    ``files``: those of an inherited head. ``share``: weight of an image's own embedding in its centre, for ``images``.
    """

    kind: Literal["files", "means", "fit", "images"]
    files: tuple[str, ...] = ()
    share: float = 1.0

    @classmethod
    def parse(cls, specs: Sequence[str], teacher: str | None) -> HeadChoice:
        """Read ``auto``, ``means``, ``fit``, ``images``, ``images:0.5``, or files. Raises InputError.

        ``auto``: the classifier that ``--method none`` left in the teacher's run folder, else means.
        """
        first, _, number = specs[0].partition(":")
        if first not in {"auto", "means", "fit", "images"}:
            return cls("files", tuple(specs))
        if len(specs) > 1 or (number and first != "images"):
            raise InputError(f"--head {' '.join(specs)}: give one of auto, means, fit, images:SHARE, or files.")
        if first == "auto":
            own = Path(teacher or "") / FILE
            return cls("files", (str(own),)) if own.is_file() else cls("means")
        try:
            share = float(number) if number else 1.0
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            raise InputError(f"--head {specs[0]}: the share of the image's own embedding lies above 0 and up to 1.")
        return cls(first, share=share)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Classes:
    """Hold the classes of a training.

    ``head``: None where the method reads none. ``labels``: int64 N into the head's rows (or into ``identities``, where
    there is no head), −1 where unknown. ``audit``: None without identities.
    """

    head: Head | None
    labels: Int
    identities: tuple[str, ...]
    audit: Audit | None


def resolve_head(
    config: DistillConfig,
    choice: HeadChoice | None,
    targets: tuple[Rows, Rows],
    labels: Int,
    identities: tuple[str, ...],
    key: str,
    console: Console,
) -> Classes:
    """Merge duplicate classes if asked, make or read the head, and audit it.

    ``choice``: None where the method reads no head; then the class means are audited, as a check of the labels.
    ``targets``: plain and mirrored embeddings. ``key``: digest of teacher and images, by which a fitted head is known
    again when the run resumes.
    """
    dim = targets[0].shape[1]
    if choice and choice.kind == "files":
        return _inherit(config, choice, targets, labels, identities, dim)
    if not identities and (choice is None or choice.kind == "images"):
        head, rows = image_centres(*targets, labels, (), scratch=config.run) if choice else (None, labels)
        return Classes(head, rows, (), None)
    if not identities:
        raise InputError(
            f"--head {choice.kind if choice else ''}: is made of images with identity, and there are none. "
            "Give --faces, --head images, or the files of a head."
        )
    means = class_means(*targets, labels, identities, config.run)
    counts = _counts(labels, len(identities))
    same, merged = _duplicates(config, means, counts)
    if merged and merged.merged:
        labels, identities = _renumber(labels, merged.classes), merged.identities
        means = class_means(*targets, labels, identities, config.run)
    found = audit(means, *targets, labels)
    found = found.model_copy(update={"duplicates": same, "merged": merged.merged if merged else ()})
    if choice is None:
        return Classes(
            None, labels, identities, found.model_copy(update={"source": "class means, to check the labels"})
        )
    if found.fault:  # nothing made of such labels is worth the time
        return Classes(None, labels, identities, found)
    head, rows = _make(config, choice, means, targets, labels, key, console)
    return Classes(head, rows, identities, found.model_copy(update={"source": head.source}))


def _inherit(
    config: DistillConfig,
    choice: HeadChoice,
    targets: tuple[Rows, Rows],
    labels: Int,
    identities: tuple[str, ...],
    dim: int,
) -> Classes:
    head = read_head(choice.files, identities, dim, labels=config.head_labels, scratch=config.run)
    row = {identity: i for i, identity in enumerate(head.identities)}
    labels = _renumber(labels, np.array([row[identity] for identity in identities], np.int64))
    counts = _counts(labels, len(head.identities))
    same, merged = _duplicates(config, head, counts)
    if merged and merged.merged:
        labels = _renumber(labels, merged.classes)
        head = merge_classes(head, merged.classes, merged.identities, config.run)
    found = audit(head, *targets, labels)
    found = found.model_copy(update={"duplicates": same, "merged": merged.merged if merged else ()})
    return Classes(head, labels, identities, found)


def _make(
    config: DistillConfig,
    choice: HeadChoice,
    means: Head,
    targets: tuple[Rows, Rows],
    labels: Int,
    key: str,
    console: Console,
) -> tuple[Head, Int]:
    if choice.kind == "images":
        return image_centres(*targets, labels, means.identities, choice.share, config.run)
    if choice.kind == "means":
        return means, labels
    return _fit(config, means, targets, labels, key, console), labels


def _fit(
    config: DistillConfig, means: Head, targets: tuple[Rows, Rows], labels: Int, key: str, console: Console
) -> Head:
    """Fit the head, or read it from the run folder if it was fitted there to the same images and settings."""
    settings = f"{key} {MARGIN} {SCALE} {config.seed} {config.merge_duplicates}"
    digest = hashlib.sha256(settings.encode()).hexdigest()
    path = config.run / FILE
    if path.is_file() and (stored := _stored(path, digest, means)):
        return stored
    with ConsoleProgress(console)("fitting the head", steps_of(int((labels >= 0).sum()))) as advance:
        head = fit_head(means, *targets, labels, config.seed, advance)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_head(head, path, digest)
    return _stored(path, digest, means) or head  # equal to the last bit to the head that a resumed run reads


def _stored(path: Path, digest: str, means: Head) -> Head | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "key" not in arrays or str(arrays["key"]) != digest:
                return None
        head = read_head(path, means.identities, means.centres.shape[1])
    except (OSError, ValueError, BadHead):
        return None
    return Head(head.centres, head.identities, "fit")


def _duplicates(config: DistillConfig, head: Head, counts: Int) -> tuple[Duplicates | None, Merge | None]:
    if config.merge_duplicates is None and len(head.centres) > MAX_UNASKED_CLASSES:
        return None, None
    threshold = config.merge_duplicates or SUSPECT_COSINE
    near = neighbours(head.centres, threshold)
    merged = None if config.merge_duplicates is None else merge(head.centres, near, head.identities, counts, threshold)
    return report_duplicates(near, head.identities, counts, threshold, merged), merged


def _renumber(labels: Int, classes: Int) -> Int:
    return np.append(classes, -1)[labels]


def _counts(labels: Int, classes: int) -> Int:
    return np.bincount(labels[labels >= 0], minlength=classes).astype(np.int64)
