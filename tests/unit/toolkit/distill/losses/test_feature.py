"""at, fitnets and fsp against plain derivations, their gradients, and a student that is the teacher."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pkd.toolkit.distill.losses.feature import adapters, at, fitnets, fsp
from pkd.toolkit.distill.losses.inputs import LossInputs, StagePair
from tests.support.loss_inputs import make_inputs

LABELS = [0, 1, -1]


def plain(inputs: LossInputs) -> LossInputs:
    """Adapters in eval mode at their start: a 1×1 convolution and a division by sqrt(1 + 1e-5)."""
    return replace(inputs, adapters=inputs.adapters.eval())


def adapted(inputs: LossInputs, method: str, stage: int) -> np.ndarray:
    convolution = inputs.adapters[method].get_submodule(str(stage))[0]  # type: ignore[index]
    weights = convolution.weight.detach().numpy()[:, :, 0, 0]
    features = inputs.stages[stage].student.numpy()
    return np.einsum("oc,nchw->nohw", weights, features) / np.sqrt(1 + 1e-5)


def in_units(features: torch.Tensor) -> np.ndarray:
    array = features.numpy()
    return array / np.sqrt(np.mean(array**2))


def test_at_against_numpy() -> None:
    inputs = make_inputs(LABELS, dtype=torch.float64)
    total = 0.0
    for pair in inputs.stages:
        maps = []
        for features in (pair.student.numpy(), pair.teacher.numpy()):
            attention = (features**2).sum(axis=1).reshape(len(features), -1)
            maps.append(attention / np.linalg.norm(attention, axis=1, keepdims=True))
        total += float(np.mean(np.sum((maps[0] - maps[1]) ** 2, axis=1)))
    assert float(at(inputs)) == pytest.approx(total, rel=1e-9)


def test_fitnets_against_numpy() -> None:
    inputs = plain(make_inputs(LABELS, dtype=torch.float64))
    expected = np.mean((adapted(inputs, "fitnets", 1) - in_units(inputs.stages[1].teacher)) ** 2)
    assert float(fitnets(inputs).detach()) == pytest.approx(float(expected), rel=1e-9)


def test_fsp_against_numpy() -> None:
    inputs = plain(make_inputs(LABELS, dtype=torch.float64))
    students = [adapted(inputs, "fsp", i) for i in range(3)]
    teachers = [in_units(pair.teacher) for pair in inputs.stages]

    def flow(fine: np.ndarray, coarse: np.ndarray) -> np.ndarray:
        count, _, side, _ = coarse.shape
        pooled = fine.reshape(count, fine.shape[1], side, 2, side, 2).max(axis=(3, 5))
        return np.einsum("nchw,ndhw->ncd", pooled, coarse) / side**2

    relative = []
    for i in (0, 1):
        taught = flow(teachers[i], teachers[i + 1])
        off = flow(students[i], students[i + 1]) - taught
        relative.append(np.mean(np.sum(off**2, axis=(1, 2)) / np.sum(taught**2, axis=(1, 2))))
    assert float(fsp(inputs).detach()) == pytest.approx(float(np.mean(relative)), rel=1e-9)


@pytest.mark.parametrize("loss", [at, fitnets, fsp])
def test_the_teacher_itself_costs_nothing(loss) -> None:  # type: ignore[no-untyped-def]
    """With adapters that pass features on unchanged, in the teacher's units."""
    inputs = make_inputs(LABELS, dtype=torch.float64)

    class InUnits(nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features / features.square().mean().sqrt()

    passing = nn.ModuleDict({name: nn.ModuleDict({str(i): InUnits() for i in range(3)}) for name in ("fitnets", "fsp")})
    same = tuple(StagePair(pair.teacher, pair.teacher) for pair in inputs.stages)
    assert float(loss(replace(inputs, stages=same, adapters=passing))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [at, fitnets, fsp])
def test_gradients(loss) -> None:  # type: ignore[no-untyped-def]
    inputs = make_inputs(LABELS, dtype=torch.float64)
    starts = tuple(pair.student.clone().requires_grad_() for pair in inputs.stages)

    def value(*features: torch.Tensor) -> torch.Tensor:
        pairs = tuple(StagePair(f, pair.teacher) for f, pair in zip(features, inputs.stages, strict=True))
        return loss(replace(inputs, stages=pairs))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(value, starts, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("loss", [at, fitnets, fsp])
def test_the_scale_of_the_teachers_features_does_not_matter(loss) -> None:  # type: ignore[no-untyped-def]
    inputs = make_inputs(LABELS, dtype=torch.float64)
    louder = replace(inputs, stages=tuple(StagePair(p.student, p.teacher * 1000) for p in inputs.stages))
    assert float(loss(louder).detach()) == pytest.approx(float(loss(inputs).detach()), rel=1e-9)


@pytest.mark.parametrize("loss", [at, fitnets, fsp])
def test_a_dead_stage_costs_a_finite_amount(loss) -> None:  # type: ignore[no-untyped-def]
    inputs = make_inputs(LABELS, requires_grad=True)
    dead = replace(inputs, stages=tuple(StagePair(p.student * 0, p.teacher * 0) for p in inputs.stages))
    value = loss(dead)
    value.backward()
    assert torch.isfinite(value)
    assert all(p.student.grad is None or bool(torch.isfinite(p.student.grad).all()) for p in inputs.stages)


def test_adapters_are_made_where_they_are_needed() -> None:
    channels = [(4, 6), (5, 5), (6, 3)]
    assert list(adapters("fitnets", channels)) == ["1"]
    assert list(adapters("fsp", channels)) == ["0", "1", "2"]
    assert list(adapters("fitnets", channels[:1])) == ["0"]
