"""Build the graph that devices run, of a network from torch or from an ONNX file.

Every network is first brought to one form, float N×3×S×S (preprocessed) → N×D (not normalised), with a dynamic batch.
Two graphs are made of it: ``uint8_graph`` for bundles and ``float_graph`` for programs that scale pixels themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, compose, helper, numpy_helper, shape_inference, version_converter
from onnx.utils import Extractor

from pkd.export.graph.rewrite import fold_batch_norm
from pkd.toolkit.core.errors import InputError, MissingExtra, PkdError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.onnx_ports import Ports

if TYPE_CHECKING:
    from torch import nn

OPSET = 18
"""Opset that torch exports without converting, and that every runtime reads that we target."""
OLDEST_OPSET = 13
"""Oldest opset in which the operators added below mean the same; older graphs must convert."""
IR_VERSION = 8
"""The file format of opset 18: onnxruntime 1.14 and later, also in the browser."""
WEB_OPSET, WEB_IR_VERSION = 26, 13
"""The newest that browsers load, with onnxruntime-web 1.30. tests/parity/test_onnxruntime_web.py asks it."""
BATCH = "batch"
ENTRY, UNIT = "pkd/network", "pkd/unit"
"""Names of the node that feeds the network, and of the last one, which divides by the length."""


def torch_network(module: nn.Module, size: int) -> onnx.ModelProto:
    """Trace ``module``: float32 N×3×S×S → N×D. Raises InputError in train mode.

    Batch normalisation is folded into the linear operator beside it, and parallel branches (RepViT's) into one
    convolution. The TorchScript exporter is used on purpose: for these networks it gives the plainer graph (IR 8,
    exactly the opset asked for) in 0.3 s instead of 7 s, in every torch that pkd allows.
    """
    try:
        import torch
    except ImportError:
        raise MissingExtra("torch", "export") from None
    from pkd.toolkit.distill.models.layers import fused

    training = [name or "the network" for name, part in module.named_modules() if part.training]
    if training:
        raise InputError(f"{training[0]} is in train mode, its outputs would depend on the batch. Call .eval() first.")
    example = torch.zeros(2, 3, size, size)  # more than one image, so that no batch of 1 is baked in
    module = fused(module)
    with TemporaryDirectory() as folder, warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # that there is another exporter
        traced = Path(folder, "traced.onnx")
        torch.onnx.export(
            module,
            (example,),
            traced,
            dynamo=False,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=["features"],
            dynamic_axes={"pixels": {0: BATCH}, "features": {0: BATCH}},
        )
        network = onnx.load(str(traced))
    if opset_of(network) != OPSET:
        raise PkdError(f"torch exported opset {opset_of(network)} instead of {OPSET}. Use torch 2.6 to 2.13.")
    return fold_batch_norm(network)


def onnx_network(path: str | Path, ports: Ports | None = None) -> onnx.ModelProto:
    """Read an ONNX encoder as float32 N×3×S×S → N×D, free its batch dimension and fold its batch normalisations.

    ``ports``: layout and type of its input, and its output; None: they are float32 N×3×S×S and the first. Raised to
    ``OPSET`` where onnx can convert it, else left at its own. Raises InputError for a file that is neither convertible
    nor recent enough.
    """
    try:
        network = onnx.load(str(path))
    except Exception as error:  # protobuf's and onnx's errors share no base class
        raise InputError(f"{path}: not an ONNX file: {_first_line(error)}") from None
    graph = network.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]  # old files list their weights as inputs
    _replace(graph.input, inputs)
    _replace(graph.output, [v for v in graph.output if v.name == (ports.output if ports else graph.output[0].name)])
    network.ir_version = max(network.ir_version, 4)  # from here on weights need not be inputs
    network = _raise_opset(network, str(path))
    _free_batch(network)
    if ports:
        _adapt_ports(network, ports)
    return fold_batch_norm(network)


def uint8_graph(network: onnx.ModelProto, preprocess: Preprocess, dim: int) -> onnx.ModelProto:
    """Build the graph of a bundle: ``crops`` uint8 N×S×S×3 RGB → ``embedding`` float32 N×D, unit rows."""
    size = preprocess.size
    front = _Chain("crops")
    front.add("Cast", to=TensorProto.FLOAT)  # before Transpose: TensorRT refuses to transpose uint8
    if np.any(preprocess.mean):
        front.add("Sub", _of_rgb(preprocess.mean, preprocess))
    if np.any(np.not_equal(preprocess.std, 1)):
        front.add("Div", _of_rgb(preprocess.std, preprocess))
    if preprocess.channels == "bgr":
        front.add("Gather", np.array([2, 1, 0], np.int64), axis=3)
    front.add("Transpose", perm=[0, 3, 1, 2])
    taken = helper.make_tensor_value_info("crops", TensorProto.UINT8, [BATCH, size, size, 3])
    return _assemble(taken, front, network, dim)


def _of_rgb(values: ArrayLike, preprocess: Preprocess) -> NDArray[np.float32]:
    """Give one number, or one per channel of the network, as float32 in the order of RGB crops."""
    numbers = np.asarray(values, np.float32)
    return numbers[::-1].copy() if numbers.ndim and preprocess.channels == "bgr" else numbers


def network_of(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Extract the float32 N×3×S×S network from what ``uint8_graph`` made."""
    (entry,), (unit,) = ([n for n in graph.graph.node if n.name == name] for name in (ENTRY, UNIT))
    return Extractor(shape_inference.infer_shapes(graph)).extract_model([entry.output[0]], [unit.input[0]])


def float_graph(network: onnx.ModelProto, preprocess: Preprocess, dim: int) -> onnx.ModelProto:
    """Build the graph for other programs: ``pixels`` float32 N×3×S×S RGB → ``embedding`` float32 N×D, unit rows.

    Pixels are (value − 127.5) / 127.5, which is what insightface's ArcFaceONNX feeds to a graph without ``Sub…`` and
    ``Mul…`` among its first node names; the difference to the network's own scaling is in the graph. Raises InputError
    for a crop size that insightface takes for another kind of network.
    """
    size = preprocess.size
    if size < 112 or size % 16 or size == 192:
        raise InputError(
            f"--float-nchw: insightface takes a {size}×{size} network for something else than a recogniser; it wants a "
            "multiple of 16 from 112 on, but not 192. Leave --float-nchw out."
        )
    front = _Chain("pixels")
    mean, std = np.asarray(preprocess.mean, np.float64), np.asarray(preprocess.std, np.float64)
    for operator, values in (("Mul", 127.5 / std), ("Add", (127.5 - mean) / std)):
        if np.any(values != (operator == "Mul")):
            front.add(operator, _of_rgb(values, preprocess).reshape(-1, 1, 1) if values.ndim else np.float32(values))
    if preprocess.channels == "bgr":
        front.add("Gather", np.array([2, 1, 0], np.int64), axis=1)
    taken = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [BATCH, 3, size, size])
    return _assemble(taken, front, network, dim)


def serialise(model: onnx.ModelProto) -> bytes:
    """Serialise to one file with its weights inside. Raises InputError over protobuf's limit of 2 GiB."""
    try:
        data: bytes = model.SerializeToString(deterministic=True)
    except ValueError:
        raise InputError("the network has 2 GiB of weights or more, which one ONNX file cannot hold.") from None
    return data


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the default operator set that ``model`` asks for."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def precision_of(model: onnx.ModelProto) -> str:
    """Name the precision that a network's own weights ask for: fp16 or fp32."""
    return "fp16" if any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer) else "fp32"


class _Chain:
    """Collect operators, each fed by the one before it and by constants."""

    def __init__(self, start: str) -> None:
        self.start = self.end = start
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, operator: str, *constants: Any, **attributes: Any) -> None:
        name = f"pkd/{self.start}/{len(self.nodes)}/{operator}"  # starts with neither Sub nor Mul: see float_graph
        inputs = [self.end]
        for i, value in enumerate(constants):
            inputs.append(f"{name}/{i}")
            self.constants.append(numpy_helper.from_array(np.asarray(value), inputs[-1]))
        self.nodes.append(helper.make_node(operator, inputs, [f"{name}/out"], name=name, **attributes))
        self.end = f"{name}/out"


def _assemble(taken: onnx.ValueInfoProto, front: _Chain, network: onnx.ModelProto, dim: int) -> onnx.ModelProto:
    """Join front, network and division by the length in one graph with one input and one output."""
    inner = compose.add_prefix(network, "net/", rename_functions=False)
    graph = inner.graph
    length = _Chain(graph.output[0].name)  # √Σx², no shorter than 1e-12: a zero row stays zero and is noticed
    length.add("Pow", np.float32(2))
    length.add("ReduceSum", np.array([1], np.int64), keepdims=1)
    length.add("Sqrt")
    length.add("Max", np.float32(1e-12))
    entry = helper.make_node("Identity", [front.end], [graph.input[0].name], name=ENTRY)
    unit = helper.make_node("Div", [graph.output[0].name, length.end], ["embedding"], name=UNIT)
    made = helper.make_graph(
        [*front.nodes, entry, *graph.node, *length.nodes, unit],
        "encoder",
        [taken],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [BATCH, dim])],
        [*front.constants, *graph.initializer, *length.constants],
        sparse_initializer=graph.sparse_initializer,
    )
    model = helper.make_model(made, opset_imports=inner.opset_import, functions=inner.functions, producer_name="pkd")
    model.ir_version = IR_VERSION if opset_of(inner) <= OPSET else inner.ir_version
    if opset_of(inner) <= WEB_OPSET:
        model.ir_version = min(model.ir_version, WEB_IR_VERSION)  # nothing of these opsets needs a newer one
    _strip(model)
    return model


def _raise_opset(network: onnx.ModelProto, source: str) -> onnx.ModelProto:
    found = opset_of(network)
    if found >= OPSET:
        return network
    try:
        raised = version_converter.convert_version(network, OPSET)
        onnx.checker.check_model(raised)
    except Exception as error:
        if found >= OLDEST_OPSET:
            return network
        raise InputError(
            f"{source}: opset {found} cannot be converted to {OPSET}: {_first_line(error)} "
            f"Export the teacher again with opset {OLDEST_OPSET} or later."
        ) from None
    return raised


def _free_batch(network: onnx.ModelProto) -> None:
    """Let the first dimension vary. Reshapes to a constant shape that repeats a fixed batch are told to copy it."""
    graph = network.graph
    fixed = graph.input[0].type.tensor_type.shape.dim[0].dim_value
    if fixed:
        constants = {tensor.name: tensor for tensor in graph.initializer}
        constants |= {
            node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant" and node.attribute
        }
        leading = _leading_dimensions(network)
        for node in graph.node:
            if node.op_type != "Reshape" or node.input[1] not in constants or leading.get(node.input[0]) != fixed:
                continue
            shape = numpy_helper.to_array(constants[node.input[1]]).copy()
            if len(shape) and shape[0] == fixed and not any(a.name == "allowzero" and a.i for a in node.attribute):
                shape[0] = 0  # "as in the input"
                free = numpy_helper.from_array(shape, f"{node.output[0]}/free_shape")
                graph.initializer.append(free)
                node.input[1] = free.name
    del graph.value_info[:]  # shapes inferred for the fixed batch
    for value in (graph.input[0], graph.output[0]):
        dimensions = value.type.tensor_type.shape.dim
        if dimensions:
            dimensions[0].Clear()
            dimensions[0].dim_param = BATCH


def _adapt_ports(network: onnx.ModelProto, ports: Ports) -> None:
    """Give the network a float32 N×3×S×S input and a float32 N×D output, in place, where it has others."""
    graph = network.graph
    taken, given = graph.input[0], graph.output[0]
    if ports.input.nhwc or ports.input.dtype is not np.float32:
        front = _Chain(f"pkd-{taken.name}")
        if ports.input.nhwc:
            front.add("Transpose", perm=[0, 2, 3, 1])
        front.add("Cast", to=taken.type.tensor_type.elem_type)
        front.nodes[-1].output[0] = taken.name
        _replace(graph.input, [helper.make_tensor_value_info(front.start, TensorProto.FLOAT, [BATCH, 3, None, None])])
        _replace(graph.node, [*front.nodes, *graph.node])
    if given.type.tensor_type.elem_type != TensorProto.FLOAT or not ports.flat:
        rows = _Chain(given.name)
        rows.add("Flatten", axis=1)
        rows.add("Cast", to=TensorProto.FLOAT)
        graph.node.extend(rows.nodes)
        _replace(graph.output, [helper.make_tensor_value_info(rows.end, TensorProto.FLOAT, [BATCH, ports.dim])])


def _leading_dimensions(network: onnx.ModelProto) -> dict[str, int]:
    try:
        graph = shape_inference.infer_shapes(network).graph
    except Exception:  # unknown operators: leave the graph as it is, parity will tell
        return {}
    values = [*graph.input, *graph.value_info, *graph.output]
    return {v.name: v.type.tensor_type.shape.dim[0].dim_value for v in values if v.type.tensor_type.shape.dim}


def _strip(model: onnx.ModelProto) -> None:
    """Remove what exporters note about the machine and the source code they ran on."""
    for node in model.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    for tensor in model.graph.initializer:
        tensor.ClearField("doc_string")
        tensor.ClearField("metadata_props")


def _replace(field: Any, values: Sequence[Any]) -> None:
    kept = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(kept)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".") + "."
