"""Losses over class centres: the student's place among the teacher's classes (or its own)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pkd.toolkit.distill.heads.frozen_softmax import FrozenHead, frozen_cross_entropy
from pkd.toolkit.distill.heads.margin import margin_cross_entropy
from pkd.toolkit.distill.losses.inputs import Step

LEAST_SHARE = 0.4
"""MarginDistillation's smallest margin as a share of the largest: 0.2 of 0.5 rad, as published."""


def proxylesskd(step: Step) -> Tensor:
    """Margin softmax against the teacher's frozen centres (Shi et al. 2020, arXiv 2011.00265, §3.3)."""
    assert step.head is not None
    return _frozen(step, step.head)


def own_classifier(step: Step) -> Tensor:
    """Margin softmax against the student's own, trained centres: recognition without distillation."""
    assert step.trained is not None
    known = _known(step)
    if known is None:
        return _nothing(step)
    return margin_cross_entropy(step.embeddings[known], step.trained, step.labels[known], step.margin, step.scale)


def kd(step: Step) -> Tensor:
    """T²·KL(teacher ‖ student) of softened posteriors over the inherited head (Hinton et al. 2015, arXiv 1503.02531).

    Logits are scale·cosine/T for both. With z = log Σ exp and c̄ the teacher's posterior-weighted centre,
    KL = scale/T·(t̂ − x̂)·c̄ + z_student − z_teacher, so that neither B×C matrix is ever held. Needs no label.
    """
    assert step.head is not None and step.teacher is not None
    sharpness = step.scale / step.temperature
    student = _unit(step.embeddings)
    taught = step.teacher.to(student.dtype)
    with torch.no_grad():
        z_teacher, centre = step.head.logsumexp(taught, sharpness)
    z_student, _ = step.head.logsumexp(student, sharpness)
    divergence = sharpness * ((taught - student) * centre).sum(dim=1) + z_student - z_teacher
    return step.temperature**2 * divergence.mean()


def adadistill(step: Step) -> Tensor:
    """Margin softmax against centres that move towards the teacher's embeddings (``MovingHead``)."""
    assert step.moving is not None and step.teacher is not None
    known = _known(step)
    if known is None:
        return _nothing(step)
    student = _unit(step.embeddings[known].detach())
    step.moving.update(student, step.teacher[known], step.labels[known])
    return _frozen(step, step.moving.head)


def margindistillation(step: Step) -> Tensor:
    """A margin per image: larger where the teacher's own embedding is closer to the class centre.

    m = 0.4·M + 0.6·M·d/max(d), d = t̂·ŵ_y cut at 0, the maximum over the batch, M the size of ``--margin``; published
    with ArcFace and M = 0.5 rad (Svitov and Alyamkin 2020, arXiv 2003.02586, §3).
    """
    assert step.head is not None and step.teacher is not None
    known = _known(step)
    if known is None:
        return _nothing(step)
    labels = step.labels[known]
    closeness = (step.teacher[known] * step.head.rows(labels)).sum(dim=1).clamp_min(0)
    share = closeness / closeness.max().clamp_min(1e-6)
    sizes = step.margin.size * (LEAST_SHARE + (1 - LEAST_SHARE) * share)
    exclude = None if step.exclude is None else step.exclude[known]
    return frozen_cross_entropy(
        step.embeddings[known], step.head, labels, lambda c: step.margin(c, sizes), step.scale, exclude=exclude
    )


def _frozen(step: Step, head: FrozenHead) -> Tensor:
    known = _known(step)
    if known is None:
        return _nothing(step)
    exclude = None if step.exclude is None else step.exclude[known]
    return frozen_cross_entropy(
        step.embeddings[known], head, step.labels[known], step.margin, step.scale, exclude=exclude
    )


def _known(step: Step) -> Tensor | None:
    """Which images have a label; None if none has."""
    known = step.labels >= 0
    return known if bool(known.any()) else None


def _nothing(step: Step) -> Tensor:
    """Zero, still connected to the network, for a batch without labels."""
    return step.embeddings.sum() * 0.0


def _unit(embeddings: Tensor) -> Tensor:
    return normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float())
