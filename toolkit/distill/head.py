"""Head: the frozen classifier, C×D unit class centres in the teacher's space, and the audit that precedes its use."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.errors import BadHead
from pkd.toolkit.record import Record

Float = NDArray[np.float32]
FILE = "head.npz"
LEAST_AGREEMENT = 0.25
"""An audit whose chance-corrected top-1 is below this describes another space or other labels, not a hard data set."""


@dataclass(frozen=True)
class Head:
    """``centres``: float32 C×D unit rows. ``identities``: C names, in class order. ``source``: where it came from."""

    centres: Float
    identities: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        count = len(self.centres)
        if self.centres.ndim != 2 or count != len(self.identities):
            raise BadHead(
                f"{self.source}: centres of shape {self.centres.shape} for {len(self.identities)} identities."
            )
        if len(set(self.identities)) != count:
            raise BadHead(f"{self.source}: an identity names two classes. Merge them first.")


class ClassAudit(Record):
    """One class in the audit: mean cosine of the teacher's embeddings to this class's centre."""

    identity: str
    images: int
    cosine: float


class Audit(Record):
    """How well a head fits the teacher's embeddings of the training images."""

    source: str
    classes: int
    audited_images: int
    """Images that could be judged: with class means, those whose class has another image."""
    mean_cosine: float | None
    """Mean cosine of a teacher embedding to its own centre; with class means the image itself is left out."""
    top1: float | None
    """Share of images whose nearest centre is their own."""
    nearest_cosine: float | None
    """Mean cosine to the nearest centre, whichever it is."""
    worst: tuple[ClassAudit, ...]


def class_means(plain: Float, mirrored: Float, labels: NDArray[np.int64], identities: tuple[str, ...]) -> Head:
    """Mean of the teacher's unit embeddings of each identity's images and their mirror images, normalised.

    ``plain``, ``mirrored``: N×D unit rows. ``labels``: int64 N, −1 for unlabelled images, which do not count.
    """
    sums = _sums(plain, mirrored, labels, len(identities))
    return Head(_unit(sums, identities, "class means"), identities, "means")


def read_head(path: str | Path, identities: tuple[str, ...], dim: int) -> Head:
    """Read ``head.npz`` (``centres`` C×D, ``identities`` C, optional). Raises BadHead naming file and remedy.

    Without names in the file, row i is taken to be ``identities[i]``; the audit finds out if that is wrong.
    """
    try:
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as arrays:
            centres = np.asarray(arrays["centres"], np.float32)
            names = tuple(map(str, arrays["identities"])) if "identities" in arrays else identities
    except OSError as error:
        raise BadHead(f"{path}: {error.strerror}. Pass --head means, or the head.npz of a run.") from None
    except (KeyError, ValueError, EOFError) as error:
        raise BadHead(f"{path}: not a head: {error}. It needs an array 'centres' of C×{dim}.") from None
    if centres.ndim != 2 or centres.shape[1] != dim:
        hint = " It looks transposed (D×C)." if centres.ndim == 2 and centres.shape[0] == dim else ""
        raise BadHead(f"{path}: centres have shape {centres.shape}, the teacher's space has {dim} dimensions.{hint}")
    if len(names) != len(centres):
        raise BadHead(f"{path}: {len(centres):,} centres, but the images show {len(names):,} identities.")
    if missing := sorted(set(identities) - set(names)):
        raise BadHead(
            f"{path}: has no centre for {len(missing):,} of {len(identities):,} identities (first: {missing[0]}). "
            "Remove their images or pass --head means."
        )
    return Head(_unit(centres, names, str(path)), names, str(path))


def save_head(head: Head, path: Path) -> None:
    """Write ``head.npz`` atomically."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez(file, centres=head.centres, identities=np.array(head.identities))
    part.replace(path)


def audit(head: Head, plain: Float, mirrored: Float, labels: NDArray[np.int64], worst: int = 10) -> Audit:
    """Hold the head against the teacher's embeddings of the images it is to be trained on.

    ``labels``: int64 N into the head's classes, −1 for unlabelled images. A class mean contains the image itself, which
    would make any labelling look right; so with class means every image is compared with the mean of the others.
    """
    means = head.source == "means"
    counts = np.bincount(labels[labels >= 0], minlength=len(head.centres))
    judged = np.flatnonzero((labels >= 0) & (counts[labels] > (1 if means else 0)))
    sums = _sums(plain, mirrored, labels, len(head.centres)) if means else None
    own = np.empty(len(judged), np.float64)
    other = np.empty(len(judged), np.float64)
    for start in range(0, len(judged), 1024):
        rows = judged[start : start + 1024]
        mine = labels[rows]
        cosines = plain[rows] @ head.centres.T
        if sums is None:
            own[start : start + 1024] = cosines[np.arange(len(rows)), mine]
        else:
            rest = sums[mine] - plain[rows] - mirrored[rows]
            rest /= np.maximum(np.linalg.norm(rest, axis=1, keepdims=True), 1e-12)
            own[start : start + 1024] = np.sum(rest * plain[rows], axis=1)
        cosines[np.arange(len(rows)), mine] = -2
        other[start : start + 1024] = cosines.max(axis=1)
    if not len(judged):
        return Audit(
            source=head.source, classes=len(head.centres), audited_images=0,
            mean_cosine=None, top1=None, nearest_cosine=None, worst=(),
        )  # fmt: skip
    totals = np.bincount(labels[judged], own, minlength=len(head.centres))
    seen = np.bincount(labels[judged], minlength=len(head.centres))
    per_class = np.divide(totals, seen, out=np.full(len(seen), np.inf), where=seen > 0)
    order = [int(c) for c in np.argsort(per_class, kind="stable")[:worst] if seen[c]]
    return Audit(
        source=head.source,
        classes=len(head.centres),
        audited_images=len(judged),
        mean_cosine=float(own.mean()),
        top1=float(np.mean(own > other)),
        nearest_cosine=float(np.maximum(own, other).mean()),
        worst=tuple(
            ClassAudit(identity=head.identities[c], images=int(seen[c]), cosine=float(per_class[c])) for c in order
        ),
    )


def require_sound(found: Audit, dim: int) -> None:
    """Refuse a head that the audit shows to be random or permuted. Raises BadHead.

    The nearest of C random directions has a cosine of about sqrt(2·ln C / D): well above it the centres are the
    teacher's and only their labels are wrong; near it they are not the teacher's at all.
    """
    if found.top1 is None or found.mean_cosine is None or found.nearest_cosine is None:
        return
    chance = 1 / max(found.classes, 2)
    if (found.top1 - chance) / (1 - chance) >= LEAST_AGREEMENT:
        return
    random_level = math.sqrt(2 * math.log(max(found.classes, 2)) / dim)
    seen = (
        f"head {found.source}: only {found.top1:.1%} of {found.audited_images:,} images are nearest to their own "
        f"centre (mean cosine {found.mean_cosine:.2f}"
    )
    if found.nearest_cosine > 1.5 * random_level:
        raise BadHead(
            f"{seen}, to the nearest centre {found.nearest_cosine:.2f}): the labels are permuted or wrong. Check that "
            "the identities of the images are in the order of the head's classes, or pass --head means."
        )
    raise BadHead(
        f"{seen}, to the nearest {found.nearest_cosine:.2f}, as for random directions): these are not this teacher's "
        "centres, or the preprocessing is not the teacher's. Check --teacher-preprocess, or pass --head means."
    )


def _sums(plain: Float, mirrored: Float, labels: NDArray[np.int64], classes: int) -> Float:
    sums = np.zeros((classes, plain.shape[1]), np.float32)
    known = labels >= 0
    np.add.at(sums, labels[known], plain[known] + mirrored[known])
    return sums


def _unit(rows: Float, identities: tuple[str, ...], source: str) -> Float:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] < 1e-6))
    if len(bad):
        raise BadHead(
            f"head {source}: {len(bad):,} of {len(rows):,} centres are zero or not finite (first: row {bad[0]}, "
            f"{identities[bad[0]]}). Such a class would join every denominator: remove it, or pass --head means."
        )
    unit: Float = (rows / norms).astype(np.float32)
    return unit
