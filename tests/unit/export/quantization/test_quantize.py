"""INT8 graphs: what is quantised, what is left, and how far they are off."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from pkd.export.checks.parity import synthetic_crops
from pkd.export.graph.build import serialise, torch_network, uint8_graph
from pkd.export.graph.rewrite import decompose_prelu, shorten_names
from pkd.export.options import RANGE_METHODS, RangeMethod
from pkd.export.quantization.quantize import (
    INT8_TYPES,
    calibrate,
    embeddings,
    layers,
    quantise,
    sensitivity,
    similarity_rms,
)
from pkd.toolkit.core.preprocess import Preprocess
from tests.support.bundle_factory import DIM, network

CROPS = synthetic_crops(48, 112)
TINY = decompose_prelu(uint8_graph(network(), Preprocess(), DIM))


@pytest.fixture(scope="module")
def student() -> onnx.ModelProto:
    torch = pytest.importorskip("torch")
    from pkd.toolkit.distill.models.backbones import build

    torch.manual_seed(0)
    return uint8_graph(torch_network(build("mobilefacenet-relu:0.25", DIM).eval(), 112), Preprocess(), DIM)


def nothing(done: int) -> None:
    pass


@pytest.mark.parametrize("form", INT8_TYPES)
@pytest.mark.parametrize("method", RANGE_METHODS)
def test_every_form_and_method_stays_near_fp32(
    form: str, method: RangeMethod, caplog: pytest.LogCaptureFixture
) -> None:
    made = quantise(TINY, calibrate(TINY, CROPS[:36], method, nothing), form)
    onnx.checker.check_model(made, full_check=True)
    rows, expected = embeddings(made, CROPS[36:]), embeddings(TINY, CROPS[36:])
    assert np.sum(rows * expected, axis=1).min() > 0.99
    assert 0 < similarity_rms(rows, expected) < 0.02
    assert not caplog.records
    assert logging.root.manager.disable == 0


@pytest.mark.parametrize("form", INT8_TYPES)
def test_weights_are_signed_bytes_per_channel_and_biases_stay_float(form: str, student: onnx.ModelProto) -> None:
    made = quantise(student, calibrate(student, CROPS[:4], "minmax", nothing), form)
    stored = {tensor.name: tensor for tensor in made.graph.initializer}
    read = {name: node for node in made.graph.node for name in node.output}
    for node in made.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weight = read[node.input[1]]
            assert weight.op_type == "DequantizeLinear"
            assert stored[weight.input[0]].data_type == TensorProto.INT8
            assert list(stored[weight.input[1]].dims) == [stored[weight.input[0]].dims[0]]
    assert not any(tensor.data_type == TensorProto.INT32 for tensor in stored.values()), "TensorRT refuses them"
    zeros = {stored[n.input[2]].data_type for n in made.graph.node if n.op_type == "QuantizeLinear"}
    activations = {"u8s8": TensorProto.UINT8, "u16s8": TensorProto.UINT16, "s16s8": TensorProto.INT16}
    assert zeros == {activations.get(form, TensorProto.INT8)}
    if form == "s8s8":
        offsets = [stored[n.input[2]] for n in made.graph.node if n.op_type.endswith("quantizeLinear")]
        assert not any(onnx.numpy_helper.to_array(offset).any() for offset in offsets)


def test_layers_that_are_kept_compute_in_float32(student: onnx.ModelProto) -> None:
    ranges = calibrate(student, CROPS[:4], "minmax", nothing)
    keep = [layers(student)[0].name, layers(student)[-1].name]
    made = quantise(student, ranges, "u8s8", keep)
    stored = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    floats = [
        n.name for n in made.graph.node if stored.get(n.input[1] if len(n.input) > 1 else "") == TensorProto.FLOAT
    ]
    assert set(keep) <= set(floats)
    everything = [node.name for node in layers(student)]
    untouched = embeddings(quantise(student, ranges, "u8s8", everything), CROPS[:4])
    assert np.sum(untouched * embeddings(student, CROPS[:4]), axis=1).min() > 0.9


def test_the_costliest_layer_is_the_one_that_was_made_costly() -> None:
    ranges = dict(calibrate(TINY, CROPS[:8], "minmax", nothing))
    ranges["net/convolved"] = (-40.0, 40.0)  # most of its 256 steps are never reached
    told: list[int] = []
    costs = sensitivity(TINY, ranges, "u8s8", CROPS[8:], told.append)
    assert sum(told) == len(costs) == len(layers(TINY)) == 2
    assert costs[0].saved >= costs[1].saved
    assert costs[0].operator == "Conv"


def test_similarity_rms_sees_what_the_cosine_to_the_reference_hides() -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(50, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    turn = np.linalg.qr(random.normal(size=(64, 64)))[0].astype(np.float32)
    assert similarity_rms(rows @ turn, rows) < 1e-6, "a rotation that all share changes no similarity"
    assert similarity_rms(rows[::-1], rows) > 0.1
    pairs = [(i, j) for i in range(50) for j in range(i)]
    noisy = rows + random.normal(0, 0.01, rows.shape).astype(np.float32)
    by_hand = np.sqrt(np.mean([(noisy[i] @ noisy[j] - rows[i] @ rows[j]) ** 2 for i, j in pairs]))
    assert similarity_rms(noisy, rows) == pytest.approx(by_hand, rel=1e-3)


def test_short_names_change_the_size_and_nothing_else(student: onnx.ModelProto) -> None:
    made = quantise(student, calibrate(student, CROPS[:4], "minmax", nothing), "u8s8")
    short = shorten_names(made)
    onnx.checker.check_model(short, full_check=True)
    assert np.array_equal(embeddings(short, CROPS), embeddings(made, CROPS))
    assert len(serialise(short)) < 0.85 * len(serialise(made))
    assert Counter(n.op_type for n in short.graph.node) == Counter(n.op_type for n in made.graph.node)
    assert [v.name for v in [*short.graph.input, *short.graph.output]] == ["crops", "embedding"]
