"""A graph in half precision keeps what half precision cannot hold."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pkd.export.checks.parity import synthetic_crops
from pkd.export.graph.build import float_graph, serialise, uint8_graph
from pkd.export.graph.fp16 import to_half
from pkd.export.quantization.quantize import embeddings
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess
from tests.support.bundle_factory import DIM, network

CROPS = synthetic_crops(4, 112)


def with_weights(factor: float) -> onnx.ModelProto:
    made = network()
    matrix = next(tensor for tensor in made.graph.initializer if tensor.name == "matrix")
    matrix.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(matrix) * np.float32(factor), "matrix"))
    return uint8_graph(made, Preprocess(), DIM)


def test_the_network_is_float16_and_its_ends_are_as_before() -> None:
    graph = with_weights(1)
    half = to_half(graph)
    assert {t.data_type for t in half.graph.initializer if t.name.startswith("net/")} == {
        TensorProto.FLOAT16,
        TensorProto.INT64,
    }
    assert [half.graph.input[0], half.graph.output[0]] == [graph.graph.input[0], graph.graph.output[0]]
    assert len(serialise(half)) < 0.6 * len(serialise(graph))
    error = np.abs(embeddings(half, CROPS) - embeddings(graph, CROPS)).max()
    assert 1e-7 < error < 2e-3
    onnx.checker.check_model(to_half(float_graph(network(), Preprocess(), DIM)), full_check=True)


def test_lengths_beyond_float16_survive_because_squares_are_summed_in_float32() -> None:
    graph = with_weights(300)  # features of hundreds: their squares' sum is far over 65,504
    rows = embeddings(to_half(graph), CROPS)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert np.abs(rows - embeddings(graph, CROPS)).max() < 2e-3


def test_an_epsilon_does_not_become_zero() -> None:
    made = network()
    made.graph.initializer.append(numpy_helper.from_array(np.float32(1e-12), "epsilon"))
    made.graph.initializer.append(numpy_helper.from_array(np.float32(0), "nought"))
    made.graph.node[-1].output[0] = "row"
    made.graph.node.append(helper.make_node("Mul", ["row", "nought"], ["none"]))
    made.graph.node.append(helper.make_node("Max", ["none", "epsilon"], ["length"]))
    made.graph.node.append(helper.make_node("Div", ["none", "length"], ["zero"]))
    made.graph.node.append(helper.make_node("Add", ["row", "zero"], ["embedding"]))
    graph = uint8_graph(made, Preprocess(), DIM)
    assert np.isfinite(embeddings(to_half(graph), CROPS)).all()


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(InputError, match="over 65,504"):
        to_half(with_weights(1e8))
    made = network()
    made.graph.node[-1].output[0] = "row"
    made.graph.node.append(helper.make_node("MaxRoiPool", ["row", "row"], ["embedding"], pooled_shape=[1, 1]))
    with pytest.raises(InputError, match="cannot be typed"):
        to_half(uint8_graph(made, Preprocess(), DIM))
