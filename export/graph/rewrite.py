"""Rewrite graphs without changing their numbers, so that a runtime computes them faster or quantises them well.

``fold_batch_norm`` is for every graph. PRelu costs onnxruntime and OpenVINO more than four plain operators:
``decompose_prelu`` gives those that are fastest, ``split_prelu`` those that are smallest beside INT8 weights. TensorRT
and XNNPACK have one fused operation for PRelu, so there it stays.

The rewrites are pkd's own: the passes of onnxscript or onnxoptimizer would be one more dependency.
tests/unit/export/graph/test_rewrite.py holds what is folded, and that results stay.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

BRANCHES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
Doubles = NDArray[np.float64]
PASSES = {"Flatten", "Reshape", "Identity", "Dropout"}
"""Operators between a batch normalisation and a linear layer that only change the shape."""


def fold_batch_norm(network: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of ``network`` with every batch normalisation folded into the linear operator beside it.

    Folded: after Conv, Gemm and MatMul, and before Gemm, MatMul and unpadded Conv (through a flattening). What remains
    stands before a padded convolution (pre-activation networks, as IResNet): its shift is not the padding's zero.
    Computed in float64, rounded once.
    """
    graph = _Graph(network)
    for node in graph.of("BatchNormalization"):
        affine = _affine(graph, node)
        if affine is not None and not _fold_back(graph, node, *affine):
            _fold_forward(graph, node, *affine)
    return graph.finished()


def decompose_prelu(network: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of ``network`` where PRelu with a constant slope a is a·x + (1 − a)·ReLU(x).

    The two agree to a rounding of the last bit: for x ≥ 0 the sum is a·x + (1 − a)·x instead of x.
    """

    def parts(graph: _Graph, name: str, x: str, slope: NDArray[np.generic], out: str) -> list[onnx.NodeProto]:
        a, b = graph.add(f"{name}/slope", slope), graph.add(f"{name}/rest", 1 - slope)
        return [
            helper.make_node("Relu", [x], [f"{name}/relu"], name=f"{name}/Relu"),
            helper.make_node("Mul", [f"{name}/relu", b], [f"{name}/above"], name=f"{name}/Above"),
            helper.make_node("Mul", [x, a], [f"{name}/line"], name=f"{name}/Line"),
            helper.make_node("Add", [f"{name}/line", f"{name}/above"], [out], name=f"{name}/Add"),
        ]

    return _without_prelu(network, parts)


def split_prelu(network: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of ``network`` where PRelu with a constant slope a is ReLU(x) + a·min(x, 0), to the last bit.

    One constant a channel instead of two, which an INT8 file notices. For a graph that is quantised already: its sum is
    not to be rounded.
    """

    def parts(graph: _Graph, name: str, x: str, slope: NDArray[np.generic], out: str) -> list[onnx.NodeProto]:
        a, zero = graph.add(f"{name}/slope", slope), graph.add(f"{name}/zero", np.zeros((), np.float32))
        return [
            helper.make_node("Relu", [x], [f"{name}/above"], name=f"{name}/Relu"),
            helper.make_node("Clip", [x, "", zero], [f"{name}/below"], name=f"{name}/Clip"),
            helper.make_node("Mul", [f"{name}/below", a], [f"{name}/line"], name=f"{name}/Line"),
            helper.make_node("Add", [f"{name}/above", f"{name}/line"], [out], name=f"{name}/Add"),
        ]

    return _without_prelu(network, parts)


Parts = Callable[["_Graph", str, str, NDArray[np.generic], str], list[onnx.NodeProto]]
"""Name, input, slope and output of a PRelu → the nodes that take its place."""


def _without_prelu(network: onnx.ModelProto, parts: Parts) -> onnx.ModelProto:
    graph = _Graph(network)
    for node in graph.of("PRelu"):
        slope = graph.constant(node.input[1])
        if slope is not None:
            graph.replace(node, parts(graph, node.name or node.output[0], node.input[0], slope, node.output[0]))
    return graph.finished()


def _affine(graph: _Graph, node: onnx.NodeProto) -> tuple[Doubles, Doubles] | None:
    """Return scale and shift (C each) that the node computes in inference; None unless all inputs are constants."""
    values = [graph.constant(name) for name in node.input[1:5]]
    training = any(a.name == "training_mode" and a.i for a in node.attribute)
    used = [name for name in node.output if name]
    if training or len(used) != 1 or any(v is None for v in values):
        return None
    gamma, beta, mean, variance = (np.asarray(v, np.float64) for v in values)
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    scale = gamma / np.sqrt(variance + epsilon)
    return scale, beta - mean * scale


def _fold_back(graph: _Graph, norm: onnx.NodeProto, scale: Doubles, shift: Doubles) -> bool:
    """Fold ``norm`` into the linear operator whose only reader it is; False where that cannot be."""
    before = graph.maker.get(norm.input[0])
    if before is None or len(graph.readers[norm.input[0]]) != 1 or norm.input[0] in graph.outputs:
        return False
    linear = _linear(graph, before)
    if linear is None or linear[0].shape[0] != len(scale):
        return False
    weight, bias = linear
    made = _as_node(graph, before, weight * _column(scale, weight), bias * scale + shift, norm.output[0])
    graph.replace(before, [made])
    graph.replace(norm, [])
    return True


def _fold_forward(graph: _Graph, norm: onnx.NodeProto, scale: Doubles, shift: Doubles) -> bool:
    """Fold ``norm`` into the linear operator that alone reads it, through nodes that only change the shape."""
    name = norm.output[0]
    after = graph.only_reader(name)
    while after is not None and after.op_type in PASSES and after.input[0] == name:
        name = after.output[0]
        after = graph.only_reader(name)
    linear = _linear(graph, after) if after is not None and after.input[0] == name else None
    if after is None or linear is None:
        return False
    weight, bias = linear
    if after.op_type == "Conv":
        groups = next((a.i for a in after.attribute if a.name == "group"), 1)
        if name != norm.output[0] or _padded(after) or len(scale) != weight.shape[1] * groups:
            return False
        rows = len(weight) // groups  # the channels that each output of a grouped convolution reads
        seen = np.stack([np.arange(weight.shape[1]) + (o // rows) * weight.shape[1] for o in range(len(weight))])
        flat = weight.reshape(*weight.shape[:2], -1)
        bias = bias + (flat.sum(2) * shift[seen]).sum(1)
        weight = (flat * scale[seen][:, :, None]).reshape(weight.shape)
    else:
        taken = graph.shapes.get(norm.input[0], [0])  # N×C×H×W, flattened channel by channel
        if math.prod(taken[1:]) != weight.shape[1] or len(graph.shapes.get(name, [])) != 2:
            return False
        repeat = weight.shape[1] // len(scale)
        bias = bias + weight @ np.repeat(shift, repeat)
        weight = weight * np.repeat(scale, repeat)
    made = _as_node(graph, after, weight, bias, after.output[0])
    graph.replace(after, [made])
    for node in list(graph.nodes):  # whoever read the normalised values now reads what it normalised
        for i, read in enumerate(node.input):
            if read == norm.output[0]:
                node.input[i] = norm.input[0]
    graph.replace(norm, [])
    return True


def _linear(graph: _Graph, node: onnx.NodeProto) -> tuple[Doubles, Doubles] | None:
    """Return weight (outputs first) and bias (zeros where there is none) of a Conv, Gemm or MatMul by a constant."""
    options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    stored = graph.constant(node.input[1]) if len(node.input) > 1 else None
    added = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    if stored is None or added is None or stored.dtype != np.float32:
        return None
    weight: Doubles = np.asarray(stored, np.float64)
    bias: Doubles = np.asarray(added, np.float64).reshape(-1)
    if node.op_type == "Gemm" and not options.get("transA"):
        weight = (weight if options.get("transB") else weight.T) * options.get("alpha", 1.0)
    elif node.op_type == "MatMul" and weight.ndim == 2 and len(graph.shapes.get(node.input[0], [])) == 2:
        weight = weight.T
    elif node.op_type != "Conv":
        return None
    if bias.size not in (1, len(weight)):
        return None
    return weight, np.broadcast_to(options.get("beta", 1.0) * bias, (len(weight),))


def _as_node(graph: _Graph, like: onnx.NodeProto, weight: Doubles, bias: Doubles, output: str) -> onnx.NodeProto:
    """Make ``like`` with other weights and another output; a MatMul becomes a Gemm."""
    name = like.name or like.output[0]
    inputs = [like.input[0], graph.add(f"{name}/weight", weight), graph.add(f"{name}/bias", bias)]
    if like.op_type == "Conv":
        made = helper.make_node("Conv", inputs, [output], name=like.name)
        made.attribute.extend(like.attribute)
        return made
    return helper.make_node("Gemm", inputs, [output], name=like.name, transB=1)


def _padded(node: onnx.NodeProto) -> bool:
    options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return any(options.get("pads", ())) or options.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")


def _column(values: Doubles, like: Doubles) -> Doubles:
    return values.reshape(-1, *[1] * (like.ndim - 1))


class _Graph:
    """Hold a copy of a model's graph with the look-ups that rewrites need. Nodes within control flow are left alone."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        graph = self.model.graph
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self.outputs = {value.name for value in graph.output}
        self.shapes = _shapes(model)
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self._constants[node.output[0]] = node.attribute[0].t
            if node.op_type == "Identity" and node.input[0] in self._constants:  # torch stores equal weights once
                self._constants[node.output[0]] = self._constants[node.input[0]]
        self._index()

    def _index(self) -> None:
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
            for name in _captured(node):
                self.readers[name] += [node, node]  # read from within a branch: never the only plain reader

    def of(self, operator: str) -> list[onnx.NodeProto]:
        """List the nodes of one kind, as they are now."""
        return [node for node in self.nodes if node.op_type == operator and node.domain in ("", "ai.onnx")]

    def constant(self, name: str) -> NDArray[np.generic] | None:
        """Return the values behind ``name`` where they are known."""
        return numpy_helper.to_array(self._constants[name]) if name in self._constants else None

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """Return the one node that reads ``name``; None for an output of the graph and for several readers."""
        readers = self.readers[name]
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def add(self, name: str, values: NDArray[np.generic]) -> str:
        """Add a float32 constant; its name is made unique."""
        while name in self._constants:
            name += "'"
        self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name)
        self.model.graph.initializer.append(self._constants[name])
        return name

    def replace(self, node: onnx.NodeProto, parts: list[onnx.NodeProto]) -> None:
        """Put ``parts`` where ``node`` stands."""
        place = next(i for i, other in enumerate(self.nodes) if other is node)
        self.nodes[place : place + 1] = parts
        self._index()

    def finished(self) -> onnx.ModelProto:
        """Return the model with the nodes as they are now, and only the constants that one of them reads."""
        graph = self.model.graph
        read = {name for node in self.nodes for name in [*node.input, *_captured(node)]} | self.outputs
        used = [n for n in self.nodes if n.op_type not in ("Constant", "Identity") or n.output[0] in read]
        kept_nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in used]
        kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in read]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(kept_nodes)
        graph.initializer.extend(kept)
        return self.model


def _captured(node: onnx.NodeProto) -> set[str]:
    """Collect the names that branches and loop bodies of ``node`` read from around them."""
    found: set[str] = set()
    for attribute in node.attribute:
        for body in [attribute.g, *attribute.graphs] if attribute.type in BRANCHES else []:
            for inner in body.node:
                found |= {*inner.input} | _captured(inner)
            found |= {value.name for value in body.output}
    return found


def _shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Infer shapes by name; 0 for a dimension that is not known."""
    try:
        graph = shape_inference.infer_shapes(model).graph
    except Exception:  # unknown operators: nothing is known then, and less is folded
        return {}
    shapes = {v.name: v.type.tensor_type.shape for v in [*graph.input, *graph.value_info, *graph.output]}
    return {name: [d.dim_value for d in shape.dim] for name, shape in shapes.items() if shape.dim}


def shorten_names(network: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of ``network`` with one or two characters for each inner name, and none for nodes.

    In an INT8 file of a small network the names that exporters and quantisers make are a fifth of the bytes. A graph
    with control flow stays as it is.
    """
    made = onnx.ModelProto()
    made.CopyFrom(network)
    graph = made.graph
    if any(_captured(node) for node in graph.node):
        return made
    short = {value.name: value.name for value in [*graph.input, *graph.output]}
    for node in graph.node:
        node.name = ""
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name:
                    names[i] = short.setdefault(name, f"{len(short):x}")
    for tensor in graph.initializer:
        tensor.name = short.setdefault(tensor.name, f"{len(short):x}")
    del graph.value_info[:]
    return made
