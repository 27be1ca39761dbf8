"""One test per attack that a graph in a bundle can be. Each is refused, and the file at fault is named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from pkd.toolkit.bundle import onnx_check
from pkd.toolkit.bundle.bundle import Bundle, write_bundle
from pkd.toolkit.bundle.onnx_check import check_onnx
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.errors import BundleError
from pkd.toolkit.encoders.base import make_session
from tests.support.bundle_attack import failed, refused
from tests.support.bundle_factory import bundle, content, replace_file


def graph(*nodes: onnx.NodeProto, tensors: tuple[TensorProto, ...] = ()) -> onnx.ModelProto:
    """Make a graph that looks like a bundle's from outside; ``nodes`` make a scalar ``extra`` that is added."""
    return helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Cast", ["crops"], ["floats"], to=TensorProto.FLOAT),
                helper.make_node("ReduceMean", ["floats", "axes"], ["mean"], keepdims=0),
                helper.make_node("Concat", ["mean"] * 6, ["wide"], axis=1),
                helper.make_node("Slice", ["wide", "from", "to", "axis"], ["narrow"]),
                *nodes,
                helper.make_node("Add", ["narrow", "extra"], ["embedding"]),
            ],
            "attack",
            [helper.make_tensor_value_info("crops", TensorProto.UINT8, ["n", 112, 112, 3])],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 16])],
            [integers("axes", 1, 2), integers("from", 0), integers("to", 16), integers("axis", 1), *tensors],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )


def integers(name: str, *values: int) -> TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def declared(*dims: int, name: str = "big", raw: bytes = b"") -> TensorProto:
    return TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, raw_data=raw)


def outside(location: str) -> TensorProto:
    tensor = TensorProto(name="big", data_type=TensorProto.UINT8, dims=[10], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("length", "10")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def summed() -> tuple[onnx.NodeProto, ...]:
    return (
        helper.make_node("Cast", ["big"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["cast"], ["extra"], keepdims=0),
    )


def in_a_branch(tensor: TensorProto) -> onnx.ModelProto:
    tensor.name = "value"
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["out"], value=tensor)],
        "branch",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    return graph(helper.make_node("If", ["yes"], ["extra"], then_branch=branch, else_branch=branch), tensors=(yes,))


def in_a_function(tensor: TensorProto) -> onnx.ModelProto:
    model = graph(helper.make_node("F", [], ["extra"], domain="d"))
    node = helper.make_node("Constant", [], ["out"], value=tensor)
    model.functions.append(helper.make_function("d", "F", [], ["out"], [node], [helper.make_opsetid("", 18)]))
    model.opset_import.append(helper.make_opsetid("d", 1))
    return model


def sparse() -> onnx.ModelProto:
    model = graph(*summed())
    values = helper.make_tensor("big", TensorProto.FLOAT, [1], [1.0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, integers("", 0), [10**6, 10**5]))
    return model


def twice() -> bytes:
    """One attribute of two tensors: protobuf merges them, so their shapes follow one another."""
    half = declared(1000, raw=bytes(4000)).SerializeToString()
    attribute = helper.make_attribute("value", declared(1000, raw=bytes(4000)))
    merged = attribute.SerializeToString() + b"\x2a" + varint(len(half)) + half
    again = onnx.AttributeProto.FromString(merged)
    assert list(again.t.dims) == [1000, 1000]
    node = helper.make_node("Constant", [], ["extra"]).SerializeToString()
    node += b"\x2a" + varint(len(merged)) + merged
    inner = b"\x0a" + varint(len(node)) + node
    return b"\x3a" + varint(len(inner)) + inner


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def nested(depth: int) -> bytes:
    """Attributes in nodes in graphs in attributes."""
    data = b""
    for _ in range(depth):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # attribute.g, node.attribute, graph.node
            data = tag + varint(len(data)) + data
    return b"\x3a" + varint(len(data)) + data


LIES: dict[str, tuple[Callable[[], onnx.ModelProto | bytes], str]] = {
    "no data": (lambda: graph(*summed(), tensors=(declared(10**6, 10**6),)), "'big' declares more elements"),
    "little data": (lambda: graph(*summed(), tensors=(declared(10**12, raw=b"1234"),)), "'big' declares more"),
    "overflow": (lambda: graph(*summed(), tensors=(declared(2**40, 2**40),)), "'big' declares more"),
    "negative": (lambda: graph(*summed(), tensors=(declared(-1),)), "'big' declares more"),
    "in a branch": (lambda: in_a_branch(declared(10**12)), "'value' declares more"),
    "in a function": (lambda: in_a_function(declared(10**12)), "'big' declares more"),
    "merged": (twice, "one attribute two tensors"),
    "sparse": (sparse, "sparse tensor"),
    "absolute": (lambda: graph(*summed(), tensors=(outside("/etc/passwd"),)), "'big' in another file"),
    "upwards": (lambda: graph(*summed(), tensors=(outside("../x"),)), "'big' in another file"),
    "beside": (lambda: graph(*summed(), tensors=(outside("secret"),)), "'big' in another file"),
    "outside in a branch": (lambda: in_a_branch(outside("secret")), "'value' in another file"),
    "deep": (lambda: nested(1000), "nests graphs"),
    "cut": (lambda: graph(*summed()).SerializeToString()[:-3], "ends too early"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_graph_that_lies_about_its_tensors_is_refused_unloaded(tmp_path: Path, name: str) -> None:
    make, said = LIES[name]
    made = make()
    path = bundle(tmp_path).path
    data = made if isinstance(made, bytes) else made.SerializeToString()
    replace_file(path, "encoder.onnx", data)
    refused(path, rf"bundle/encoder\.onnx: .*{said}")
    replace_file(path, "encoder.onnx", content()[0]["encoder.onnx"])
    Bundle.open(path)
    (path / "targets").mkdir()
    replace_file(path, "targets/onnxruntime-int8/graph.onnx", data)
    refused(path, rf"targets/onnxruntime-int8/graph\.onnx: .*{said}")


def test_every_way_to_a_tensor_is_known() -> None:
    """The table of field numbers, against the definition that onnx carries."""
    kinds = {"TensorProto": "tensor", "SparseTensorProto": "sparse"}
    for name in ("Model", "TrainingInfo", "Function", "Graph", "Node", "Attribute"):
        kinds[f"{name}Proto"] = name.lower().removesuffix("info")
    ways = {
        kinds[name]: {
            field.number: kinds[field.message_type.name]
            for field in getattr(onnx, name).DESCRIPTOR.fields
            if field.message_type is not None and field.message_type.name in kinds
        }
        for name in kinds
        if name not in ("TensorProto", "SparseTensorProto")
    }
    assert ways == onnx_check.INSIDE
    numbers = {field.name: field.number for field in TensorProto.DESCRIPTOR.fields}
    assert numbers["data_type"] == onnx_check.TENSOR_TYPE and numbers["name"] == onnx_check.TENSOR_NAME
    assert numbers["external_data"] == onnx_check.TENSOR_EXTERNAL and numbers["dims"] == onnx_check.TENSOR_DIMS
    assert numbers["data_location"] == onnx_check.TENSOR_LOCATION
    assert {number for name, number in numbers.items() if name.endswith("_data")} == (
        onnx_check.TENSOR_NUMBERS | {onnx_check.TENSOR_EXTERNAL}
    )
    kinds_of_numbers = dict(TensorProto.DataType.items())
    for name, share in {"UINT4": 2, "INT4": 2, "FLOAT4E2M1": 2, "UINT2": 4, "INT2": 4}.items():
        assert name not in kinds_of_numbers or onnx_check.PACKED[kinds_of_numbers[name]] == share


def test_a_tag_of_which_parsers_drop_the_upper_bits_hides_nothing() -> None:
    data = graph(*summed(), tensors=(outside("secret"),)).SerializeToString()
    tag = data.index(b"\x3a")  # model.graph
    hidden = data[:tag] + b"\xba\x80\x80\x80\x10" + data[tag + 1 :]
    with pytest.raises(BundleError, match=r"x\.onnx: is no ONNX file"):
        check_onnx(hidden, "x.onnx")


def test_onnxruntime_would_read_a_file_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why references to other files are refused here: the case above is a real one."""
    monkeypatch.chdir(tmp_path)
    Path("secret").write_bytes(b"0123456789")
    session = make_session(graph(*summed(), tensors=(outside("secret"),)).SerializeToString(), 1)
    (row,) = session.run(None, {"crops": np.zeros((1, 112, 112, 3), np.uint8)})[0]
    assert row[0] == sum(b"0123456789")


def test_more_parts_than_any_encoder_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_check, "MAX_PARTS", 1000)
    with pytest.raises(BundleError, match=r"x\.onnx: has more than 1,000 parts"):
        check_onnx(b"\x08\x08" * 1001, "x.onnx")
    with pytest.raises(BundleError, match=r"x\.onnx: has more than 1,000 parts"):
        packed = TensorProto(dims=[1] * 2000).SerializeToString()
        inner = b"\x2a" + varint(len(packed)) + packed
        check_onnx(b"\x3a" + varint(len(inner)) + inner, "x.onnx")


@given(data=st.binary(max_size=300), cut=st.integers(0, 3000))
@settings(max_examples=150)
def test_any_bytes_are_judged_without_a_stumble(data: bytes, cut: int) -> None:
    real = content()[0]["encoder.onnx"]
    for made in (data, real[:cut] + data, real[:cut] + data + real[cut:]):
        try:
            check_onnx(made, "x.onnx")
        except BundleError as error:
            assert str(error).startswith("x.onnx: ")


SWELLS = """
import resource, sys
from pathlib import Path
from pkd.toolkit.cli.verification import verify
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
(failure,) = verify(Path(sys.argv[1]), None).failures
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss counts the parent's
print(failure.file, failure.detail, int(peak.split()[1]) >> 10)
"""


def test_a_graph_that_swells_when_it_runs_is_stopped(tmp_path: Path) -> None:
    """Eight gigabytes of zeros, made of nothing. In a process of its own, in case it is not."""
    nodes = (helper.make_node("ConstantOfShape", ["shape"], ["big"]), *summed())
    data = graph(*nodes, tensors=(integers("shape", 2 << 30),)).SerializeToString()
    path = bundle(tmp_path).path
    replace_file(path, "encoder.onnx", data)
    done = subprocess.run([sys.executable, "-c", SWELLS, str(path)], capture_output=True, text=True, check=True)
    file, *_, megabytes = done.stdout.split()
    assert file == "encoder.onnx" and "does not run on its golden crops" in done.stdout, done.stdout
    assert int(megabytes) < 1000


OPENVINO = """<?xml version="1.0"?><net name="m" version="11"><layers>
<layer id="0" name="c" type="Const" version="opset1">
<data element_type="f32" shape="1000000,1000000" offset="0" size="4000000000000"/>
<output><port id="0" precision="FP32"><dim>1000000</dim><dim>1000000</dim></port></output></layer>
<layer id="1" name="r" type="Result" version="opset1">
<input><port id="0" precision="FP32"><dim>1000000</dim><dim>1000000</dim></port></input></layer>
</layers><edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/></edges></net>"""


@pytest.mark.parametrize("text", [OPENVINO, "<net", ""])
def test_an_openvino_model_that_lies_is_a_failed_check(tmp_path: Path, text: str) -> None:
    pytest.importorskip("openvino")
    files, manifest = content()
    folder = "targets/openvino-fp32"
    target = Target(
        runtime="openvino",
        precision="fp32",
        encoder=manifest.encoder,
        graph="encoder.onnx",
        file=f"{folder}/encoder.xml",
        golden_tolerance=1e-5,
        checked_with="x",
        made_with="x",
    )
    more = {f"{folder}/encoder.xml": text.encode(), f"{folder}/encoder.bin": bytes(16)}
    made = write_bundle(tmp_path / "b", {**files, **more}, manifest.model_copy(update={"targets": (target,)}))
    (failure,) = failed(made.path)
    assert failure.file == folder and "encoder.xml: openvino cannot load it" in failure.detail
