"""The form for NPU compilers: fixed shapes, no scaling, and still the encoder once a device does what is stated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper, shape_inference

from pkd.export.checks.parity import synthetic_crops
from pkd.export.cli import main
from pkd.export.formats.npu import OPSET, to_npu
from pkd.export.graph.build import opset_of, serialise, torch_network, uint8_graph
from pkd.export.quantization.quantize import embeddings
from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.core.errors import InputError, TargetUnavailable
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.registry import open_target
from tests.support.bundle_factory import DIM, network, teacher_file


def as_a_device(data: bytes, settings: dict[str, object], crops: np.ndarray) -> np.ndarray:
    """Do what the settings say, with numpy and onnxruntime alone."""
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    mean, std = (np.array([float(part) for part in str(settings[name]).split(",")]) for name in ("mean", "std"))
    rows = []
    for crop in crops:
        ordered = crop[..., ::-1] if settings["channels"] == "bgr" else crop
        pixels = ((ordered - mean) / std).astype(np.float32).transpose(2, 0, 1)[None]
        (row,) = session.run(["features"], {"pixels": np.ascontiguousarray(pixels)})[0]
        rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


@pytest.mark.parametrize("stated", ["mean=127.5,std=128", "channels=bgr,mean=91.5,103.9,131.1,std=57,58,59"])
def test_the_target_is_the_encoder_once_a_device_scales_and_normalises(
    stated: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher_file(tmp_path / "t.onnx")
    assert main(["--teacher", "t.onnx", "--teacher-preprocess", stated, "-o", "made", "--format", "npu", "--json"]) == 0
    bundle = Bundle.open("made")
    (target,) = bundle.manifest.targets
    assert (target.name, target.file, target.graph) == ("npu-fp32", "targets/npu-fp32/encoder.onnx", "encoder.onnx")
    assert target.encoder == bundle.manifest.encoder
    golden = bundle.golden()
    rows = as_a_device(bundle.read(str(target.file)), dict(target.settings), golden.crops)
    np.testing.assert_allclose(rows, golden.embeddings, atol=2e-6)
    with pytest.raises(TargetUnavailable, match="npu-fp32 is what the compilers of NPUs read"):
        open_target(bundle, "npu-fp32")


@pytest.mark.parametrize("spec", ["mobilefacenet:0.25", "mobilefacenet-relu:0.25", "repvit:0.25", "iresnet18"])
def test_every_backbone_has_fixed_shapes_in_an_opset_that_compilers_read(spec: str) -> None:
    torch = pytest.importorskip("torch")
    from pkd.toolkit.distill.models.backbones import build

    torch.manual_seed(0)
    graph = uint8_graph(torch_network(build(spec, DIM).eval(), 112), Preprocess(), DIM)
    data = to_npu(serialise(graph), 112, DIM)
    model = onnx.load_model_from_string(data)
    assert opset_of(model) == OPSET
    assert [n.name for n in (*model.graph.input, *model.graph.output)] == ["pixels", "features"]
    inferred = shape_inference.infer_shapes(model, strict_mode=True).graph
    values = {value.name: value for value in [*inferred.input, *inferred.value_info, *inferred.output]}
    for node in model.graph.node:
        assert node.op_type not in ("Cast", "QuantizeLinear")
        for name in node.output:
            assert all(side.dim_value > 0 for side in values[name].type.tensor_type.shape.dim), name
    crops = synthetic_crops(3, 112)
    scaling = {"channels": "rgb", "mean": "127.5", "std": "127.5"}
    np.testing.assert_allclose(as_a_device(data, dict(scaling), crops), embeddings(graph, crops), atol=1e-5)


def test_shapes_that_depend_on_values_are_refused() -> None:
    made = network()
    made.graph.node[-1].output[0] = "row"
    made.graph.node.append(helper.make_node("NonZero", ["row"], ["places"]))
    made.graph.node.append(helper.make_node("Cast", ["places"], ["found"], to=onnx.TensorProto.FLOAT))
    made.graph.node.append(helper.make_node("ReduceSum", ["found"], ["sum"], keepdims=0))
    made.graph.node.append(helper.make_node("Add", ["row", "sum"], ["embedding"]))
    made.graph.initializer.append(numpy_helper.from_array(np.array(1), "unused"))
    with pytest.raises(InputError, match=r"--format npu: the shape of .* depends on values\. Leave --format npu out"):
        to_npu(serialise(uint8_graph(made, Preprocess(), DIM)), 112, DIM)
