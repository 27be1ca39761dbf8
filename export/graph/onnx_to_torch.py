"""An ONNX graph of ours as a torch module, operator by operator: what ExecuTorch's exporter starts from.

Only operators that students and their INT8 graphs consist of, and only as torch computes them without copying shapes
around; whatever else a graph has is refused by name. The graph's uint8 input becomes float32 with the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers torch.ops.quantized_decomposed
from torch.nn import functional as F

from pkd.toolkit.core.errors import InputError

Numbers = NDArray[Any]
ONES = "pkd/ones"
"""A row of ones as long as an embedding. XNNPACK has no sum, but products with that."""


class OnnxModule(nn.Module):
    """float32 N×S×S×3 with the values 0 to 255 → float32 N×D, as the graph's own uint8 input → output.

    Raises InputError for an operator, or a use of one, that is not in ``OPERATORS`` or ``SETTLED``.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph = model.graph
        self._taken, self._given = graph.input[0].name, graph.output[0].name
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        nodes = [node for node in graph.node if node.op_type != "Constant"]
        for node in graph.node:
            if node.op_type == "Constant":
                constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        width = graph.output[0].type.tensor_type.shape.dim[1].dim_value
        constants[ONES] = np.ones((1, width), np.float32)
        for node in nodes:
            if node.op_type == "PRelu" and node.input[1] in constants:
                constants[node.input[1]] = constants[node.input[1]].reshape(-1)  # XNNPACK wants the parameter itself
        self._steps = [_step(node, constants) for node in _own_dequantisers(nodes)]
        read = {name for step in self._steps for name in step.inputs}
        self._buffer_of = {name: f"constant{i}" for i, name in enumerate(constants) if name in read}
        for name, buffer in self._buffer_of.items():
            self.register_buffer(buffer, torch.from_numpy(constants[name].copy()))

    def forward(self, pixels: Tensor) -> Tensor:
        """One pass through the graph's nodes in their order."""
        values = {name: self.get_buffer(buffer) for name, buffer in self._buffer_of.items()}
        values[self._taken] = pixels
        for step in self._steps:
            try:
                values[step.output] = step.run(*(values[name] for name in step.inputs))
            except (TypeError, _Unlike) as error:  # an attribute or a use that is not foreseen
                raise InputError(f"{step.kind} of this graph: {error}. Leave --format executorch out.") from None
        return values[self._given]


def _own_dequantisers(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes with a DequantizeLinear of its own for each reader, as XNNPACK looks for layers between them."""
    made = {node.output[0]: node for node in nodes if node.op_type == "DequantizeLinear"}
    for node in nodes:
        if node.output[0] in made:
            continue
        reader = onnx.NodeProto.FromString(node.SerializeToString())
        for i, name in enumerate(node.input):
            if name in made:
                own = onnx.NodeProto.FromString(made[name].SerializeToString())
                own.output[0] = reader.input[i] = f"{name} of {node.output[0]}"
                yield own
        yield reader


@dataclass(frozen=True)
class _Step:
    """A node: a function of tensors, and where they come from and go to."""

    kind: str
    run: Callable[..., Tensor]
    inputs: tuple[str, ...]
    output: str


def _step(node: onnx.NodeProto, constants: Mapping[str, NDArray[np.generic]]) -> _Step:
    kind, inputs, output = node.op_type, tuple(name for name in node.input if name), node.output[0]
    options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if kind == "ReduceSum":
        inputs = (inputs[0], ONES)
    elif kind == "DequantizeLinear" and constants[inputs[1]].size > 1:
        return _Step(kind, partial(_dequantise_channels, **options), inputs, output)
    elif kind in SETTLED and all(name in constants for name in inputs[1:]):
        numbers = [constants[name] if name else None for name in node.input[1:]]
        return _Step(kind, lambda x: SETTLED[kind](x, *numbers, **options), inputs[:1], output)
    if kind not in OPERATORS or node.domain not in ("", "ai.onnx"):
        raise InputError(f"pkd does not translate {kind} for ExecuTorch. Leave --format executorch out.")
    return _Step(kind, partial(OPERATORS[kind], **options), inputs, output)


class _Unlike(Exception):
    """A use of an operator that torch has no one operation for."""


def _need(met: bool, otherwise: str) -> None:
    if not met:
        raise _Unlike(otherwise)


def _cast(x: Tensor, *, to: int) -> Tensor:
    _need(to == onnx.TensorProto.FLOAT and x.dtype == torch.float32, "only the cast of the crops to float32")
    return x


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    _need(weight.dim() == 4, "only in two dimensions")
    _need(options.get("auto_pad", b"NOTSET") == b"NOTSET", "only with its padding in numbers")
    top, left, bottom, right = options.get("pads", (0, 0, 0, 0))
    _need((top, left) == (bottom, right), "only with the same padding on opposite sides")
    strides, dilations = (tuple(options.get(name, (1, 1))) for name in ("strides", "dilations"))
    return F.conv2d(x, weight, bias, strides, (top, left), dilations, options.get("group", 1))


def _gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    plain = not options.get("transA") and options.get("alpha", 1) == options.get("beta", 1) == 1
    _need(plain and weight.dim() == 2, "only as a fully connected layer")
    return F.linear(x, weight if options.get("transB") else weight.T, bias)


def _batch_norm(x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, **options: Any) -> Tensor:
    factor = scale / torch.sqrt(variance + options.get("epsilon", 1e-5))
    column = (1, -1, 1, 1)
    return x * factor.reshape(column) + (shift - mean * factor).reshape(column)


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    _need(axis == 1, "only behind the batch")
    return torch.flatten(x, 1)


def _sum_of_row(x: Tensor, ones: Tensor, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    _need(x.dim() == 2 and x.shape[1] == ones.shape[1] and keepdims == 1, "only of an embedding")
    return F.linear(x, ones)


def _gather(x: Tensor, indices: Numbers, *, axis: int) -> Tensor:
    """Channels in another order: slices put together, for XNNPACK does not pick by index."""
    _need(indices.ndim == 1, "only of whole channels")
    return torch.cat([x.narrow(axis, int(i), 1) for i in indices], axis)


def _reshape(x: Tensor, shape: Numbers, *, allowzero: int = 0) -> Tensor:
    _need(len(shape) == 2 and shape[0] in (0, -1) and not allowzero, "only to flatten what is behind the batch")
    return torch.flatten(x, 1)


def _clip(x: Tensor, low: Numbers | None = None, high: Numbers | None = None) -> Tensor:
    return torch.clamp(x, *(None if limit is None else float(limit) for limit in (low, high)))


def _pow(x: Tensor, exponent: Numbers) -> Tensor:
    _need(float(exponent) == 2, "only squares")
    return x * x


def _max(x: Tensor, floor: Numbers) -> Tensor:
    return torch.clamp(x, min=float(floor))


def _quantise(x: Tensor, scale: Numbers, zero: Numbers, **_: int) -> Tensor:
    _need(scale.size == 1, "only with one scale for the whole tensor")
    made: Tensor = torch.ops.quantized_decomposed.quantize_per_tensor(
        x, float(scale), _signed(zero), -128, 127, torch.int8
    )
    return made


def _dequantise(x: Tensor, scale: Numbers, zero: Numbers, **_: int) -> Tensor:
    made: Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor(
        x, float(scale), _signed(zero), -128, 127, torch.int8
    )
    return made


def _signed(zero: Numbers) -> int:
    """The offset of unsigned bytes moved to signed ones: the same 256 steps, in the type that XNNPACK computes with."""
    return int(zero) - (128 if zero.dtype == np.uint8 else 0)


def _dequantise_channels(x: Tensor, scale: Tensor, zero: Tensor, *, axis: int = 1) -> Tensor:
    _need(x.dtype == torch.int8, "only of signed weights")
    made: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(x, scale, zero, axis, -127, 127, torch.int8)
    return made


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Conv": _conv,
    "Div": torch.div,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: torch.mean(x, (2, 3), keepdim=True),
    "Identity": lambda x: x,
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "PRelu": F.prelu,
    "ReduceSum": _sum_of_row,
    "Relu": F.relu,
    "Sigmoid": torch.sigmoid,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Transpose": lambda x, *, perm: torch.permute(x, perm),
}

SETTLED: dict[str, Callable[..., Tensor]] = {
    "Clip": _clip,
    "DequantizeLinear": _dequantise,
    "Gather": _gather,
    "Max": _max,
    "Pow": _pow,
    "QuantizeLinear": _quantise,
    "Reshape": _reshape,
}
"""Operators whose further inputs are numbers that must be known beforehand."""
