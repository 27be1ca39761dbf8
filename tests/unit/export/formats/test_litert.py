"""LiteRT files give the graph's embeddings, INT8 in integers; what is not translated is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from pkd.export.checks.parity import synthetic_crops
from pkd.export.cli import main
from pkd.export.formats.litert import to_litert
from pkd.export.graph.build import serialise, torch_network, uint8_graph
from pkd.export.quantization.quantize import calibrate, embeddings, quantise
from pkd.toolkit.bundle.bundle import Bundle, self_test
from pkd.toolkit.core.errors import BundleError, InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.litert import LiteRtNet
from pkd.toolkit.encoders.registry import open_target
from tests.support.bundle_factory import DIM, network, teacher_file

pytest.importorskip("ai_edge_litert")
torch = pytest.importorskip("torch")
CROPS = synthetic_crops(3, 112)


def same(graph: onnx.ModelProto) -> None:
    np.testing.assert_allclose(LiteRtNet(to_litert(serialise(graph)), 1)(CROPS), embeddings(graph, CROPS), atol=2e-6)


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(),
        Preprocess(mean=0, std=255),
        Preprocess(channels="bgr", mean=(91.5, 103.9, 131.1), std=(57, 58, 59)),
    ],
    ids=str,
)
def test_any_preprocessing(preprocess: Preprocess) -> None:
    same(uint8_graph(network(), preprocess, DIM))


@pytest.mark.parametrize("spec", ["mobilefacenet:0.25", "mobilefacenet-relu:0.25", "repvit:0.25"])
def test_backbones(spec: str) -> None:
    from pkd.toolkit.distill.models.backbones import build

    torch.manual_seed(0)
    same(uint8_graph(torch_network(build(spec, DIM).eval(), 112), Preprocess(), DIM))


def test_every_operator_and_every_padding() -> None:
    """A padding that LiteRT has no word for, groups, a multiplier, dilation, poolings, a clip, rows from pictures."""
    from tests.support.every_operator import every_operator, other_layers

    same(uint8_graph(every_operator(), Preprocess(), DIM))
    same(uint8_graph(torch_network(other_layers(DIM, padded_pools=False), 112), Preprocess(), DIM))


def test_int8_is_computed_in_integers() -> None:
    from tests.support.every_operator import every_operator

    plain = uint8_graph(every_operator(), Preprocess(), DIM)
    graph = quantise(plain, calibrate(plain, synthetic_crops(8, 112), "minmax", lambda count: None), "s8s8a")
    data = to_litert(serialise(graph))
    net = LiteRtNet(data, 1)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (expected,) = onnxruntime.InferenceSession(graph.SerializeToString(), options).run(None, {"crops": CROPS})
    made = net(CROPS)
    rounding = 1 - np.sum(made * expected, axis=1)
    quantisation = 1 - np.sum(expected * embeddings(plain, CROPS), axis=1)
    assert rounding.max() < min(1e-3, quantisation.max())
    assert len(data) < 0.5 * len(to_litert(serialise(plain)))

    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data))
    tensors, codes = model.subgraphs[0].tensors, [code.builtinCode for code in model.operatorCodes]
    kinds = schema.BuiltinOperator
    linear = {kinds.CONV_2D, kinds.DEPTHWISE_CONV_2D, kinds.FULLY_CONNECTED, kinds.ADD}
    found = [one for one in model.subgraphs[0].operators if codes[one.opcodeIndex] in linear]
    whole = [
        one for one in found if all(tensors[i].type == schema.TensorType.INT8 for i in (*one.inputs[:2], *one.outputs))
    ]
    floats = [one for one in found if one not in whole]
    assert len(whole) == 5  # three convolutions, the shortcut and the last layer
    assert [codes[one.opcodeIndex] for one in floats] == [kinds.ADD]  # of the normalisation that is not folded


def test_16x8_is_computed_in_integers_and_nearly_exact() -> None:
    from ai_edge_litert import schema_py_generated as schema

    from tests.support.every_operator import every_operator

    plain = uint8_graph(every_operator(), Preprocess(), DIM)
    ranges = calibrate(plain, synthetic_crops(8, 112), "minmax", lambda count: None)
    graph = quantise(plain, ranges, "s16s8")
    data = to_litert(serialise(graph))
    made, expected = LiteRtNet(data, 1)(CROPS), embeddings(graph, CROPS)
    assert (1 - np.sum(made * expected, axis=1)).max() < 1e-6
    assert len(data) < 0.5 * len(to_litert(serialise(plain)))
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data))
    tensors, codes = model.subgraphs[0].tensors, [code.builtinCode for code in model.operatorCodes]
    types = schema.TensorType
    convolved = [
        one for one in model.subgraphs[0].operators if codes[one.opcodeIndex] == schema.BuiltinOperator.CONV_2D
    ]
    assert [[tensors[i].type for i in one.inputs] for one in convolved] == [[types.INT16, types.INT8, types.INT64]] * 2


def test_a_target_of_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher_file(tmp_path / "t.onnx")
    stated = "channels=rgb,mean=127.5,std=127.5"
    assert main(["--teacher", "t.onnx", "--teacher-preprocess", stated, "-o", "made", "--format", "litert"]) == 0
    bundle = Bundle.open("made")
    (target,) = bundle.manifest.targets
    assert (target.name, target.file) == ("litert-fp32", "targets/litert-fp32/encoder.tflite")
    assert target.encoder == bundle.manifest.encoder and "litert" in target.checked_with
    assert self_test(bundle, open_target(bundle, target.name).embed, target) < 1e-6


def test_a_file_that_is_none() -> None:
    with pytest.raises(BundleError, match="cannot read the file"):
        LiteRtNet(b"\x1c\0\0\0TFL3 no model", 1)


def test_what_is_not_translated_is_named() -> None:
    from tests.support.every_operator import unknown_operator

    with pytest.raises(InputError, match=r"LiteRT: Erf \(net/bell\) is not translated\. Leave --format litert out"):
        to_litert(serialise(uint8_graph(unknown_operator("Erf"), Preprocess(), DIM)))


def test_a_constant_that_is_quantised_within_the_graph_is_named() -> None:
    graph = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17]>
        g (uint8[N, 2, 2, 3] crops) => (float[N, 12] embedding)
        <float[1] kept = {0.5}, float step = {0.1}, int8 zero = {0}> {
            numbers = Cast <to = 1> (crops)
            small = QuantizeLinear (kept, step, zero)
            held = DequantizeLinear (small, step, zero)
            product = Mul (numbers, held)
            embedding = Flatten (product)
        }"""
    )
    with pytest.raises(InputError, match=r"QuantizeLinear \(small\) of the constant 'kept' is not translated"):
        to_litert(graph.SerializeToString())
