"""Stages: hooks on torch and ONNX teachers give the same features; what cannot be met is said with a way out."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.distill.losses.feature_hooks import FeatureHooks, open_stages, plan_stages
from pkd.toolkit.distill.models.backbones import build
from pkd.toolkit.distill.models.student import TorchEncoder
from pkd.toolkit.encoders.base import open_onnx
from tests.support.training_data import SIZE, make_pyramid, make_teacher, write_teacher


@pytest.fixture
def teacher() -> TorchEncoder:
    return make_pyramid()


@pytest.fixture
def onnx_teacher(teacher: TorchEncoder, tmp_path: Path) -> Path:
    path = tmp_path / "pyramid.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            teacher.module, (torch.zeros(2, 3, SIZE, SIZE),), str(path), dynamo=False, input_names=["x"],
            output_names=["y"], dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
        )  # fmt: skip
    return path


def crops(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def test_torch_and_onnx_teachers_give_the_same_stages(teacher: TorchEncoder, onnx_teacher: Path) -> None:
    torch_stages = open_stages(teacher, ())(crops())
    onnx_stages = open_stages(open_onnx(onnx_teacher, Preprocess(size=SIZE)), ())(crops())
    assert [tuple(f.shape) for f in torch_stages] == [(3, 5, 16, 16), (3, 6, 8, 8), (3, 7, 4, 4)]
    for ours, theirs in zip(torch_stages, onnx_stages, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_stages_can_be_named(teacher: TorchEncoder, onnx_teacher: Path) -> None:
    encoder = open_onnx(onnx_teacher, Preprocess(size=SIZE))
    (middle,) = open_stages(teacher, ("middle.0",))(crops())
    (named,) = open_stages(encoder, ("/middle/middle.0/Conv_output_0",))(crops())
    assert float(middle.min()) < 0 and torch.allclose(middle, named, atol=1e-5)


def test_pairs_are_those_of_equal_resolution(teacher: TorchEncoder) -> None:
    student = build("mobilefacenet:0.25", 16, SIZE)
    plan = plan_stages(teacher, (), student, SIZE, least=2)
    assert plan.sides == [16, 8, 4]
    taught = plan.teacher(crops(2))
    hooks = FeatureHooks(student, student.stages)
    student.eval()(torch.zeros(2, 3, SIZE, SIZE))
    own = hooks.pop()
    for (i, j), (mine, theirs), side in zip(plan.pairs, plan.channels, plan.sides, strict=True):
        assert own[i].shape[1:] == (mine, side, side) and taught[j].shape[1:] == (theirs, side, side)


def test_teacher_stages_carry_no_gradient_and_can_enter_a_loss(teacher: TorchEncoder) -> None:
    (features,) = open_stages(teacher, ("coarse",))(crops())
    assert not features.requires_grad
    weight = torch.ones(7, requires_grad=True)
    (features * weight[:, None, None]).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None


def test_a_teacher_without_stages_says_what_to_use_instead(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names no stages"):
        open_stages(make_teacher(), ())
    write_teacher(tmp_path / "flat.onnx")
    flat = open_onnx(tmp_path / "flat.onnx", Preprocess(size=SIZE))
    with pytest.raises(InputError, match=r"shows no stage features.*rkd"):
        open_stages(flat, ())


def test_unknown_names_are_answered_with_those_that_exist(teacher: TorchEncoder, onnx_teacher: Path) -> None:
    with pytest.raises(InputError, match=r"--teacher-stages last.*coarse"):
        open_stages(teacher, ("last",))
    with pytest.raises(InputError, match=r"--teacher-stages last.*8×8"):
        open_stages(open_onnx(onnx_teacher, Preprocess(size=SIZE)), ("last",))


def test_too_few_common_resolutions_are_refused_before_training(teacher: TorchEncoder) -> None:
    with pytest.raises(InputError, match=r"1 resolutions in common, at least 2.*l2kd"):
        plan_stages(teacher, ("middle",), build("mobilefacenet:0.25", 16, SIZE), SIZE, least=2)
