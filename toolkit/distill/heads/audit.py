"""Audit a head against the teacher's embeddings of the training images, before the first step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pkd.toolkit.core.models import Record
from pkd.toolkit.data.row_store import Rows
from pkd.toolkit.distill.heads.duplicates import Duplicates, Merged
from pkd.toolkit.distill.heads.head import Head
from pkd.toolkit.distill.heads.rows import CHUNK, Int, class_sums, compute_device

MIN_AGREEMENT = 0.25
"""An audit whose chance-corrected top-1 is below this describes another space or other labels, not a hard data set."""
MAX_PRODUCTS = 5e11
"""Multiplications spent on nearest centres; where all images would take more, a fixed random sample is looked up."""
Double = NDArray[np.float64]


class ClassAudit(Record):
    """Record one class of the audit; ``cosine``: mean of its images' teacher embeddings to its centre."""

    identity: str
    images: int
    cosine: float


class Audit(Record):
    """Record how well a head fits the teacher's embeddings of the training images."""

    source: str
    classes: int
    images: int
    """Images with an identity."""
    unlabelled_images: int
    empty_classes: int
    """Classes of the head that no image shows."""
    audited_images: int
    """Images with a centre to compare with: with centres made of these images, those whose class has another image."""
    mean_cosine: float | None
    """Mean cosine of a teacher embedding to its own centre; with class means the image itself is left out."""
    top1_images: int
    """Images whose nearest centre was looked up: all audited ones, or a sample where that would take long."""
    top1: float | None
    """Share of those whose nearest centre is their own."""
    misplaced_classes: int
    """Classes with two or more such images of which none is nearest to the own centre: wrong rows, or mixed images."""
    nearest_cosine: float | None
    """Mean cosine to the nearest centre, whichever it is."""
    worst: tuple[ClassAudit, ...]
    duplicates: Duplicates | None = None
    """Classes that nearly coincide; None where that was not looked up."""
    merged: tuple[Merged, ...] = ()
    """Classes that were merged before this audit."""
    fault: str | None = None
    """Reason why this head must not be used, None if it may."""


@dataclass(frozen=True)
class _OwnCosines:
    """Hold the cosine (``own``) of each audited image (``indices``) to its own centre."""

    indices: Int
    own: Double


def audit(
    head: Head, plain: Rows, mirrored: Rows, labels: Int, *, leave_out: bool | None = None, worst: int = 10
) -> Audit:
    """Compare the head with the teacher's embeddings of the images.

    ``labels``: int64 N into the head's classes, −1 for unlabelled images. ``leave_out``: whether the centres were made
    of these very images; by default whether they are class means. A class mean contains the image itself, which would
    make any labelling look right; so then every image is compared with the mean of the others.
    """
    leave_out = head.source == "means" if leave_out is None else leave_out
    audited = _left_out(plain, mirrored, labels, len(head.centres)) if leave_out else _own(head, plain, labels)
    counts = np.bincount(labels[labels >= 0], minlength=len(head.centres))
    known = int(counts.sum())
    found = Audit(
        source=head.source, classes=len(head.centres), images=known, unlabelled_images=len(labels) - known,
        empty_classes=int((counts == 0).sum()), audited_images=len(audited.indices), mean_cosine=None,
        top1_images=0, top1=None, misplaced_classes=0, nearest_cosine=None, worst=(),
    )  # fmt: skip
    if not len(audited.indices):
        return found
    sample = _sample(len(audited.indices), len(head.centres) * head.centres.shape[1])
    looked, own = audited.indices[sample], audited.own[sample]
    other, rival = nearest_other(head, plain, looked, labels[looked])
    found = found.model_copy(
        update={
            "mean_cosine": float(audited.own.mean()),
            "top1_images": len(looked),
            "top1": float(np.mean(own > other)),
            "misplaced_classes": _misplaced(labels[looked], own > other),
            "nearest_cosine": float(np.maximum(own, other).mean()),
            "worst": _worst(head, audited, labels, worst),
        }
    )
    nearest = np.where(own > other, labels[looked], rival)
    return found.model_copy(update={"fault": _fault(found, head, labels[looked], nearest)})


def nearest_other(head: Head, plain: Rows, indices: Int, mine: Int) -> tuple[Double, Int]:
    """Find each image's largest cosine to a centre that is not row ``mine``, and that centre's row."""
    device = compute_device()
    best = np.full(len(indices), -2.0)
    rows = np.full(len(indices), -1, np.int64)
    for start in range(0, len(indices), CHUNK):
        here = slice(start, start + CHUNK)
        queries = torch.from_numpy(plain[indices[here]]).to(device)
        own = torch.from_numpy(mine[here]).to(device)
        top = torch.full((len(queries),), -2.0, device=device)
        at = torch.full((len(queries),), -1, device=device)
        for first in range(0, len(head.centres), 2048):
            cosines = queries @ head.centres[first : first + 2048].to(device).float().T
            inside = torch.nonzero((own >= first) & (own < first + cosines.shape[1]))[:, 0]
            cosines[inside, own[inside] - first] = -2
            values, places = cosines.max(dim=1)
            at = torch.where(values > top, places + first, at)
            top = torch.maximum(values, top)
        best[here], rows[here] = top.double().cpu().numpy(), at.cpu().numpy()
    return best, rows


def _own(head: Head, plain: Rows, labels: Int) -> _OwnCosines:
    indices = np.flatnonzero(labels >= 0)
    own = np.empty(len(indices), np.float64)
    for start in range(0, len(indices), CHUNK):
        here = indices[start : start + CHUNK]
        own[start : start + CHUNK] = np.sum(plain[here] * head.rows(labels[here]), axis=1)
    return _OwnCosines(indices, own)


def _left_out(plain: Rows, mirrored: Rows, labels: Int, classes: int) -> _OwnCosines:
    found: list[tuple[Int, Double]] = []
    counts = np.bincount(labels[labels >= 0], minlength=classes)
    first = 0
    for indices, rows, turned, sums in class_sums(plain, mirrored, labels, classes):
        several = counts[labels[indices]] > 1
        rest: NDArray[np.float32] = sums[labels[indices] - first] - rows - turned
        rest /= np.maximum(np.linalg.norm(rest, axis=1, keepdims=True), 1e-12)
        own: Double = (rest * rows).sum(axis=1).astype(np.float64)
        found.append((indices[several], own[several]))
        first += len(sums)
    return _OwnCosines(np.concatenate([i for i, _ in found]), np.concatenate([o for _, o in found]))


def _sample(count: int, products: int) -> Int:
    affordable = max(1000, int(MAX_PRODUCTS / products))
    if affordable >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, affordable, replace=False))


def _worst(head: Head, audited: _OwnCosines, labels: Int, worst: int) -> tuple[ClassAudit, ...]:
    mine = labels[audited.indices]
    totals = np.bincount(mine, audited.own, minlength=len(head.centres))
    seen = np.bincount(mine, minlength=len(head.centres))
    mean: Double = np.full(len(seen), np.inf)
    np.divide(totals, seen, out=mean, where=seen > 0)
    order = [int(c) for c in np.argsort(mean, kind="stable")[:worst] if seen[c]]
    return tuple(ClassAudit(identity=head.identities[c], images=int(seen[c]), cosine=float(mean[c])) for c in order)


def _misplaced(labels: Int, right: NDArray[np.bool_]) -> int:
    images, hits = np.bincount(labels), np.bincount(labels, right)
    return int(((images >= 2) & (hits == 0)).sum())


def _fault(found: Audit, head: Head, labels: Int, nearest: Int) -> str | None:
    """Say why the head must not be used, None if it may.

    The nearest of C random directions has a cosine of about sqrt(2·ln C / D): well above it the centres are the
    teacher's and only their labels are wrong; near it they are not the teacher's at all.
    """
    assert found.top1 is not None and found.nearest_cosine is not None
    seen = (
        f"head {found.source}: only {found.top1:.1%} of {found.top1_images:,} images are nearest to their own "
        f"centre (mean cosine {found.mean_cosine:.2f}"
    )
    disorder = _disorder(head, labels, nearest)
    if disorder:  # even if most rows are right: a few of many shards may be swapped
        return f"{seen}): {disorder}"
    chance = 1 / max(found.classes, 2)
    if (found.top1 - chance) / (1 - chance) >= MIN_AGREEMENT:
        return None
    random_level = math.sqrt(2 * math.log(max(found.classes, 2)) / head.centres.shape[1])
    if found.nearest_cosine > 1.5 * random_level:
        return (
            f"{seen}, to the nearest centre {found.nearest_cosine:.2f}): the labels are permuted or wrong. Check that "
            "the images of each identity belong together and that the head's classes are in their order "
            "(--head-labels FILE says which row is whose), or pass --head means."
        )
    return (
        f"{seen}, to the nearest {found.nearest_cosine:.2f}, as for random directions): these are not this teacher's "
        "centres, or the preprocessing is not the teacher's. Check --teacher-preprocess, or pass --head means."
    )


def _disorder(head: Head, labels: Int, nearest: Int) -> str | None:
    """Say whether rows lie a constant distance from where their labels say: all of them, or those of one file."""
    if shift := _shift(labels, nearest):
        return (
            f"the rows are shifted: an image's own centre is {abs(shift)} row{'s' * (abs(shift) > 1)} "
            f"{'after' if shift > 0 else 'before'} the one that its label names. Correct the map with --head-labels."
        )
    firsts = np.array([first for _, first in head.parts], np.int64)
    for part, (name, first) in enumerate(head.parts):
        here = np.searchsorted(firsts, labels, side="right") - 1 == part
        if shift := _shift(labels[here], nearest[here]):
            place = int(np.searchsorted(firsts, first + shift, side="right")) - 1
            return (
                f"the shards are in the wrong order: the classes of {name} are found in {head.parts[place][0]}. Rename "
                "the files so that their ranks are in the order of the classes."
            )
    return None


def _shift(labels: Int, nearest: Int) -> int:
    """Return the distance from row to nearest row that most images share, if three classes agree; else 0."""
    if not len(labels):
        return 0
    shifts, counts = np.unique(nearest - labels, return_counts=True)
    shift = int(shifts[counts.argmax()])
    agreed = len(np.unique(labels[nearest - labels == shift])) >= 3
    return shift if agreed and counts.max() > 0.5 * len(labels) else 0
