"""Compute losses over stage features. They shape the stages; the embedding needs another loss beside them.

Features are measured in units of the teacher's root mean square at that stage, so that a weight means the same for
every teacher.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d, normalize

from pkd.toolkit.distill.losses.inputs import LossInputs

ADAPTED = ("fitnets", "fsp")
"""Methods with trained layers between the student's and the teacher's stages."""


def at(inputs: LossInputs) -> Tensor:
    """Sum over the stages the squared distance of normalised attention maps.

    Source: Zagoruyko and Komodakis 2017, arXiv 1612.03928, eq. 2, p = 2. A map is the sum of squares over the channels;
    channel counts may differ.
    """
    per_stage = [(_attention(p.student) - _attention(p.teacher)).square().sum(dim=1).mean() for p in inputs.stages]
    return torch.stack(per_stage).sum()


def fitnets(inputs: LossInputs) -> Tensor:
    """Regress the teacher's middle stage through an adapter (Romero et al. 2015, arXiv 1412.6550, eq. 3).

    Mean squared error per feature; trained together with the main loss rather than before it.
    """
    middle = len(inputs.stages) // 2
    student, teacher = _in_teacher_units(inputs, "fitnets", middle)
    return (student - teacher).square().mean()


def fsp(inputs: LossInputs) -> Tensor:
    """Compare the flow between neighbouring stages: C×C′ Gram matrices, squared difference (Yim et al. 2017, eq. 1, 2).

    The finer stage is max-pooled to the coarser; the student's pass an adapter, so that channel counts may differ.
    Each image's squared Frobenius distance is divided by the teacher's squared norm; mean over images and flows.
    """
    stages = [_in_teacher_units(inputs, "fsp", i) for i in range(len(inputs.stages))]
    flows = []
    for (student, teacher), (next_student, next_teacher) in pairwise(stages):
        taught = _flow(teacher, next_teacher)
        off = (_flow(student, next_student) - taught).square().sum(dim=(1, 2))
        flows.append((off / taught.square().sum(dim=(1, 2)).clamp_min(1e-12)).mean())
    return torch.stack(flows).mean()


def adapters(method: str, channels: list[tuple[int, int]]) -> nn.ModuleDict:
    """Make 1×1 convolutions with batch normalisation from student to teacher channels, by position of the stage.

    ``channels``: (student, teacher) of each paired stage. FitNets needs one at the middle stage, FSP one at each.
    """
    stages = [len(channels) // 2] if method == "fitnets" else list(range(len(channels)))
    layers: dict[str, nn.Module] = {}
    for stage in stages:
        inputs, outputs = channels[stage]
        layers[str(stage)] = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
    return nn.ModuleDict(layers)


def _in_teacher_units(inputs: LossInputs, method: str, stage: int) -> tuple[Tensor, Tensor]:
    """Return adapted student features and the teacher's over their root mean square, the adapter's initial scale."""
    pair = inputs.stages[stage]
    adapted: Tensor = inputs.adapters[method].get_submodule(str(stage))(pair.student)
    return adapted, pair.teacher / pair.teacher.square().mean().sqrt().clamp_min(1e-12)


def _attention(features: Tensor) -> Tensor:
    """Reduce N×C×H×W to N×HW, unit rows."""
    attention: Tensor = normalize(features.square().sum(dim=1).flatten(1))
    return attention


def _flow(fine: Tensor, coarse: Tensor) -> Tensor:
    """Compute N×C×C′ Gram matrices over the positions of the coarser stage."""
    side = coarse.shape[2:]
    if fine.shape[2:] != side:
        fine = adaptive_max_pool2d(fine, tuple(side))
    a, b = fine.flatten(2), coarse.flatten(2)
    return a @ b.transpose(1, 2) / a.shape[2]
