"""Foreign models become students: translated, checked against onnxruntime, and refused by name where they cannot be."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("torch")
import torch
from torch import Tensor, nn

from pkd.export.cli import main as export
from pkd.export.graph.build import torch_network
from pkd.toolkit.bundle.bundle import Bundle, write_bundle
from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.distill.models.adopted import Adopted, adopt, build_adopted
from pkd.toolkit.distill.models.backbones import build
from pkd.toolkit.distill.models.open_encoder import open_encoder
from pkd.toolkit.distill.models.student import load_student, save_student, weights_digest
from pkd.toolkit.encoders.base import open_bundle, open_onnx, unit_rows
from tests.support.real_data import HAS_SHARED, NO_SHARED, SHARED

SIZE = 32
STATED = f"mean=127.5,std=128,size={SIZE},template=none"
RANDOM = np.random.default_rng(3)
CROPS = RANDOM.integers(0, 256, (7, SIZE, SIZE, 3), np.uint8)


class Mobile(nn.Module):
    """A small mobile face network: PReLU, ReLU6, global depthwise convolution, embedding of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.PReLU(8))
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.last = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.Hardswish())
        self.pool = nn.Sequential(nn.Conv2d(24, 24, 8, groups=24, bias=False), nn.BatchNorm2d(24))
        self.embed = nn.Sequential(nn.Linear(24, 12, bias=False), nn.BatchNorm1d(12))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.running_mean = torch.randn(module.num_features) / 4
                module.running_var = torch.rand(module.num_features) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.embed(self.pool(self.last(self.deep(self.stem(x)))).flatten(1))
        return nn.functional.normalize(rows)


def torch_old(path: Path) -> None:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Mobile().eval(), (torch.zeros(1, 3, SIZE, SIZE),), path, dynamo=False, opset_version=13)


def torch_new(path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch's newer exporter needs onnxscript")
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch")
        program = torch.onnx.export(
            Mobile().eval(),
            (torch.zeros(2, 3, SIZE, SIZE),),
            dynamo=True,
            dynamic_shapes={"x": {0: batch}},
            verbose=False,
        )
    assert program is not None
    program.save(str(path))


class Graph:
    """Nodes one after the other, for models as other exporters write them."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.end = "data"

    def add(self, kind: str, *constants: NDArray[Any], inputs: tuple[str, ...] = (), **options: Any) -> str:
        names = [f"c{len(self.constants) + i}" for i in range(len(constants))]
        self.constants += [numpy_helper.from_array(c, n) for c, n in zip(constants, names, strict=True)]
        made = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, [*(inputs or (self.end,)), *names], [made], **options))
        self.end = made
        return made

    def save(self, path: Path, batch: int | str, shape: list[Any], opset: int) -> None:
        self.nodes[-1].output[0] = "fc1"
        made = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("data", TensorProto.FLOAT, [batch, 3, SIZE, SIZE])],
            [helper.make_tensor_value_info("fc1", TensorProto.FLOAT, [batch, *shape])],
            self.constants,
        )
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)])
        model.ir_version = 8
        onnx.save(model, str(path))


def f(*shape: int) -> NDArray[np.float32]:
    return (RANDOM.normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)  # type: ignore[call-overload]


def norm(channels: int) -> tuple[NDArray[np.float32], ...]:
    positive = RANDOM.uniform(0.5, 1.5, channels).astype(np.float32)
    return f(channels), f(channels), f(channels), positive


def tensorflow(path: Path) -> None:
    """Transposes around NHWC, padding apart, normalisation as arithmetic, a mean, a dense layer, unit length."""
    g = Graph()
    g.add("Transpose", perm=[0, 2, 3, 1])
    g.add("Pad", np.array([0, 0, 0, 0, 0, 1, 1, 0]))
    g.add("Transpose", perm=[0, 3, 1, 2])
    g.add("Conv", f(8, 3, 3, 3), strides=[2, 2])
    g.add("Transpose", perm=[0, 2, 3, 1])
    g.add("Mul", f(8) + 1)
    g.add("Add", f(8))
    g.add("Clip", np.float32(0), np.float32(6))
    g.add("Transpose", perm=[0, 3, 1, 2])
    g.add("Conv", f(8, 1, 3, 3), group=8, auto_pad="SAME_UPPER", strides=[2, 2])
    g.add("Transpose", perm=[0, 2, 3, 1])
    g.add("PRelu", f(1, 1, 8))
    g.add("ReduceMean", axes=[1, 2], keepdims=0)
    g.add("MatMul", f(8, 12))
    rows = g.add("Add", f(12))
    g.add("ReduceSumSquare", axes=[1], keepdims=1)
    g.add("Max", np.float32(1e-12))
    g.add("Sqrt")
    g.add("Reciprocal")
    g.add("Mul", inputs=(rows, g.end))
    g.save(path, "N", [12], 13)


def mxnet(path: Path) -> None:
    """Pixels scaled inside, BatchNormalization and PRelu left in, the embedding a 1×1 convolution: N×D×1×1."""
    g = Graph()
    g.add("Sub", np.array([0.1], np.float32))
    g.add("Mul", np.array([0.9], np.float32))
    g.add("Conv", f(8, 3, 3, 3), kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2], dilations=[1, 1])
    g.add("BatchNormalization", *norm(8), epsilon=1e-3, momentum=0.9)
    before = g.add("PRelu", f(8, 1, 1))
    g.add("Conv", f(8, 1, 3, 3), group=8, pads=[1, 1, 1, 1])
    g.add("BatchNormalization", *norm(8), epsilon=2e-5)
    g.add("Add", inputs=(before, g.end))
    g.add("Conv", f(24, 8, 1, 1))
    g.add("BatchNormalization", *norm(24))
    g.add("PRelu", f(24, 1, 1))
    g.add("Conv", f(24, 1, 16, 16), group=24)
    g.add("BatchNormalization", *norm(24))
    g.add("Dropout", ratio=0.4)
    g.add("Conv", f(12, 24, 1, 1))
    g.add("BatchNormalization", *norm(12))
    g.save(path, 1, [12, 1, 1], 9)


MAKERS = {"torch-old": torch_old, "torch-new": torch_new, "tensorflow": tensorflow, "mxnet": mxnet}


@pytest.fixture(params=[pytest.param(m, marks=[pytest.mark.slow] if m == "torch-new" else []) for m in MAKERS])
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    MAKERS[request.param](path)
    return path


def in_torch(student: Adopted, network: nn.Module, crops: NDArray[np.uint8] = CROPS) -> NDArray[np.float32]:
    with torch.no_grad():
        return unit_rows(network(torch.from_numpy(student.info.preprocess(crops))).numpy())


def test_equals_onnxruntime_and_trains(foreign: Path) -> None:
    expected = open_onnx(foreign, Preprocess.parse(STATED)).embed(CROPS)
    student = adopt(str(foreign), STATED, CROPS)
    assert student.info.space.dim == 12
    assert (
        student.width == {True: 24, False: 8}["Mul" not in {n.op_type for n in onnx.load(str(foreign)).graph.node[-1:]}]
    )
    network = student.network(12).eval()
    np.testing.assert_allclose(in_torch(student, network), expected, atol=1e-5)
    features = student.features.embed(CROPS)
    rows = unit_rows((features @ student.weight + student.bias).astype(np.float32))
    np.testing.assert_allclose(rows, expected, atol=1e-5)

    pixels = torch.from_numpy(student.info.preprocess(CROPS))
    network.restore_batch_norm(iter([pixels[:4], pixels[4:]]))
    np.testing.assert_allclose(in_torch(student, network), expected, atol=2e-5)
    if not {"BatchNormalization"} & {node.op_type for node in onnx.load(str(foreign)).graph.node}:
        with torch.no_grad():
            whole = unit_rows(network.train()(pixels).numpy())
        assert (whole * expected).sum(1).min() > 0.9, "statistics of the batch are near the running ones"

    network.eval()
    other = build_adopted(network.architecture())
    other.load_state_dict(network.state_dict())
    np.testing.assert_array_equal(in_torch(student, other.eval()), in_torch(student, network))

    network.train()(pixels).square().sum().backward()
    still = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert still == []


def test_a_student_file_keeps_the_architecture(tmp_path: Path) -> None:
    mxnet(tmp_path / "m.onnx")
    student = adopt(str(tmp_path / "m.onnx"), STATED)
    network = student.network(20).eval()
    network.set_map(RANDOM.normal(size=(24, 20)), RANDOM.normal(size=20), rank=5)
    info = describe("made", "student", weights_digest(network.state_dict()), student.info.preprocess, 20)
    save_student(tmp_path, network, "m", info, {})
    found = load_student(tmp_path)
    np.testing.assert_array_equal(found.embed(CROPS), in_torch(student, network))
    again = adopt(str(tmp_path), None, CROPS)  # a run is adopted as a file is
    assert (again.width, again.info.space.dim) == (24, 20)


def test_batch_normalisation_is_folded_again(tmp_path: Path) -> None:
    torch_old(tmp_path / "m.onnx")
    student = adopt(str(tmp_path / "m.onnx"), STATED)
    plain, restored = student.network(12).eval(), student.network(12).eval()
    restored.restore_batch_norm(iter([torch.from_numpy(student.info.preprocess(CROPS))]))
    assert len(restored.normalised) == 4
    kinds = [sorted(node.op_type for node in torch_network(n, SIZE).graph.node) for n in (plain, restored)]
    assert kinds[0] == kinds[1]
    assert "BatchNormalization" not in kinds[1]


def test_a_backbone_of_the_zoo_is_adopted_from_its_run(tmp_path: Path) -> None:
    module = build("mobilefacenet:0.125", 12, SIZE).eval()
    info = describe("zoo", "student", weights_digest(module.state_dict()), Preprocess.parse(STATED), 12)
    save_student(tmp_path, module, "mobilefacenet:0.125", info, {})
    student = adopt(str(tmp_path), None, CROPS)
    network = student.network(12)
    assert student.width == 64
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.trunk.modules()) == sum(
        isinstance(m, nn.BatchNorm2d) for m in module.modules()
    ), "its own batch normalisation is kept"


@pytest.mark.parametrize("rank", [3, None])
def test_a_last_layer_of_low_rank_is_known_again(rank: int | None, tmp_path: Path) -> None:
    torch_old(tmp_path / "mobile.onnx")
    network = adopt(str(tmp_path / "mobile.onnx"), STATED, CROPS).network(12).eval()
    network.set_map(RANDOM.normal(size=(24, 12)), RANDOM.normal(size=12), rank)
    info = describe("low", "student", weights_digest(network.state_dict()), Preprocess.parse(STATED), 12)
    save_student(tmp_path, network, "low", info, {})
    assert adopt(str(tmp_path), None, CROPS).own_rank(12) == rank


def test_a_bundle_is_adopted_as_the_network_inside_and_only_if_it_shows_it(tmp_path: Path) -> None:
    torch_old(tmp_path / "m.onnx")
    stated = ["--teacher", str(tmp_path / "m.onnx"), "--teacher-preprocess", STATED]
    assert export([*stated, "-o", str(tmp_path / "bundle")]) == 0
    student = adopt(str(tmp_path / "bundle"), None, CROPS)
    file = adopt(str(tmp_path / "m.onnx"), STATED, CROPS)
    assert (student.width, student.info.id) == (file.width, file.info.id)
    bundle = Bundle.open(tmp_path / "bundle")
    expected = open_bundle(bundle).embed(CROPS)
    np.testing.assert_allclose(in_torch(student, student.network(12).eval()), expected, atol=1e-5)

    files = {name: bundle.read(name) for name in bundle.manifest.files}
    model = onnx.load_model_from_string(files["encoder.onnx"])
    for node in model.graph.node:
        node.name = ""
    write_bundle(tmp_path / "nameless", {**files, "encoder.onnx": model.SerializeToString()}, bundle.manifest)
    with pytest.raises(InputError, match=r"was not made by pkd-export\. Give the model that it was made from"):
        adopt(str(tmp_path / "nameless"), None)


@pytest.mark.filterwarnings("ignore")  # insightface's own
def test_the_recogniser_of_an_insightface_pack_is_adopted(tmp_path: Path) -> None:
    pytest.importorskip("insightface", reason="insightface is not installed")
    torch.manual_seed(4)
    layers = [nn.Conv2d(3, 8, 7, 8), nn.PReLU(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, 12)]
    pixels = torch.zeros(1, 3, 112, 112)
    torch.onnx.export(nn.Sequential(*layers).eval(), (pixels,), tmp_path / "w600k.onnx", dynamo=False, opset_version=13)
    crops = RANDOM.integers(0, 256, (3, 112, 112, 3), np.uint8)
    student = adopt(f"insightface:{tmp_path}", None, crops)
    assert (student.width, student.info.space.dim, student.info.preprocess.size) == (8, 12, 112)
    expected = open_encoder(f"insightface:{tmp_path}").embed(crops)
    np.testing.assert_allclose(in_torch(student, student.network(12).eval(), crops), expected, atol=1e-5)


@pytest.mark.parametrize("spec", ["mobilefacenet:0.125", "mobilefacenet-relu:0.35", "repvit:0.5"])
def test_a_state_dict_of_the_zoo_is_recognised(spec: str, tmp_path: Path) -> None:
    module = build(spec, 12, SIZE).eval()
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in module.state_dict().items()}}, tmp_path / "w.pt"
    )
    student = adopt(str(tmp_path / "w.pt"), STATED, CROPS)
    np.testing.assert_allclose(in_torch(student, student.network(12).eval()), in_torch(student, module), atol=2e-5)


def test_pixels_in_the_other_layout(tmp_path: Path) -> None:
    mxnet(tmp_path / "m.onnx")
    model = onnx.load(str(tmp_path / "m.onnx"))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("nhwc", TensorProto.FLOAT, [1, SIZE, SIZE, 3]))
    model.graph.node.insert(0, helper.make_node("Transpose", ["nhwc"], ["data"], perm=[0, 3, 1, 2]))
    onnx.save(model, str(tmp_path / "n.onnx"))
    student = adopt(str(tmp_path / "n.onnx"), f"mean=127.5,127.5,120,std=128,size={SIZE},template=none", CROPS)
    expected = open_onnx(tmp_path / "n.onnx", student.info.preprocess).embed(CROPS)
    np.testing.assert_allclose(in_torch(student, student.network(12).eval()), expected, atol=1e-5)


def test_refused_by_name(tmp_path: Path) -> None:
    g = Graph()
    g.add("Flatten")
    g.add("CumSum", np.array(1))
    g.save(tmp_path / "m.onnx", "N", [3 * SIZE * SIZE], 13)
    with pytest.raises(InputError, match="pkd does not translate CumSum of this graph"):
        adopt(str(tmp_path / "m.onnx"), STATED)
    g = Graph()
    g.add("QuantizeLinear", np.float32(0.1), np.uint8(0))
    g.add("DequantizeLinear", np.float32(0.1), np.uint8(0))
    g.add("GlobalAveragePool")
    g.save(tmp_path / "q.onnx", "N", [3, 1, 1], 13)
    with pytest.raises(InputError, match=r"is quantised \(INT8\)\. Give the float32 file"):
        adopt(str(tmp_path / "q.onnx"), STATED)
    g = Graph()
    g.add("Cast", to=TensorProto.FLOAT16)
    g.add("Mul", np.array([2], np.float16))
    g.add("Cast", to=TensorProto.FLOAT)
    g.add("GlobalAveragePool")
    g.save(tmp_path / "h.onnx", "N", [3, 1, 1], 13)
    with pytest.raises(InputError, match=r"float16\. Give the float32 file"):
        adopt(str(tmp_path / "h.onnx"), STATED)
    with pytest.raises(InputError, match="--student-preprocess"):
        adopt(str(tmp_path / "m.onnx"))


@pytest.mark.shared
@pytest.mark.skipif(not HAS_SHARED, reason=NO_SHARED)
@pytest.mark.parametrize(
    ("name", "stated"),
    [("teacher_mobilefacenet_y1_128", "mean=0,std=1"), ("mobile_foamliu_128", "mean=127.5,std=127.5")],
)
def test_real_models(name: str, stated: str) -> None:
    from pkd.toolkit.data.face_set import FaceSet

    crops = FaceSet.read(SHARED / "faces/splits/val.txt").load(range(12), 112)
    student = adopt(str(SHARED / f"models/{name}.onnx"), stated, crops)
    assert (student.width, student.info.space.dim) == (512, 128)
