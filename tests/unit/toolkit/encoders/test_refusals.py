"""Every refusal of a model, as a set: one sentence or two of our own that name what is there, and a remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pkd.toolkit.core.errors import PkdError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import open_onnx
from tests.support.bundle_factory import DIM, network

FOREIGN = re.compile(
    r"::|\.(cc|cpp|h|hpp|cu|py):\d|Traceback|File \"|pydantic|Input should|onnxruntime_pybind|\x1b|0x[0-9a-f]{4}|"
    r"<class|https?://|Status Message|\n"
)
"""Marks of another library's text: C++ and Python places, pydantic's words, codes of terminals and pointers."""
REMEDY = re.compile(r"\b(Give|State|Export|Keep|Put|Call|Cast|Flatten|Check|Convert|Install|Save)\b")


def changed(change: Callable[[onnx.ModelProto], object], **options: int) -> bytes:
    model = network(**options)  # type: ignore[arg-type]
    change(model)
    return bytes(model.SerializeToString())


def reshaped(shape: list[int | str], kind: int = TensorProto.FLOAT) -> bytes:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("input", kind, shape))

    return changed(change)


def one_node(
    operator: str, shape: list[int | str], out: list[int | str], kind: int = TensorProto.FLOAT, **more: Any
) -> bytes:
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"], **more)],
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, out)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())


def opset(version: int) -> bytes:
    return changed(lambda model: model.opset_import[0].__setattr__("version", version))


def foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = "ParametricMagic"


def more_outputs(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Abs", ["embedding"], ["other"]))
    model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["n", DIM]))


def more_inputs(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, [1]))


def constant(model: onnx.ModelProto) -> None:
    matrix = next(t for t in model.graph.initializer if t.name == "matrix")
    matrix.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(matrix)), "matrix"))
    bias = next(t for t in model.graph.initializer if t.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(np.ones(DIM, np.float32), "bias"))


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")


N: list[int | str] = ["n"]
WHOLE = network().SerializeToString()
REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no whole ONNX file"),
    "a text": (b"<html>not found</html>", "no whole ONNX file"),
    "cut off": (WHOLE[: len(WHOLE) // 2], "no whole ONNX file"),
    "an operator of nobody's": (changed(foreign_operator), "ParametricMagic"),
    "an opset of the future": (opset(99), "99"),
    "two inputs": (changed(more_inputs), "2 inputs"),
    "two outputs": (changed(more_outputs), r"embedding float32 1×16, other float32 1×16"),
    "int64 pixels": (one_node("Identity", ["n", 3, 112, 112], ["n", 3, 112, 112], TensorProto.INT64), "int64"),
    "bytes that are scaled": (one_node("Identity", ["n", 3, 112, 112], ["n", 3, 112, 112], TensorProto.UINT8), "uint8"),
    "no image": (one_node("Identity", ["n", 512], ["n", 512]), "n×512"),
    "another size": (one_node("Identity", ["n", 3, 160, 160], ["n", 3, 160, 160]), r"n×3×160×160.*size=160"),
    "no square": (one_node("Identity", ["n", 3, 112, 96], ["n", 3, 112, 96]), "n×3×112×96"),
    "grey": (one_node("Identity", ["n", 1, 112, 112], ["n", 1, 112, 112]), "n×1×112×112"),
    "maps": (one_node("Identity", ["n", 3, 112, 112], ["n", 3, 112, 112]), "1×3×112×112"),
    "one row for all": (one_node("Flatten", ["n", 3, 112, 112], [1, "d"], axis=0), "1 rows for 4 crops"),
    "weights elsewhere": (changed(external), "another file"),
    "the same for all": (changed(constant), "same 16 numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_what_is_there_and_what_to_do(name: str, tmp_path: Path) -> None:
    data, said = REFUSED[name]
    path = tmp_path / "t.onnx"
    path.write_bytes(data)
    with pytest.raises(PkdError) as caught:
        open_onnx(path, Preprocess())
    message = str(caught.value).removeprefix(str(path))
    assert re.search(said, message), message
    assert not FOREIGN.search(message), message
    assert REMEDY.search(message), message
    assert message.endswith((".", ")", '"')) and len(message) < 450, message
