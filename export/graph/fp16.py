"""Make fp16 graphs: weights and activations in half precision; pixels in and unit rows out as in fp32.

onnxruntime's own converter leaves graphs that begin with a Cast unsorted, and casts once for every blocked operator.
Our graphs have one entry and one exit, so two casts are enough.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pkd.export.graph.build import ENTRY, UNIT
from pkd.toolkit.core.errors import InputError

LARGEST = float(np.finfo(np.float16).max)
SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
ALWAYS_FLOAT = {"Resize": (1, 2)}
"""Inputs that the operator set allows in float32 only."""


def to_half(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a ``uint8_graph`` or ``float_graph`` that computes the network in float16.

    Preprocessing stays in float32, and so does the division by the length: a sum of 512 squares leaves float16's range
    (65,504) from features of 12 on. Raises InputError for a network that cannot be typed so.
    """
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    body = made.graph
    ours = [node for node in body.node if node.name.startswith("pkd/")]
    entry = next(node for node in ours if node.name == ENTRY)
    features = next(node for node in ours if node.name == UNIT).input[0]
    inner = [node for node in body.node if not node.name.startswith("pkd/")]
    kept = {node.input[i] for node in inner for i in ALWAYS_FLOAT.get(node.op_type, ()) if i < len(node.input)}
    kept |= {name for node in ours for name in node.input}

    entry.CopyFrom(helper.make_node("Cast", entry.input, entry.output, name=entry.name, to=TensorProto.FLOAT16))
    for tensor in body.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in kept:
            _halve(tensor)
    for node in inner:
        _halve_attributes(node, kept)
        for i, name in enumerate(node.output):
            if name == features:
                node.output[i] = f"{features}/half"
        for i, name in enumerate(node.input):
            if name == features:
                node.input[i] = f"{features}/half"
    place = 1 + max(i for i, node in enumerate(body.node) if f"{features}/half" in node.output)
    out = helper.make_node("Cast", [f"{features}/half"], [features], name="pkd/float", to=TensorProto.FLOAT)
    body.node.insert(place, out)
    del body.value_info[:]
    try:
        onnx.checker.check_model(made, full_check=True)
    except Exception as error:  # onnx's checkers share no public base class
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(f"--precision fp16: the network cannot be typed in float16: {reason}. Use fp32.") from None
    return made


def _halve(tensor: onnx.TensorProto) -> None:
    values = numpy_helper.to_array(tensor)
    if np.abs(values[np.isfinite(values)]).max(initial=0) > LARGEST:
        raise InputError(f"--precision fp16: {tensor.name} holds values over {LARGEST:,.0f}. Use fp32.")
    tiny = (values != 0) & (np.abs(values) < SMALLEST)  # an epsilon rounded to zero would divide by it
    halved = np.where(tiny, np.copysign(SMALLEST, values), values).astype(np.float16)
    tensor.CopyFrom(numpy_helper.from_array(halved, tensor.name))


def _halve_attributes(node: onnx.NodeProto, kept: set[str]) -> None:
    """Turn float32 into float16 in the node's constants, and in the types that it states."""
    for attribute in node.attribute:
        if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            raise InputError(f"--precision fp16: {node.op_type} has branches of its own. Use fp32.")
        if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        stored = attribute.t if attribute.type == onnx.AttributeProto.TENSOR else None
        if stored is not None and stored.data_type == TensorProto.FLOAT and not kept & set(node.output):
            _halve(stored)
