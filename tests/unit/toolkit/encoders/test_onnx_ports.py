"""Encoders of other projects: layouts, types, outputs and scalings as they are found, in pkd and after export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.utils import extract_model

from pkd.export.checks.parity import BATCHES, measure, onnx_runner, synthetic_crops
from pkd.export.graph.build import float_graph, onnx_network, precision_of, serialise, uint8_graph
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import open_onnx
from tests.support.bundle_factory import DIM, network, teacher_file

CROPS = synthetic_crops(max(BATCHES), 112)
PLAIN = Preprocess(mean=0, std=1)


def save(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, str(folder / "t.onnx"))
    return folder / "t.onnx"


def with_input(kind: int, shape: list[int | str], *before: tuple[str, dict[str, Any]]) -> onnx.ModelProto:
    """Make the tiny network take another input, which the nodes ``before`` bring to its own."""
    model = network()
    names = ["outer", *(f"step{i}" for i in range(len(before) - 1)), "input"]
    nodes = [
        helper.make_node(operator, [names[i]], [names[i + 1]], **options)
        for i, (operator, options) in enumerate(before)
    ]
    kept = list(model.graph.node)
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend([*nodes, *kept])
    model.graph.input.append(helper.make_tensor_value_info("outer", kind, shape))
    return model


def with_output(operator: str, kind: int, shape: list[int | str], **options: Any) -> onnx.ModelProto:
    model = network()
    model.graph.node.append(helper.make_node(operator, ["embedding"], ["outer"], **options))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("outer", kind, shape))
    return model


def convolved() -> onnx.ModelProto:
    """End in a convolution over the whole map: N×D×1×1."""
    model = network()
    matrix = next(t for t in model.graph.initializer if t.name == "matrix")
    matrix.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(matrix).reshape(DIM, 8, 7, 7), "matrix"))
    model.graph.node[-1].CopyFrom(helper.make_node("Conv", ["active", "matrix"], ["embedding"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", DIM, 1, 1]))
    return model


def halved() -> onnx.ModelProto:
    model = network()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


def unsqueezed(model: onnx.ModelProto, *axes: int) -> onnx.ModelProto:
    """Give its Unsqueeze these axes."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), "new_axes"))
    next(node for node in model.graph.node if node.op_type == "Unsqueeze").input.append("new_axes")
    return model


NHWC = ("Transpose", {"perm": [0, 3, 1, 2]})
FLOAT = ("Cast", {"to": TensorProto.FLOAT})
UNLIKE = {
    "NHWC": (with_input(TensorProto.FLOAT, ["unk", 112, 112, 3], NHWC), Preprocess()),
    "bytes": (with_input(TensorProto.UINT8, ["n", 3, 112, 112], FLOAT), PLAIN),
    "bytes NHWC, BGR": (
        with_input(TensorProto.UINT8, ["n", 112, 112, 3], FLOAT, NHWC),
        Preprocess(channels="bgr", mean=0, std=1),
    ),
    "float16 output": (with_output("Cast", TensorProto.FLOAT16, ["n", DIM], to=TensorProto.FLOAT16), Preprocess()),
    "N×D×1×1": (convolved(), Preprocess()),
    "N×1×1×D": (unsqueezed(with_output("Unsqueeze", TensorProto.FLOAT, ["n", 1, 1, DIM]), 1, 2), Preprocess()),
    "float64 at both ends": (with_input(TensorProto.DOUBLE, ["n", 3, 112, 112], FLOAT), Preprocess()),
    "float64 output": (with_output("Cast", TensorProto.DOUBLE, ["n", DIM], to=TensorProto.DOUBLE), Preprocess()),
    "NHWC, said nowhere": (with_input(TensorProto.FLOAT, ["n", "h", "w", "c"], NHWC), Preprocess()),
    "mean per channel": (network(), Preprocess(channels="bgr", mean=(91.5, 103.9, 131.1), std=(57, 58, 59))),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_other_ends_compute_the_same_network_opened_and_exported(name: str, tmp_path: Path) -> None:
    model, preprocess = UNLIKE[name]
    plain = open_onnx(teacher_file(tmp_path / "plain.onnx"), preprocess).embed(CROPS)
    source = open_onnx(save(model, tmp_path), preprocess)
    assert source.path is not None
    limit = 2e-3 if "float16" in name else 2e-6
    np.testing.assert_allclose(source.embed(CROPS), plain, atol=limit)
    exported = onnx_network(source.path, source.ports)
    graph = uint8_graph(exported, preprocess, DIM)
    onnx.checker.check_model(graph, full_check=True)
    rows = measure(name, source.embed(CROPS), CROPS, onnx_runner(serialise(graph), lambda crops: crops, name))
    floats = onnx_runner(
        serialise(float_graph(exported, preprocess, DIM)),
        lambda crops: ((crops.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2),
        name,
    )
    rows += measure(f"{name}, float", source.embed(CROPS), CROPS, floats)
    assert all(row.passed for row in rows), rows


def test_a_network_in_float16_is_exported_as_it_computes(tmp_path: Path) -> None:
    source = open_onnx(save(halved(), tmp_path), Preprocess())
    assert source.path is not None
    graph = uint8_graph(onnx_network(source.path, source.ports), Preprocess(), DIM)
    assert precision_of(graph) == "fp16"
    embed = onnx_runner(serialise(graph), lambda crops: crops, "half")
    rows = measure("half", source.embed(CROPS), CROPS, embed, precision_of(graph))
    assert all(row.passed for row in rows), rows


@pytest.mark.parametrize(("batch", "name"), [(1, "one"), (4, "four")])
def test_a_fixed_batch_of_other_ends_is_freed(batch: int, name: str, tmp_path: Path) -> None:
    model = with_input(TensorProto.FLOAT, [batch, 112, 112, 3], NHWC)
    source = open_onnx(save(model, tmp_path), Preprocess(), name=name)
    assert source.path is not None
    graph = serialise(uint8_graph(onnx_network(source.path, source.ports), Preprocess(), DIM))
    assert all(
        row.passed for row in measure(name, source.embed(CROPS), CROPS, onnx_runner(graph, lambda crops: crops, name))
    )


def two_outputs(other: str, kind: str, shape: list[int | str], **options: Any) -> onnx.ModelProto:
    model = network()
    model.graph.node.append(helper.make_node(kind, ["embedding"], [other], **options))
    outputs = [onnx.ValueInfoProto.FromString(model.graph.output[0].SerializeToString())]
    del model.graph.output[:]
    model.graph.output.extend([helper.make_tensor_value_info(other, TensorProto.FLOAT, shape), *outputs])
    return model


def test_a_norm_before_the_embedding_is_not_taken_for_it(tmp_path: Path) -> None:
    model = two_outputs("norm", "ReduceSum", ["n", 1], keepdims=1)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
    model.graph.node[-1].input.append("axes")
    source = open_onnx(save(model, tmp_path), Preprocess())
    assert source.info.space.dim == DIM and source.path is not None
    assert [v.name for v in onnx_network(source.path, source.ports).graph.output] == ["embedding"]


def test_what_could_be_two_embeddings_is_asked_about_and_the_remedy_works(tmp_path: Path) -> None:
    path = save(two_outputs("unit", "Relu", ["n", DIM]), tmp_path)
    with pytest.raises(
        InputError, match=r"several of its outputs could be the embedding: unit .* embedding .*extract_m"
    ):
        open_onnx(path, Preprocess())
    extract_model(str(path), str(tmp_path / "one.onnx"), ["input"], ["embedding"])
    assert open_onnx(tmp_path / "one.onnx", Preprocess()).info.space.dim == DIM


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (with_input(TensorProto.UINT8, ["n", 3, 112, 112], FLOAT), "State mean=0,std=1 with the preprocessing"),
        (with_input(TensorProto.INT32, ["n", 3, 112, 112], FLOAT), "input is int32 n×3×112×112; pkd feeds float32"),
        (unsqueezed(with_input(TensorProto.FLOAT, [3, 112, 112], ("Unsqueeze", {})), 0), "with a batch dimension"),
        (with_output("Cast", TensorProto.BFLOAT16, ["n", DIM], to=TensorProto.BFLOAT16), r"bfloat16.*Cast its embed"),
        (network(size=160), r"n×3×160×160, expected N×3×112×112 or N×112×112×3. .*size=160"),
        (with_input(TensorProto.FLOAT, ["n", 112, 96, 3], NHWC), "n×112×96×3, .* pkd's crops are square"),
        (with_input(TensorProto.FLOAT, ["n", 1, 112, 112], ("Identity", {})), "crops have three channels"),
        (with_output("ReduceMean", TensorProto.FLOAT, ["n", 1], axes=[1]), "gives outer float32 1×1; an embedding is"),
    ],
)
def test_what_is_refused_is_named_as_it_is(model: onnx.ModelProto, said: str, tmp_path: Path) -> None:
    if "ReduceMean" in {node.op_type for node in model.graph.node}:
        model.opset_import[0].version = 17  # where the axes are an attribute
    if model.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 1:
        kernel = next(t for t in model.graph.initializer if t.name == "kernel")
        kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel)[:, :1], "kernel"))
    with pytest.raises(InputError, match=said):
        open_onnx(save(model, tmp_path), Preprocess())


@pytest.mark.parametrize(
    ("spec", "mean", "std"),
    [
        ("mean=1,2,3,std=4", (1.0, 2.0, 3.0), 4.0),
        ("channels=bgr, mean=1, std=4,5,6", 1.0, (4.0, 5.0, 6.0)),
        ("mean=127.5,std=128", 127.5, 128.0),
    ],
)
def test_scaling_is_one_number_or_one_per_channel(spec: str, mean: object, std: object) -> None:
    read = Preprocess.parse(spec)
    assert (read.mean, read.std) == (mean, std)


@pytest.mark.parametrize("spec", ["mean=1,2,std=1", "mean=x,y,z,std=1", "std=1,0,1", "mean=1,,2,std=1"])
def test_what_is_no_scaling_is_refused_in_words(spec: str) -> None:
    with pytest.raises(InputError, match=r"(mean|std): .*one number, or three: one per channel"):
        Preprocess.parse(spec)


def test_one_number_keeps_its_digest() -> None:
    assert Preprocess().digest() == "7504c76373cb80b61bf6a05673fe09612c6ab99e37174fa27dfafadfec66c7b5"


def in_training_mode(operator: str) -> onnx.ModelProto:
    """Add what a graph has that was exported without eval(): batch statistics, or features dropped by chance."""
    if operator == "Dropout":
        model = with_output(operator, TensorProto.FLOAT, ["n", DIM])
        model.graph.node[-1].input.extend(["half", "on"])
        more = [("half", np.array(0.5, np.float32)), ("on", np.array(True))]
    elif operator == "CumSum":  # the first of a batch is untouched
        model = with_output(operator, TensorProto.FLOAT, ["n", DIM])
        model.graph.node[-1].input.append("axis")
        more = [("axis", np.array(0))]
    else:
        model = with_output(operator, TensorProto.FLOAT, ["n", DIM], training_mode=1)
        model.graph.node[-1].input.extend(["one", "zero", "zero", "one"])
        model.graph.node[-1].output.extend(["mean", "variance"])
        more = [("one", np.ones(DIM, np.float32)), ("zero", np.zeros(DIM, np.float32))]
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in more)
    return model


@pytest.mark.parametrize("operator", ["BatchNormalization", "Dropout", "CumSum"])
def test_a_network_in_training_mode_is_refused(tmp_path: Path, operator: str) -> None:
    with pytest.raises(InputError, match=r"depends on the others in its batch.*model\.eval\(\)"):
        open_onnx(save(in_training_mode(operator), tmp_path), PLAIN)


def test_a_network_that_ignores_its_pixels_is_refused(tmp_path: Path) -> None:
    model = with_output("Mul", TensorProto.FLOAT, ["n", DIM])
    model.graph.node[-1].input.append("nothing")
    model.graph.node.append(helper.make_node("Add", ["scaled", "constant"], ["outer"]))
    model.graph.node[-2].output[0] = "scaled"
    for name, values in (("nothing", np.zeros(DIM, np.float32)), ("constant", np.ones(DIM, np.float32))):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    with pytest.raises(InputError, match=f"gives the same {DIM} numbers for every crop"):
        open_onnx(save(model, tmp_path), PLAIN)
