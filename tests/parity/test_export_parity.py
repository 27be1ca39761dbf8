"""Exported graphs against what they came from, and inside the program that most people load them with."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from pkd.export.checks.parity import GOLDEN_TOLERANCE, onnx_runner, synthetic_crops
from pkd.export.cli import main
from pkd.export.draft import open_teacher
from pkd.export.graph.build import serialise, uint8_graph
from pkd.toolkit.bundle.bundle import Bundle, self_test
from pkd.toolkit.core.encoder_info import EmbeddingSpace, describe
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.distill.models.open_encoder import open_encoder
from pkd.toolkit.encoders.base import Embeddings, Encoder, open_bundle
from pkd.toolkit.images.codec import Rgb, read_rgb
from tests.support.bundle_factory import DIM

torch = pytest.importorskip("torch")
from tests.support.every_operator import every_operator  # noqa: E402  it needs torch

torch.set_num_threads(1)  # its threads spin where tests run beside each other
TEACHERS = {
    "teacher_edgeface_xs_512.onnx": "mean=127.5,std=127.5",
    "teacher_mobilefacenet_y1_128.onnx": "mean=0,std=1",
}


def student_run(folder: Path, preprocess: Preprocess, backbone: str = "mobilefacenet:0.25") -> Path:
    """Write a run folder as pkd-distill leaves it, its batch statistics moved away from their start."""
    from pkd.toolkit.distill.models.backbones import build
    from pkd.toolkit.distill.models.student import save_student, weights_digest

    torch.manual_seed(1)
    module = build(backbone, DIM)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        module.train()(torch.from_numpy(preprocess(synthetic_crops(16, 112))))
    module.eval()
    space = EmbeddingSpace(id="teacher@sha256:" + "0" * 64, dim=DIM)
    info = describe("small", "student", weights_digest(module.state_dict()), preprocess, DIM, space=space)
    folder.mkdir()
    save_student(folder, module, backbone, info, {"method": "l2kd", "steps": 1})
    return folder


def insightface_rows(path: Path, crops: Rgb) -> Embeddings:
    """Return what insightface makes of ``path``: its own loader, its own guess of the scale, BGR images."""
    pytest.importorskip("insightface")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # insightface's imports warn about other packages
        from insightface import model_zoo

        model = model_zoo.get_model(str(path), providers=["CPUExecutionProvider"])
    assert type(model).__name__ == "ArcFaceONNX"
    rows: Embeddings = model.get_feat([np.ascontiguousarray(crop[..., ::-1]) for crop in crops])
    return rows


def cosines(a: Embeddings, b: Embeddings) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    made: np.ndarray = np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return made


def compare(source: Encoder, folder: Path, crops: Rgb, limit: float) -> None:
    bundle = Bundle.open(folder / "bundle")
    exported = open_bundle(bundle)
    expected = np.concatenate([source.embed(crops[i : i + 16]) for i in range(0, len(crops), 16)])
    made = np.concatenate([exported.embed(crops[i : i + 16]) for i in range(0, len(crops), 16)])
    assert exported.info == source.info
    assert np.abs(made - expected).max() < limit
    assert self_test(bundle, exported.embed) < 1e-6
    assert cosines(insightface_rows(folder / "float.onnx", crops), expected).min() > 0.9999
    assert np.std(expected, axis=0).max() > 1e-3, "the crops must not all look the same to the encoder"


@pytest.mark.parametrize(
    "preprocess",
    [Preprocess(), Preprocess(mean=0, std=1), Preprocess(channels="bgr", mean=127.5, std=128), Preprocess(mean=110)],
    ids=str,
)
def test_a_student_in_onnxruntime_and_in_insightface(tmp_path: Path, preprocess: Preprocess) -> None:
    run = student_run(tmp_path / "run", preprocess)
    out, floats = tmp_path / "bundle", tmp_path / "float.onnx"
    assert main([str(run), "-o", str(out), "--float-nchw", str(floats), "--json"]) == 0
    compare(open_encoder(str(run)), tmp_path, synthetic_crops(20, 112), 1e-5)
    assert Bundle.open(out).manifest.training == {"method": "l2kd", "steps": 1}


def test_the_other_mobile_backbone(tmp_path: Path) -> None:
    run = student_run(tmp_path / "run", Preprocess(), "repvit:0.25")
    assert main([str(run), "-o", str(tmp_path / "bundle"), "--float-nchw", str(tmp_path / "float.onnx"), "--json"]) == 0
    compare(open_encoder(str(run)), tmp_path, synthetic_crops(20, 112), 1e-5)
    graph = onnx.load_model_from_string(Bundle.open(tmp_path / "bundle").read("encoder.onnx")).graph
    count = Counter(node.op_type for node in graph.node)
    assert count["BatchNormalization"] == 0, "folded"
    assert count["Conv"] == 63, "12 mixers of one convolution each; their branches would be 12 more"


def test_plain_openvino_loads_every_graph_and_the_ir(tmp_path: Path) -> None:
    """As someone without pkd does: by path, with the precision pinned and nothing else set."""
    openvino = pytest.importorskip("openvino")
    onnx.save(every_operator(), str(tmp_path / "t.onnx"))
    teacher = ["--teacher", str(tmp_path / "t.onnx"), "--teacher-preprocess", "channels=bgr,mean=127.5,std=128"]
    (tmp_path / "faces").mkdir()
    for i, crop in enumerate(synthetic_crops(40, 112)):
        cv2.imwrite(str(tmp_path / f"faces/{i:02}.png"), crop[..., ::-1])
    options = ["--format", "onnx", "openvino", "--precision", "fp32", "int8", "--calib", str(tmp_path / "faces")]
    assert main([*teacher, "-o", str(tmp_path / "made"), *options, "--json"]) == 0
    bundle = Bundle.open(tmp_path / "made")
    golden = bundle.golden()
    allowed = {"encoder.onnx": GOLDEN_TOLERANCE}
    for target in bundle.manifest.targets:
        allowed |= {str(target.file): target.golden_tolerance, target.graph: target.golden_tolerance}
    assert len(allowed) == 7, "IR lies beside the graph that it was made of"
    for name, tolerance in allowed.items():
        pinned = {"INFERENCE_PRECISION_HINT": "f32"}
        model = openvino.Core().compile_model(str(bundle.path / name), "CPU", pinned)
        worst = 1 - cosines(model([golden.crops])[0], golden.embeddings).min()
        if "int8" in name and "vnni" not in Path("/proc/cpuinfo").read_text():
            tolerance = max(tolerance, 0.05)  # sums of INT8 overflow in OpenVINO there, which has no option against it
        assert worst <= tolerance, f"{name}: {worst} over {tolerance}"


def test_an_arcface_torch_checkpoint(tmp_path: Path) -> None:
    from pkd.toolkit.distill.models.backbones import build

    torch.manual_seed(0)
    torch.save(build("iresnet18", DIM).state_dict(), tmp_path / "backbone.pt")
    stated = "channels=rgb,mean=127.5,std=127.5"
    source = open_teacher(str(tmp_path / "backbone.pt"), stated)
    model = serialise(uint8_graph(source.network, source.info.preprocess, DIM))
    crops = synthetic_crops(3, 112)
    made = onnx_runner(model, lambda crops: crops, "backbone.pt")(crops)
    assert source.info.role == "teacher"
    assert np.abs(made - source.encoder.embed(crops)).max() < 1e-5


@pytest.mark.shared
@pytest.mark.parametrize("name", TEACHERS)
def test_real_teachers_on_real_faces(tmp_path: Path, shared: Path, name: str) -> None:
    listed = (shared / "faces/splits/val.txt").read_text().split()
    crops = np.stack([read_rgb(shared / "faces" / line) for line in listed[:: len(listed) // 48][:48]])
    teacher = str(shared / "models" / name)
    command = ["--teacher", teacher, "--teacher-preprocess", TEACHERS[name], "--json"]
    assert main([*command, "-o", str(tmp_path / "bundle"), "--float-nchw", str(tmp_path / "float.onnx")]) == 0
    compare(open_encoder(teacher, TEACHERS[name]), tmp_path, crops, 1e-6)
    assert golden_error_in_bf16(Bundle.open(tmp_path / "bundle")) > GOLDEN_TOLERANCE


def golden_error_in_bf16(bundle: Bundle) -> float:
    """1 − cosine of the golden crops where a runtime silently rounds the weights to bf16."""
    model = onnx.load_model_from_string(bundle.read("encoder.onnx"))
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            bits = numpy_helper.to_array(tensor).view(np.uint32)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    golden = bundle.golden()
    rows = onnx_runner(model.SerializeToString(), lambda crops: crops, "bf16")(golden.crops)
    return float(np.max(1 - cosines(rows, golden.embeddings)))
