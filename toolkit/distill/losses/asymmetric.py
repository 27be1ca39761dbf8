"""Compute losses of student embeddings against the teacher's embeddings of other images. None needs a label.

They serve asymmetric matching, student probes in a teacher's gallery, and put the student into its space. ``s`` and
``t`` are the unit embeddings of student and teacher for an image, S and T those of the batch (B×D).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softmax

from pkd.toolkit.distill.losses.embedding import unit_pair
from pkd.toolkit.distill.losses.inputs import LossInputs

CSD_NEIGHBOURS = 256
"""Nearest teacher embeddings that csd compares with, as published."""
CSD_TEMPERATURES = (0.01, 1.0)
"""Divisors of csd's cosines, of the teacher and of the student, as published."""
RAML_WEIGHTS = (0.7482, 0.6778)
"""Weights of raml's terms S–T and S–S beside the regression, as published."""
INFONCE_TEMPERATURE = 0.07
"""Divisor of infonce's cosines."""
D3STILL_NEIGHBOURS = 9
"""Nearest images of the batch that d3still orders, the image itself not counted, as published."""
D3STILL_WEIGHTS = (100.0, 5.0, 1.0)
"""Weights of d3still's terms: own embedding, pairs in the wrong order, pairs in the right one, as published."""


def csd(inputs: LossInputs) -> Tensor:
    """Compare the similarities to the teacher's nearest neighbours by KL divergence (contextual similarity).

    KL(softmax(t·N/0.01) ‖ softmax(s·N)) over N, the 256 candidates nearest to t: own embedding, batch and bank. Source:
    Wu et al. 2022, Contextual Similarity Distillation for Asymmetric Image Retrieval, eq. 6.
    """
    student, teacher = unit_pair(inputs)
    candidates = _candidates(inputs, teacher)
    taught, found = teacher @ candidates.T, student @ candidates.T
    if inputs.bank is not None and inputs.images is not None:  # an image counts once, by its embedding in the batch
        again = inputs.images[:, None] == inputs.bank.images
        taught[:, len(teacher) :].masked_fill_(again, -2.0)
    nearest = taught.topk(min(CSD_NEIGHBOURS, len(candidates)), dim=1)
    sharp, soft = CSD_TEMPERATURES
    target = softmax(nearest.values / sharp, dim=1)
    log_target = log_softmax(nearest.values / sharp, dim=1)
    absent = nearest.values < -1.5
    log_found = log_softmax(found.gather(1, nearest.indices).masked_fill(absent, -torch.inf) / soft, dim=1)
    return torch.where(absent, 0.0, target * (log_target - log_found)).sum(dim=1).mean()


def infonce(inputs: LossInputs) -> Tensor:
    """Tell the image's own teacher embedding from those of the batch and the bank.

    Cross-entropy of s·T/0.07 with the own image as the class. Images known to show the same person are left out, and so
    is the image itself in the bank. Source: Yang et al. 2024, CLIP-KD, arXiv 2307.12732, §3.5 (interactive contrastive
    learning), which has neither bank nor persons.
    """
    student, teacher = unit_pair(inputs)
    logits = student @ _candidates(inputs, teacher).T / INFONCE_TEMPERATURE
    own = torch.arange(len(student), device=student.device)
    people, images = inputs.people, inputs.images
    if people is not None and images is not None:
        everyone, everything = (people, images) if inputs.bank is None else (
            torch.cat([people, inputs.bank.people]), torch.cat([images, inputs.bank.images])
        )  # fmt: skip
        same = (people[:, None] == everyone) & (people[:, None] >= 0) | (images[:, None] == everything)
        same[own, own] = False
        logits = logits.masked_fill(same, -torch.inf)
    return cross_entropy(logits, own)


def raml(inputs: LossInputs) -> Tensor:
    """Regress onto the teacher, and compare similarities S–T and S–S with T–T over all pairs of different images.

    mean (1 − s·t)² + 0.7482·mean (STᵀ − TTᵀ)² + 0.6778·mean (SSᵀ − TTᵀ)², diagonals left out of the last two. Source:
    Suma and Tolias 2023, Large-to-Small Image Resolution Asymmetry in Deep Metric Learning, §3.3.
    """
    student, teacher = unit_pair(inputs)
    taught = teacher @ teacher.T
    cross_weight, inner_weight = RAML_WEIGHTS
    regression = (1 - (student * teacher).sum(dim=1)).square().mean()
    cross = _off_diagonal_mean((student @ teacher.T - taught).square())
    inner = _off_diagonal_mean((student @ student.T - taught).square())
    return regression + cross_weight * cross + inner_weight * inner


def d3still(inputs: LossInputs) -> Tensor:
    """Compare differences of similarities among the teacher's nearest images of the batch, wrong orders weighing more.

    100·‖1 − s·t over the batch‖/B + mean over the images of (5·‖e over wrong pairs‖ + ‖e over right pairs‖)/9, with
    e = (Δs − Δt)/(0.1 + |Δt|), Δ the difference of two neighbours' similarities, right where Δs and Δt agree in sign.
    Source: Xie et al. 2024, D3still: Decoupled Differential Distillation for Asymmetric Image Retrieval, §3.
    """
    student, teacher = unit_pair(inputs)
    own_weight, wrong_weight, right_weight = D3STILL_WEIGHTS
    own = own_weight * _norm(1 - (student * teacher).sum(dim=1), 0) / len(student)
    if len(student) < 3:
        return own
    itself = torch.eye(len(student), dtype=torch.bool, device=student.device)
    taught = (teacher @ teacher.T).masked_fill(itself, -2.0)
    near, order = taught.topk(min(D3STILL_NEIGHBOURS, len(student) - 1), dim=1)
    found = (student @ teacher.T).gather(1, order)
    differences = (found[:, None] - found[:, :, None]).flatten(1)
    wanted = (near[:, None] - near[:, :, None]).flatten(1)
    errors = (differences - wanted) / (0.1 + wanted.abs())
    agreement = (differences * wanted).detach().sign()
    wrong, right = (_norm(errors * (agreement == sign), 1).mean() for sign in (-1, 1))
    return own + (wrong_weight * wrong + right_weight * right) / D3STILL_NEIGHBOURS


def _candidates(inputs: LossInputs, teacher: Tensor) -> Tensor:
    """Join the teacher's embeddings of the batch and the bank, (B+R)×D; row i is the own embedding of image i."""
    return teacher if inputs.bank is None else torch.cat([teacher, inputs.bank.rows.to(teacher.dtype)])


def _off_diagonal_mean(values: Tensor) -> Tensor:
    """Average a square matrix without its diagonal; 0 for a single row."""
    count = len(values)
    return (values.sum() - values.diagonal().sum()) / max(1, count * (count - 1))


def _norm(values: Tensor, dim: int) -> Tensor:
    """Compute the Euclidean norm with gradient 0 where it is 0."""
    squared = values.square().sum(dim=dim)
    positive = squared > 0
    return torch.where(positive, squared, torch.ones_like(squared)).sqrt() * positive
