"""Graphs become PyTorch modules that compute the same, or are refused by name."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from tests.support.bundle_factory import DIM, network

pytest.importorskip("torch")
import torch

from pkd.export.checks.parity import synthetic_crops
from pkd.export.formats.executorch import torch_module
from pkd.export.graph.build import onnx_network, torch_network, uint8_graph
from pkd.export.graph.rewrite import shorten_names
from pkd.export.quantization.quantize import calibrate, embeddings, quantise
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.distill.models.backbones import build
from pkd.toolkit.encoders.base import Embeddings
from tests.support.every_operator import every_operator

CROPS = synthetic_crops(3, 112)


def in_torch(graph: onnx.ModelProto) -> Embeddings:
    with torch.no_grad():
        rows: Embeddings = torch_module(graph)(torch.from_numpy(CROPS.astype(np.float32))).numpy()
    return rows


@pytest.mark.parametrize("spec", ["mobilefacenet:0.25", "repvit:0.25"])
def test_backbones(spec: str) -> None:
    torch.manual_seed(0)
    graph = uint8_graph(torch_network(build(spec, DIM).eval(), 112), Preprocess(channels="bgr", std=128), DIM)
    np.testing.assert_allclose(in_torch(graph), embeddings(graph, CROPS), atol=2e-6)


def test_a_flattening_as_other_exporters_write_it() -> None:
    graph = uint8_graph(network(), Preprocess(mean=0, std=1), DIM)
    np.testing.assert_allclose(in_torch(graph), embeddings(graph, CROPS), atol=2e-6)


@pytest.mark.parametrize("form", ["u8s8", "s8s8"])
def test_int8_has_the_steps_of_the_graph(form: str) -> None:
    plain = uint8_graph(every_operator(), Preprocess(channels="bgr"), DIM)
    made = shorten_names(quantise(plain, calibrate(plain, CROPS, "minmax", lambda _: None), form))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # no other rounding
    session = onnxruntime.InferenceSession(made.SerializeToString(), options)
    expected = session.run(None, {"crops": CROPS})[0]
    assert np.abs(expected - embeddings(plain, CROPS)).max() > 1e-3, "int8 must show"
    step = np.ptp(expected) / 100  # of the last layer, where a rounding before it fell the other way
    assert np.abs(in_torch(made) - expected).max() < 1.5 * step < 0.02


def changed(kind: str, **attributes: object) -> onnx.ModelProto:
    made = network()
    node = next(node for node in made.graph.node if node.op_type == kind)
    kept = [a for a in node.attribute if a.name not in attributes]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in attributes.items())])
    return made


def with_last(kind: str, *constants: np.ndarray) -> onnx.ModelProto:
    made = network()
    made.graph.node[-1].output[0] = "row"
    names = [f"constant{i}" for i in range(len(constants))]
    made.graph.node.append(helper.make_node(kind, ["row", *names], ["embedding"]))
    made.graph.initializer.extend(numpy_helper.from_array(c, n) for c, n in zip(constants, names, strict=True))
    return made


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (with_last("CumSum", np.array(1)), "does not translate CumSum"),
        (changed("Gemm", transA=1), "Gemm of this graph: only behind the batch"),
        (with_last("Gather", np.array([0])), "Gather of this graph: only behind the batch"),
        (with_last("ReduceSum", np.array([0])), "ReduceSum of this graph: only of an embedding"),
    ],
)
def test_what_is_not_translated_is_refused_by_name(made: onnx.ModelProto, said: str) -> None:
    with pytest.raises(InputError, match=f"{said}.*Leave --format executorch out"):
        in_torch(uint8_graph(made, Preprocess(), DIM))


@pytest.mark.shared
def test_a_transformer_is_refused(shared: object) -> None:
    teacher = onnx_network(f"{shared}/models/teacher_edgeface_xs_512.onnx")
    with pytest.raises(InputError, match="does not translate"):
        torch_module(uint8_graph(teacher, Preprocess(), 512))
