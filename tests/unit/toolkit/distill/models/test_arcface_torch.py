"""arcface_torch checkpoints, made from the published layout and not by our class, and run by an independent forward."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.models.arcface_torch import ArcFaceTorch
from pkd.toolkit.distill.models.backbones import BACKBONES, build
from pkd.toolkit.distill.models.initial_weights import start_from
from pkd.toolkit.distill.models.student import load_student
from pkd.toolkit.distill.models.teacher import open_checkpoint
from pkd.toolkit.distill.training.loop import distill
from pkd.toolkit.distill.training.setup import prepare
from tests.support.training_data import make_teacher, write_patterns

State = dict[str, Tensor]
PUBLISHED = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}
DIM, SIZE = 16, 32
SMALL = Preprocess(size=SIZE)
CROPS = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)


def published_shapes(depths: tuple[int, ...], dim: int, side: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that arcface_torch's iresnet.py saves."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    shapes["conv1.weight"] = (64, 3, 3, 3)
    norm("bn1", 64)
    shapes["prelu.weight"] = (64,)
    before = 64
    for layer, (channels, depth) in enumerate(zip((64, 128, 256, 512), depths, strict=True), start=1):
        for block in range(depth):
            at = f"layer{layer}.{block}"
            norm(f"{at}.bn1", before)
            shapes[f"{at}.conv1.weight"] = (channels, before, 3, 3)
            norm(f"{at}.bn2", channels)
            shapes[f"{at}.prelu.weight"] = (channels,)
            shapes[f"{at}.conv2.weight"] = (channels, channels, 3, 3)
            norm(f"{at}.bn3", channels)
            if block == 0:
                shapes[f"{at}.downsample.0.weight"] = (channels, before, 1, 1)
                norm(f"{at}.downsample.1", channels)
            before = channels
    norm("bn2", 512)
    shapes["fc.weight"], shapes["fc.bias"] = (dim, 512 * side * side), (dim,)
    norm("features", dim)
    return shapes


def published_forward(state: State, depths: tuple[int, ...], x: Tensor) -> Tensor:
    """Compute what arcface_torch does in eval mode, written out over a state dict."""

    def norm(name: str, x: Tensor) -> Tensor:
        kept = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *kept, eps=1e-5)  # type: ignore[arg-type, misc]

    def conv(name: str, x: Tensor, stride: int, padding: int) -> Tensor:
        return functional.conv2d(x, state[f"{name}.weight"], stride=stride, padding=padding)

    x = functional.prelu(norm("bn1", conv("conv1", x, 1, 1)), state["prelu.weight"])
    for layer, depth in enumerate(depths, start=1):
        for block in range(depth):
            at, stride = f"layer{layer}.{block}", 2 if block == 0 else 1
            y = norm(f"{at}.bn2", conv(f"{at}.conv1", norm(f"{at}.bn1", x), 1, 1))
            y = conv(f"{at}.conv2", functional.prelu(y, state[f"{at}.prelu.weight"]), stride, 1)
            if block == 0:
                x = norm(f"{at}.downsample.1", conv(f"{at}.downsample.0", x, stride, 0))
            x = x + norm(f"{at}.bn3", y)
    flat = torch.flatten(norm("bn2", x), 1)
    return norm("features", functional.linear(flat, state["fc.weight"], state["fc.bias"]))


@pytest.fixture(scope="module")
def state() -> State:
    """Random weights of an iresnet18 for 32-pixel crops, all statistics away from their start."""
    generator = torch.Generator().manual_seed(0)
    made: State = {}
    for name, shape in published_shapes(PUBLISHED["iresnet18"], DIM, SIZE // 16).items():
        if name.endswith("num_batches_tracked"):
            made[name] = torch.tensor(1000)
        elif name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            made[name] = 0.5 + torch.rand(shape, generator=generator)
        else:
            fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 25
            made[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
    made["features.weight"] = torch.ones(DIM)  # arcface_torch never trains it
    return made


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_depth_has_the_published_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours = {key: tuple(value.shape) for key, value in BACKBONES[name](512, 1.0, 112).state_dict().items()}
    assert ours == published_shapes(PUBLISHED[name], 512, 7)


def full_checkpoint(state: State) -> dict[str, object]:
    """``checkpoint_gpu_0.pt`` of train_v2.py."""
    head = {"weight": torch.randn(10, DIM)}
    rest = {"state_optimizer": {"state": {}, "param_groups": []}, "state_lr_scheduler": {"base_lrs": [0.1]}}
    return {"epoch": 20, "global_step": 7, "state_dict_backbone": state, "state_dict_softmax_fc": head, **rest}


KINDS: dict[str, Callable[[State], object]] = {
    "backbone.pth": lambda s: s,
    "of DistributedDataParallel": lambda s: {f"module.{key}": value for key, value in s.items()},
    "checkpoint_gpu_0.pt": full_checkpoint,
    "state_dict": lambda s: {"state_dict": s},
    "without batch counts": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
    "parameters": lambda s: {
        k: torch.nn.Parameter(v, k != "features.weight") if v.is_floating_point() else v for k, v in s.items()
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_published_embeddings(tmp_path: Path, state: State, kind: str) -> None:
    torch.save(KINDS[kind](state), tmp_path / "backbone.pth")
    teacher = open_checkpoint(tmp_path / "backbone.pth", SMALL)
    doubles = {key: value.double() for key, value in state.items()}
    expected = published_forward(doubles, PUBLISHED["iresnet18"], torch.from_numpy(SMALL(CROPS)).double()).numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(teacher.embed(CROPS), expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-2
    assert teacher.training["backbone"] == "iresnet18" and not teacher.module.training


def test_half_precision_files_are_run_in_single_precision(tmp_path: Path, state: State) -> None:
    halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save(halves, tmp_path / "backbone.pth")
    teacher = open_checkpoint(tmp_path / "backbone.pth", SMALL)
    assert {p.dtype for p in teacher.module.parameters()} == {torch.float32}
    torch.save({key: value.float() for key, value in halves.items()}, tmp_path / "same.pth")
    np.testing.assert_array_equal(teacher.embed(CROPS), open_checkpoint(tmp_path / "same.pth", SMALL).embed(CROPS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer3.0.bn1.weight": None}, r"layer3\.0\.bn1\.weight"),
        ({"layer2.0.se.fc1.weight": torch.zeros(8, 128)}, r"layer2\.0\.se\.fc1\.weight"),
        ({"layer4.1.conv2.weight": torch.zeros(512, 512, 1, 1)}, r"layer4\.1\.conv2\.weight"),
        ({"fc.weight": None}, r"no fc\.weight\. Export it to ONNX"),
        ({"fc.weight": torch.zeros(DIM)}, r"fc\.weight is \(16,\)"),
        ({"layer3.2.bn1.weight": torch.ones(256)}, "layer3 has 3 blocks"),
        ({"fc.weight": torch.zeros(DIM, 512 * 49)}, r"7×7, but a crop of 32 pixels gives 2×2\. State size=112"),
    ],
    ids=["missing", "foreign", "misshapen", "no fc", "fc of one axis", "no known depth", "another crop size"],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, state: State, change: dict[str, Tensor | None], message: str
) -> None:
    changed = {key: value for key, value in {**state, **change}.items() if value is not None}
    torch.save(changed, tmp_path / "backbone.pth")
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / "backbone.pth", SMALL)


def test_a_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(build("mobilefacenet:0.125", 8, 32), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"holds an object besides tensors \(pkd.*MobileFaceNet\)"):
        ArcFaceTorch.read(tmp_path / "model.pt")


def test_a_student_starts_from_it(tmp_path: Path, state: State) -> None:
    torch.save(KINDS["of DistributedDataParallel"](state), tmp_path / "r18.pth")
    student = build("iresnet18", DIM, SIZE)
    started = start_from(str(tmp_path / "r18.pth"), student, "iresnet18", DIM, SIZE)
    assert started.startswith("r18@sha256:")
    for name, value in student.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize(
    ("student", "dim", "size"), [("iresnet34", DIM, SIZE), ("iresnet18", 8, SIZE), ("iresnet18", DIM, 112)]
)
def test_a_student_that_it_does_not_fit(tmp_path: Path, state: State, student: str, dim: int, size: int) -> None:
    torch.save(state, tmp_path / "r18.pth")
    with torch.device("meta"):
        network = build(student, dim, size)
    with pytest.raises(InputError, match=r"--init .*r18\.pth: holds iresnet18 with 16 outputs and 2×2 last features"):
        start_from(str(tmp_path / "r18.pth"), network, student, dim, size)


def test_a_start_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no student\.pt"):
        start_from(str(tmp_path / "none.pth"), torch.nn.Identity(), "iresnet18", DIM, SIZE)


def test_a_training_starts_from_it(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "r18.pth")
    faces = write_patterns(tmp_path / "patterns", identities=2, images=4)
    teacher = make_teacher(DIM)
    config = DistillConfig(
        out=str(tmp_path / "run"), faces=(str(faces),), teacher="projection", method="l2kd", student="iresnet18",
        init=str(tmp_path / "r18.pth"), steps=1, batch=8, lr=1e-9, precision="fp32", cache=str(tmp_path / "cache"),
    )  # fmt: skip
    quiet = Console(quiet=True)
    summary = distill(config, prepare(config, teacher, quiet), teacher, quiet)
    assert str(summary["init"]).startswith("r18@sha256:")
    trained = load_student(tmp_path / "run").module.state_dict()
    torch.testing.assert_close(trained["layer2.1.conv2.weight"], state["layer2.1.conv2.weight"], rtol=0, atol=1e-6)
    assert int(trained["bn1.num_batches_tracked"]) == int(state["bn1.num_batches_tracked"]) + 1


WRAPPED: dict[str, Any] = {
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "compiled and parallel": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "a Lightning module": lambda s: {"state_dict": {f"backbone.{k}": v for k, v in s.items()}, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
    "net in model": lambda s: {"model": {"net": s}},
    "a classifier beside it": lambda s: {**{f"encoder.{k}": v for k, v in s.items()}, "head.weight": torch.zeros(9, 3)},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_of_other_trainers_are_looked_through(tmp_path: Path, state: State, kind: str) -> None:
    torch.save(WRAPPED[kind](state), tmp_path / "w.pth")
    assert ArcFaceTorch.read(tmp_path / "w.pth").backbone == "iresnet18"


def test_of_two_networks_none_is_guessed(tmp_path: Path, state: State) -> None:
    torch.save({"student": dict(state), "ema": dict(state)}, tmp_path / "two.pth")
    with pytest.raises(InputError, match=r"holds 2 networks \('ema' and 'student'\).*does not guess"):
        ArcFaceTorch.read(tmp_path / "two.pth")


def test_what_is_no_tensor_is_named(tmp_path: Path, state: State) -> None:
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, tmp_path / "args.pth")
    with pytest.raises(InputError, match=r"argparse\.Namespace.*state_dict") as caught:
        ArcFaceTorch.read(tmp_path / "args.pth")
    assert "\x1b" not in str(caught.value)
