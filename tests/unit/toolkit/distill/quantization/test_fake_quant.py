"""Fake quantisation against onnxruntime's QuantizeLinear and DequantizeLinear, its gradients, and the whole student."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.quant_utils import compute_scale_zp
from torch import Tensor, nn

from pkd.export.checks.parity import synthetic_crops
from pkd.export.graph.build import torch_network, uint8_graph
from pkd.export.quantization.quantize import calibrate, embeddings, quantise, similarity_rms
from pkd.export.quantization.ranges import choose_ranges
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.distill.models.backbones import build
from pkd.toolkit.distill.models.layers import Backbone
from pkd.toolkit.distill.quantization.fake_quant import (
    SIGNED,
    UNSIGNED,
    Grid,
    Int8Student,
    fake_quantise,
    fake_quantise_weight,
    folded,
    scale_of,
)

SCALING = Preprocess(mean=120.0, std=130.0)
"""Unlike the usual one it puts no pixel on a half of a step, where the last bit decides."""
GRIDS = {"u8s8": (UNSIGNED, np.uint8, 0, 255), "s8s8": (SIGNED, np.int8, -127, 127)}
RANGES = [(-1.0, 3.0), (0.0, 2.5), (-0.7, 0.1), (0.0, 0.0), (-2.0, 2.0)]


def round_trip(values: NDArray[np.float32], scale: float, zero: int, dtype: type) -> NDArray[np.float32]:
    """Compute what onnxruntime makes of ``values``."""
    constants = [
        numpy_helper.from_array(np.float32(scale), "scale"),
        numpy_helper.from_array(np.array(zero, dtype), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    one = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph(nodes, "qdq", one[:1], one[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {"x": values})
    return np.asarray(made, np.float32)


@pytest.mark.parametrize("form", GRIDS)
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_rounding_is_onnxruntimes_for_the_same_range(form: str, low: float, high: float) -> None:
    grid, dtype, lowest, highest = GRIDS[form]
    zero, scale = compute_scale_zp(
        np.float32(low), np.float32(high), np.array(lowest, dtype), np.array(highest, dtype), symmetric=grid.symmetric
    )
    assert scale_of(low, high, grid) == (pytest.approx(float(scale), rel=1e-7), int(zero))
    values = np.random.default_rng(0).normal(0, 2, 20_000).astype(np.float32)
    step = values.astype(np.float64) / float(scale)
    values = values[np.abs(step - np.floor(step) - 0.5) > 1e-3]  # halves fall either way by the last bit
    ours = fake_quantise(torch.from_numpy(values), low, high, grid).numpy()
    np.testing.assert_allclose(ours, round_trip(values, float(scale), int(zero), dtype), rtol=1e-6, atol=1e-7)
    exact = (
        np.clip(np.rint(values.astype(np.float64) / float(scale)) + zero, grid.lowest, grid.highest) - zero
    ) * scale
    np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("grid", [UNSIGNED, SIGNED])
def test_gradients_pass_inside_the_range_and_stop_outside(grid: Grid) -> None:
    values = torch.tensor([-3.0, -0.9, 0.013, 0.9, 3.0], requires_grad=True)
    out = fake_quantise(values, -1.0, 1.0, grid)
    out.backward(torch.arange(1.0, 6.0))  # type: ignore[no-untyped-call]
    assert values.grad is not None and values.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]
    assert out[2] != values[2]


def test_every_output_of_a_weight_has_its_own_scale() -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 6).view(
        -1, 1, 1, 1
    )
    weight = torch.cat([weight, torch.zeros(1, 4, 3, 3)]).requires_grad_(True)
    made = fake_quantise_weight(weight)
    made.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and bool((weight.grad == 1).all())
    for row, rounded in zip(weight.detach().double().numpy(), made.detach().numpy(), strict=True):
        scale = max(np.abs(row).max() / 127, 1e-30)
        np.testing.assert_allclose(rounded, np.rint(row / scale) * scale, rtol=1e-5, atol=1e-9 * scale)


class Small(Backbone):
    """A residual block and a head: everything that quantisation treats specially, and little else."""

    stages = ("stem",)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 8, 8, bias=False), nn.BatchNorm2d(8), nn.PReLU(8))
        self.body = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.top = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 14 * 14, 16), nn.BatchNorm1d(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.top(x + self.body(x))
        return out


@pytest.fixture(scope="module")
def student() -> nn.Module:
    torch.manual_seed(0)
    made = Small().train()
    with torch.no_grad():
        made.stem[2].weight.uniform_(0.05, 0.4)  # type: ignore[operator,union-attr]
        made(torch.from_numpy(SCALING(synthetic_crops(24, 112))))  # running statistics
    return made.eval()


@pytest.mark.parametrize("form", GRIDS)
def test_a_student_is_rounded_where_its_graph_is(form: str, student: nn.Module) -> None:
    crops = synthetic_crops(48, 112)
    plain = uint8_graph(torch_network(student, 112), SCALING, 16)
    expected, int8 = (embeddings(each, crops) for each in (plain, quantised(plain, form, crops[:12])))
    ours = Int8Student(folded(student), GRIDS[form][0])
    pixels = torch.from_numpy(SCALING(crops))
    ours.ranges = choose_ranges(
        lambda: iter([{k: v.numpy() for k, v in ours.activations(pixels[:12]).items()}]), "minmax"
    )
    ours.train()
    with torch.no_grad():
        rows = ours(pixels).numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    lost = similarity_rms(int8, expected)
    assert lost > 1e-3
    assert similarity_rms(rows, int8) < 0.3 * lost  # what fell the other way at a half, not another rounding


def quantised(graph: onnx.ModelProto, form: str, crops: NDArray[np.uint8]) -> onnx.ModelProto:
    return quantise(graph, calibrate(graph, crops, "minmax", lambda done: None), form)


def test_folding_fuses_branches_and_leaves_normalisation_only_where_nothing_linear_is_before_it(
    student: nn.Module,
) -> None:
    pixels = torch.randn(4, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        flat = folded(student)
        torch.testing.assert_close(flat(pixels), student(pixels), rtol=1e-4, atol=1e-5)
    assert [name for name, part in flat.named_modules() if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d)] == [
        "body.0"
    ]
    assert all(weight.requires_grad for weight in flat.parameters())
    torch.manual_seed(0)
    branches = build("repvit:0.25", 16, 32).eval()
    small = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(folded(branches)(small), branches(small), rtol=1e-4, atol=1e-5)
