"""Compute losses over class centres: the student's place among the teacher's classes, or its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pkd.toolkit.distill.heads.frozen_softmax import FrozenHead, frozen_cross_entropy
from pkd.toolkit.distill.heads.margin import margin_cross_entropy
from pkd.toolkit.distill.losses.inputs import LossInputs

MIN_MARGIN_SHARE = 0.4
"""MarginDistillation's smallest margin as a share of the largest: 0.2 of 0.5 rad, as published."""


def proxylesskd(inputs: LossInputs) -> Tensor:
    """Compute the margin softmax against the teacher's frozen centres (Shi et al. 2020, arXiv 2011.00265, §3.3)."""
    assert inputs.head is not None
    return _frozen(inputs, inputs.head)


def own_classifier(inputs: LossInputs) -> Tensor:
    """Compute the margin softmax against the student's own, trained centres: recognition without distillation."""
    assert inputs.trained is not None
    known = _known(inputs)
    if known is None:
        return _zero(inputs)
    return margin_cross_entropy(
        inputs.embeddings[known], inputs.trained, inputs.labels[known], inputs.margin, inputs.scale
    )


def kd(inputs: LossInputs) -> Tensor:
    """Compute T²·KL(teacher ‖ student) of softened posteriors over the inherited head (Hinton et al. 2015).

    Source: arXiv 1503.02531.
    Logits are scale·cosine/T for both. With z = log Σ exp and c̄ the teacher's posterior-weighted centre,
    KL = scale/T·(t̂ − x̂)·c̄ + z_student − z_teacher, so that neither B×C matrix is ever held. Needs no label.
    """
    assert inputs.head is not None and inputs.teacher is not None
    sharpness = inputs.scale / inputs.temperature
    student = _unit(inputs.embeddings)
    taught = inputs.teacher.to(student.dtype)
    with torch.no_grad():
        z_teacher, centre = inputs.head.logsumexp(taught, sharpness)
    z_student, _ = inputs.head.logsumexp(student, sharpness)
    divergence = sharpness * ((taught - student) * centre).sum(dim=1) + z_student - z_teacher
    return inputs.temperature**2 * divergence.mean()


def adadistill(inputs: LossInputs) -> Tensor:
    """Compute the margin softmax against centres that move towards the teacher's embeddings (``EmaHead``)."""
    assert inputs.ema_head is not None and inputs.teacher is not None
    known = _known(inputs)
    if known is None:
        return _zero(inputs)
    student = _unit(inputs.embeddings[known].detach())
    inputs.ema_head.update(student, inputs.teacher[known], inputs.labels[known])
    return _frozen(inputs, inputs.ema_head.head)


def margindistillation(inputs: LossInputs) -> Tensor:
    """Compute the margin softmax with a margin per image, larger where the teacher is closer to the class centre.

    m = 0.4·M + 0.6·M·d/max(d), d = t̂·ŵ_y cut at 0, the maximum over the batch, M the size of ``--margin``; published
    with ArcFace and M = 0.5 rad (Svitov and Alyamkin 2020, arXiv 2003.02586, §3).
    """
    assert inputs.head is not None and inputs.teacher is not None
    known = _known(inputs)
    if known is None:
        return _zero(inputs)
    labels = inputs.labels[known]
    closeness = (inputs.teacher[known] * inputs.head.rows(labels)).sum(dim=1).clamp_min(0)
    share = closeness / closeness.max().clamp_min(1e-6)
    sizes = inputs.margin.size * (MIN_MARGIN_SHARE + (1 - MIN_MARGIN_SHARE) * share)
    exclude = None if inputs.exclude is None else inputs.exclude[known]
    return frozen_cross_entropy(
        inputs.embeddings[known], inputs.head, labels, lambda c: inputs.margin(c, sizes), inputs.scale, exclude=exclude
    )


def _frozen(inputs: LossInputs, head: FrozenHead) -> Tensor:
    known = _known(inputs)
    if known is None:
        return _zero(inputs)
    exclude = None if inputs.exclude is None else inputs.exclude[known]
    return frozen_cross_entropy(
        inputs.embeddings[known], head, inputs.labels[known], inputs.margin, inputs.scale, exclude=exclude
    )


def _known(inputs: LossInputs) -> Tensor | None:
    """Mask the images with a label; None if none has."""
    known = inputs.labels >= 0
    return known if bool(known.any()) else None


def _zero(inputs: LossInputs) -> Tensor:
    """Return zero, still connected to the network, for a batch without labels."""
    return inputs.embeddings.sum() * 0.0


def _unit(embeddings: Tensor) -> Tensor:
    return normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float())
