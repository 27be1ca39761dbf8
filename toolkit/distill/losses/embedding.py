"""Compute losses over embeddings alone, one by one (l2kd) or in their relations (rkd, cckd). None needs a label."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize, smooth_l1_loss

from pkd.toolkit.distill.losses.inputs import LossInputs

ANGLE_WEIGHT = 2.0
"""Weight of RKD's angles beside its distances, 1:2 as published."""
KERNEL_WIDTH = 0.4
"""Width of CCKD's Gaussian kernel, as published."""
TAYLOR_ORDER = 2
"""Order of CCKD's Taylor expansion, as published."""


def l2kd(inputs: LossInputs) -> Tensor:
    """Average the squared distance ‖x̂ − t̂‖² of unit embeddings: plain regression onto the teacher."""
    student, teacher = unit_pair(inputs)
    return (student - teacher).square().sum(dim=1).mean()


def rkd(inputs: LossInputs) -> Tensor:
    """Compare pair distances and, twice as heavy, triplet angles by Huber loss.

    Source: Park et al. 2019, arXiv 1904.05068, §3.2. Distances are divided by their mean in the
    batch. All means run over every ordered pair or triplet of the batch.
    """
    assert inputs.teacher is not None
    student, teacher = _products(normalize(inputs.embeddings.double())), _products(inputs.teacher.double())
    wide = inputs.embeddings.dtype if inputs.embeddings.dtype == torch.float64 else torch.float32
    distance = smooth_l1_loss(_distances(student), _distances(teacher)).to(wide)
    return distance + ANGLE_WEIGHT * smooth_l1_loss(_angles(student, wide), _angles(teacher, wide))


def cckd(inputs: LossInputs) -> Tensor:
    """Average the squared difference of the two correlation matrices (Peng et al. 2019, arXiv 1904.01802).

    Correlation: Gaussian kernel of unit embeddings, expanded to second order in their cosine.
    """
    student, teacher = unit_pair(inputs)
    return mse_loss(_correlation(student @ student.T), _correlation(teacher @ teacher.T))


def unit_pair(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Return the unit embeddings of student and teacher, B×D, float32 or better."""
    assert inputs.teacher is not None
    embeddings = inputs.embeddings if inputs.embeddings.dtype == torch.float64 else inputs.embeddings.float()
    return normalize(embeddings), inputs.teacher.to(embeddings.dtype)


def _squared(cosines: Tensor) -> Tensor:
    """Turn B×B inner products, float64, into squared distances with an exact zero on the diagonal."""
    diagonal = cosines.diagonal()
    return (diagonal[:, None] + diagonal[None, :] - 2 * cosines).clamp_min(0)


def _products(units: Tensor) -> Tensor:
    """Compute B×B inner products of float64 rows: in float32 distances below 3e-4 would drown in their rounding."""
    return units @ units.T


def _distances(cosines: Tensor) -> Tensor:
    """Return B×B distances over the mean of the distinct pairs; images that coincide stay at 0, without gradient."""
    squared = _squared(cosines)
    apart = squared > 1e-12
    distances = torch.where(apart, squared, torch.ones_like(squared)).sqrt() * apart
    return distances / (distances.sum() / apart.sum().clamp_min(1)).clamp_min(1e-12)


def _angles(cosines: Tensor, wide: torch.dtype) -> Tensor:
    """Return B×B×B cosines, of type ``wide``, of the angle at the first image between the others; 0 where two coincide.

    From inner products: (a − v)·(b − v) = a·b − a·v − b·v + v·v, so that no B×B×D array is made.
    """
    own = cosines.diagonal()
    products = cosines[None] - cosines[:, :, None] - cosines[:, None, :] + own[:, None, None]
    squared = _squared(cosines)
    apart = squared > 1e-12
    inverse = (torch.where(apart, squared, torch.ones_like(squared)).rsqrt() * apart).to(wide)
    return products.to(wide) * inverse[:, :, None] * inverse[:, None, :]


def _correlation(cosines: Tensor) -> Tensor:
    terms = [(2 * KERNEL_WIDTH) ** p / math.factorial(p) * cosines**p for p in range(1, TAYLOR_ORDER + 1)]
    return math.exp(-2 * KERNEL_WIDTH) * sum(terms, torch.ones_like(cosines))
