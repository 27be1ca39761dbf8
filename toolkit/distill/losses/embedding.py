"""Losses over embeddings alone, one by one (l2kd) or in their relations (rkd, cckd). None needs a label."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize, smooth_l1_loss

from pkd.toolkit.distill.losses.inputs import Step

ANGLE_WEIGHT = 2.0
"""Weight of RKD's angles beside its distances, 1:2 as published."""
GAMMA = 0.4
"""Width of CCKD's Gaussian kernel, as published."""
ORDER = 2
"""Order of CCKD's Taylor expansion, as published."""


def l2kd(step: Step) -> Tensor:
    """Mean squared distance ‖x̂ − t̂‖² of unit embeddings: plain regression onto the teacher."""
    student, teacher = _units(step)
    return (student - teacher).square().sum(dim=1).mean()


def rkd(step: Step) -> Tensor:
    """Distances of pairs plus twice the angles of triplets, Huber loss (Park et al. 2019, arXiv 1904.05068, §3.2).

    Distances are divided by their mean in the batch. All means run over every ordered pair or triplet of the batch.
    """
    student, teacher = _units(step)
    distance = smooth_l1_loss(_distances(student), _distances(teacher))
    return distance + ANGLE_WEIGHT * smooth_l1_loss(_angles(student), _angles(teacher))


def cckd(step: Step) -> Tensor:
    """Mean squared difference of the two correlation matrices (Peng et al. 2019, arXiv 1904.01802).

    Correlation: Gaussian kernel of unit embeddings, expanded to second order in their cosine.
    """
    student, teacher = _units(step)
    return mse_loss(_correlation(student @ student.T), _correlation(teacher @ teacher.T))


def _units(step: Step) -> tuple[Tensor, Tensor]:
    assert step.teacher is not None
    embeddings = step.embeddings if step.embeddings.dtype == torch.float64 else step.embeddings.float()
    return normalize(embeddings), step.teacher.to(embeddings.dtype)


def _squared(units: Tensor) -> Tensor:
    """B×B squared distances with an exact zero on the diagonal."""
    cosines = units @ units.T
    diagonal = cosines.diagonal()
    return (diagonal[:, None] + diagonal[None, :] - 2 * cosines).clamp_min(0)


def _distances(units: Tensor) -> Tensor:
    """B×B distances divided by the mean of the distinct pairs; images that coincide stay at 0, without gradient."""
    squared = _squared(units)
    apart = squared > 1e-12
    distances = torch.where(apart, squared, torch.ones_like(squared)).sqrt() * apart
    return distances / (distances.sum() / apart.sum().clamp_min(1)).clamp_min(1e-12)


def _angles(units: Tensor) -> Tensor:
    """B×B×B cosines of the angle at the first image between the second and the third; 0 where two coincide.

    From inner products: (a − v)·(b − v) = a·b − a·v − b·v + v·v, so that no B×B×D array is made.
    """
    cosines = units @ units.T
    own = cosines.diagonal()
    products = cosines[None] - cosines[:, :, None] - cosines[:, None, :] + own[:, None, None]
    squared = _squared(units)
    apart = squared > 1e-12
    inverse = torch.where(apart, squared, torch.ones_like(squared)).rsqrt() * apart
    return products * inverse[:, :, None] * inverse[:, None, :]


def _correlation(cosines: Tensor) -> Tensor:
    terms = [(2 * GAMMA) ** p / math.factorial(p) * cosines**p for p in range(1, ORDER + 1)]
    return math.exp(-2 * GAMMA) * sum(terms, torch.ones_like(cosines))
