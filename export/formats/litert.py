"""Build LiteRT (TensorFlow Lite) targets, for Android and microprocessors: ``.tflite``, in float32 and INT8.

pkd writes the file itself, operator by operator, from the ONNX graph: a student's graph has twenty kinds of them, and
the converters that there are bring TensorFlow or replace torch. LiteRT keeps pictures channels-last, so every tensor
that is N×C×H×W in ONNX is N×H×W×C here. INT8 has the very steps that pkd measured (the form ``s8s8a``): convolutions,
products and sums in integers, activations between them in float32. w8a16 is LiteRT's 16x8: the same in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

from pkd.export.formats.base import Built, Format, Tell, need_packages
from pkd.export.formats.litert_file import LiteRtFile, Scale
from pkd.export.graph.precision_variants import GraphForm, Variant
from pkd.export.options import BuildOptions
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.encoders.litert import LiteRtNet

Numbers = NDArray[Any]
IN_INTEGERS = ("Conv", "Gemm", "MatMul", "Add", "GlobalAveragePool", "Flatten", "Reshape", "MaxPool")
"""Operators that are computed on int8 where their inputs and their output are; others on float32. XNNPACK has no
activation of its own on int8: with PRelu and Relu there, a network took eight times as long."""
BINARY = {"Add": ("ADD", "Add"), "Sub": ("SUB", "Sub"), "Mul": ("MUL", "Mul"), "Div": ("DIV", "Div")}
BINARY |= {"Max": ("MAXIMUM", "MaximumMinimum"), "Min": ("MINIMUM", "MaximumMinimum")}
UNARY = {"Relu": "RELU", "Sigmoid": "LOGISTIC", "Tanh": "TANH", "Sqrt": "SQRT", "HardSwish": "HARD_SWISH", "Exp": "EXP"}
UNARY |= {"Abs": "ABS", "Neg": "NEG"}


@dataclass(frozen=True)
class _Held:
    """Hold a tensor of the file that stands for a value of the ONNX graph."""

    tensor: int
    last: bool
    """True: N×C×H×W in ONNX, N×H×W×C in the file."""
    int8: bool = False
    """True: it is held in integers, of 16 bits in w8a16."""


def to_litert(model: bytes) -> bytes:
    """Convert the ONNX of ``uint8_graph``, plain or quantised, to ``.tflite``: uint8 1×S×S×3 → float32 1×D.

    Raises InputError naming an operator, or a use of one, that is not translated.
    """
    graph = onnx.load_model_from_string(model)
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    for node in graph.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.domain:  # of 16 bits, before opset 21
            node.domain = ""
            graph.opset_import[0].version = max(graph.opset_import[0].version, 21)
    return _Translation(shape_inference.infer_shapes(graph, data_prop=True).graph).write()


class _Translation:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph, self.file = graph, LiteRtFile()
        self.constants: dict[str, Numbers] = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer
        }
        values = [*graph.input, *graph.value_info, *graph.output]
        self.shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        wide = any(values.dtype == np.int16 for values in self.constants.values())
        self.whole, self.sums = ("int16", np.int64) if wide else ("int8", np.int32)
        """Types of what is computed in integers, and of its biases."""
        self.held: dict[str, _Held] = {}
        self.floats: dict[int, _Held] = {}
        self.steps: dict[str, tuple[Numbers, Scale]] = {}
        """Name of a constant that is stored in int8 → its steps and what they stand for."""

    def write(self) -> bytes:
        (taken,), (given,) = self.graph.input, self.graph.output
        start = self.file.tensor(self.shapes[taken.name], "uint8")
        self.held[taken.name] = _Held(start, False)
        for node in self.graph.node:
            try:
                self._node(node)
            except KeyError as missing:  # a constant, where the translation knows values alone
                raise _unknown(node, f"of the constant {missing} is not translated") from None
        return self.file.write((taken.name, start), (given.name, self.held[given.name].tensor))

    def _node(self, node: onnx.NodeProto) -> None:
        kind, options = node.op_type, {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if kind == "Constant":
            self.constants[node.output[0]] = numpy_helper.to_array(options["value"])
        elif kind in ("Identity", "Dropout"):
            self._alias(node)
        elif kind == "QuantizeLinear":
            self._quantise(node)
        elif kind == "DequantizeLinear":
            self._dequantise(node, options.get("axis", 1))
        elif kind in OPERATORS:
            OPERATORS[kind](self, node, options)
        else:
            raise _unknown(node, "is not translated")

    # --- what operators read and make

    def _float(self, name: str) -> _Held:
        """Return the value in float32."""
        found = self.held[name]
        if not found.int8:
            return found
        if found.tensor not in self.floats:
            made = self.file.tensor(self.file.shape(found.tensor), "float32")
            self.file.operator("DEQUANTIZE", [found.tensor], made, "Dequantize")
            self.floats[found.tensor] = _Held(made, found.last)
        return self.floats[found.tensor]

    def _in_integers(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return the QuantizeLinear behind a node that can be computed on int8; None: it is computed on float32."""
        readers = self.readers.get(node.output[0], [])
        varying = [name for name in node.input if name in self.held]
        if node.op_type not in IN_INTEGERS or len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
            return None
        fixed = [
            name for name in node.input[1:2] if name in self.constants and node.op_type in ("Conv", "Gemm", "MatMul")
        ]
        ready = all(self.held[name].int8 for name in varying) and all(name in self.steps for name in fixed)
        return readers[0] if ready and (node.op_type != "Add" or len(varying) == 2) else None

    def _emit(
        self, node: onnx.NodeProto, kind: str, inputs: list[int], last: bool, options: str = "", **values: Any
    ) -> None:
        """Add the operator of ``node``, whose output is int8 where ``inputs`` are."""
        after = self._in_integers(node)
        name = after.output[0] if after else node.output[0]
        shape = _shape_of(self.shapes[node.output[0]], last, node)
        scale = self._scale(after) if after else None
        made = self.file.tensor(shape, self.whole if after else "float32", quantised=scale)
        self.file.operator(kind, inputs, made, options, **values)
        self.held[name] = _Held(made, last, after is not None)

    def _scale(self, node: onnx.NodeProto) -> Scale:
        """Read scale and offset of a QuantizeLinear or DequantizeLinear; unsigned bytes are moved by 128."""
        scale, zero = self.constants[node.input[1]], self.constants[node.input[2]]
        if zero.dtype not in (np.uint8, np.int8, np.int16) or np.any(zero != zero.reshape(-1)[0]):
            raise _unknown(node, f"is of {zero.dtype}, or has several offsets")
        return Scale(np.asarray(scale, np.float32), int(zero.reshape(-1)[0]) - (128 if zero.dtype == np.uint8 else 0))

    def _quantise(self, node: onnx.NodeProto) -> None:
        if node.output[0] in self.held:  # by the operator before it
            return
        taken = self._float(node.input[0])
        made = self.file.tensor(self.file.shape(taken.tensor), self.whole, quantised=self._scale(node))
        self.file.operator("QUANTIZE", [taken.tensor], made, "Quantize")
        self.held[node.output[0]] = _Held(made, taken.last, True)

    def _dequantise(self, node: onnx.NodeProto, axis: int) -> None:
        name, stored = node.output[0], self.constants.get(node.input[0])
        if stored is None:
            self.held[name] = self.held[node.input[0]]
            return
        scale = self._scale(node)
        spread = (
            scale.scale.reshape([-1 if i == axis else 1 for i in range(stored.ndim)])
            if scale.scale.ndim
            else scale.scale
        )
        steps = stored.astype(np.int32) - (128 if stored.dtype == np.uint8 else 0)
        self.constants[name] = ((steps - scale.zero) * spread).astype(np.float32)
        if scale.zero == 0 and (scale.scale.ndim == 0 or axis == 0 or stored.ndim == 2):
            self.steps[name] = steps.astype(np.int8), scale

    def _alias(self, node: onnx.NodeProto) -> None:
        source, name = node.input[0], node.output[0]
        if source in self.constants:
            self.constants[name] = self.constants[source]
        if source in self.steps:
            self.steps[name] = self.steps[source]
        if source in self.held:
            self.held[name] = self.held[source]

    def _operand(self, name: str, last: bool, node: onnx.NodeProto) -> int:
        """Return an input of an elementwise operator, a constant laid out like the value that it meets."""
        if name in self.held:
            found = self._float(name)
            if found.last != last:
                raise _unknown(node, "joins two layouts")
            return found.tensor
        values = np.asarray(self.constants[name], np.float32)
        if last and values.ndim >= 3:
            values = values.reshape((1,) * (4 - values.ndim) + values.shape).transpose(0, 2, 3, 1)
        elif last and values.size != 1:
            raise _unknown(node, "spreads a constant over columns")
        return self.file.constant(values)

    # --- operators

    def cast(self, node: onnx.NodeProto, options: dict[str, Any]) -> None:
        """Only of the crops, which are the one input in bytes."""
        types = self.file.schema.TensorType
        found = self.held[node.input[0]]
        self._emit(node, "CAST", [found.tensor], found.last, "Cast", inDataType=types.UINT8, outDataType=types.FLOAT32)

    def binary(self, node: onnx.NodeProto, options: dict[str, Any]) -> None:
        kind, name = BINARY[node.op_type]
        last = next(self.held[i].last for i in node.input if i in self.held)
        if self._in_integers(node):
            inputs = [self.held[i].tensor for i in node.input]
        else:
            inputs = [self._operand(i, last, node) for i in node.input]
        values = {"potScaleInt16": False} if kind == "ADD" else {}
        self._emit(node, kind, inputs, last, name, **values)

    def unary(self, node: onnx.NodeProto, options: dict[str, Any]) -> None:
        found = self.held[node.input[0]] if self._in_integers(node) else self._float(node.input[0])
        self._emit(node, UNARY[node.op_type], [found.tensor], found.last)

    def power(self, node: onnx.NodeProto, options: dict[str, Any]) -> None:
        found = self._float(node.input[0])
        if np.any(self.constants[node.input[1]] != 2):
            raise _unknown(node, "is translated as a square only")
        self._emit(node, "MUL", [found.tensor] * 2, found.last, "Mul")

    def clip(self, node: onnx.NodeProto, options: dict[str, Any]) -> None:
        found = self._float(node.input[0])
        ends = [self.constants.get(name) for name in node.input[1:]] + [None, None]
        low, high = options.get("min", ends[0]), options.get("max", ends[1])
        if low is not None and float(low) == 0 and (high is None or float(high) == 6):
            self._emit(node, "RELU6" if high is not None else "RELU", [found.tensor], found.last)
            return
        tensor = found.tensor
        for kind, end in (("MAXIMUM", low), ("MINIMUM", high)):
            if end is not None:
                made = self.file.tensor(self.file.shape(tensor), "float32")
                limit = self.file.constant(np.array([float(end)], np.float32))
                self.file.operator(kind, [tensor, limit], made, "MaximumMinimum")
                tensor = made
        self.held[node.output[0]] = _Held(tensor, found.last)

    def prelu(self, node: onnx.NodeProto, options: dict[str, Any]) -> None:
        slope = np.asarray(self.constants[node.input[1]], np.float32)
        if slope.ndim not in (1, 3) or (slope.ndim == 3 and slope.shape[1:] != (1, 1)):
            raise _unknown(node, "is translated with one slope, or one a channel")
        found = self._float(node.input[0])
        self._emit(node, "PRELU", [found.tensor, self.file.constant(slope.reshape(1, 1, -1))], found.last)

    def norm(self, node: onnx.NodeProto, options: dict[str, Any]) -> None:
        gamma, beta, mean, variance = (np.asarray(self.constants[name], np.float64) for name in node.input[1:5])
        scale = gamma / np.sqrt(variance + options.get("epsilon", 1e-5))
        found = self._float(node.input[0])
        factor = self.file.constant(scale.astype(np.float32))
        shift = self.file.constant((beta - mean * scale).astype(np.float32))
        made = self.file.tensor(self.file.shape(found.tensor), "float32")
        self.file.operator("MUL", [found.tensor, factor], made, "Mul")
        self._emit(node, "ADD", [made, shift], found.last, "Add")

    def conv(self, node: onnx.NodeProto, options: dict[str, Any]) -> None:
        whole = self._in_integers(node)
        found = self.held[node.input[0]] if whole else self._float(node.input[0])
        weight, scale = self.steps[node.input[1]] if whole else (self.constants[node.input[1]], None)
        groups, dilations = options.get("group", 1), options.get("dilations", [1, 1])
        if weight.ndim != 4 or not found.last or options.get("auto_pad", b"NOTSET") != b"NOTSET":
            raise _unknown(node, "is translated for pictures with stated padding only")
        channels = self.shapes[node.input[0]][1]
        depthwise = groups == channels and weight.shape[1] == 1 and groups > 1
        laid = weight.transpose(1, 2, 3, 0) if depthwise else weight.transpose(0, 2, 3, 1)
        by_channel = Scale(scale.scale, 0, 3 if depthwise and scale.scale.ndim else 0) if scale else None
        strides = options.get("strides", [1, 1])
        taken, padding = self._padded(node, found, options.get("pads", [0] * 4), weight.shape[2:], strides, dilations)
        filters = self.file.constant(np.ascontiguousarray(laid), by_channel)
        bias = self._bias(node, len(weight), found.tensor if whole else None, scale)
        values = {"padding": padding, "strideH": strides[0], "strideW": strides[1]}
        values |= {"dilationHFactor": dilations[0], "dilationWFactor": dilations[1]}
        if depthwise:
            values["depthMultiplier"] = len(weight) // channels
        name = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
        self._emit(node, name, [taken, filters, bias], True, "DepthwiseConv2D" if depthwise else "Conv2D", **values)

    def _padded(
        self, node: onnx.NodeProto, found: _Held, pads: list[int], kernel: Any, strides: list[int], dilations: list[int]
    ) -> tuple[int, int]:
        """Return the tensor to convolve and how LiteRT pads it; what it cannot say becomes an operator of its own."""
        kinds = self.file.schema.Padding
        same = True
        for i in range(2):
            size, reach = self.shapes[node.input[0]][2 + i], (kernel[i] - 1) * dilations[i] + 1
            total = max(0, (-(-size // strides[i]) - 1) * strides[i] + reach - size)
            same &= (pads[i], pads[2 + i]) == (total // 2, total - total // 2)
        if same or not any(pads):
            return found.tensor, kinds.SAME if same else kinds.VALID
        n, height, width, c = self.file.shape(found.tensor)
        shape = [n, height + pads[0] + pads[2], width + pads[1] + pads[3], c]
        source = self.file.tensors[found.tensor]
        made = self.file.tensor(shape, self.whole if found.int8 else "float32")
        self.file.tensors[made].quantization = source.quantization
        sides = np.array([[0, 0], [pads[0], pads[2]], [pads[1], pads[3]], [0, 0]], np.int32)
        self.file.operator("PAD", [found.tensor, self.file.constant(sides)], made, "Pad")
        return made, kinds.VALID

    def _bias(self, node: onnx.NodeProto, count: int, taken: int | None, scale: Scale | None) -> int:
        """Add the bias, zeros where there is none; beside int8 it is int32 in steps of input times weight."""
        given = len(node.input) > 2 and node.input[2]
        bias = np.asarray(self.constants[node.input[2]] if given else np.zeros(1), np.float64)
        bias = np.broadcast_to(bias.reshape(-1), (count,))
        if taken is None or scale is None:
            return self.file.constant(bias.astype(np.float32))
        step = float(self.file.tensors[taken].quantization.scale[0]) * scale.scale.astype(np.float64)
        return self.file.constant(np.rint(bias / step).astype(self.sums), Scale(step.astype(np.float32)))

    def dense(self, node: onnx.NodeProto, options: dict[str, Any]) -> None:
        whole = self._in_integers(node)
        found = self.held[node.input[0]] if whole else self._float(node.input[0])
        weight, scale = self.steps[node.input[1]] if whole else (self.constants.get(node.input[1]), None)
        usual = not options.get("transA") and options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0
        if weight is None or weight.ndim != 2 or len(self.shapes[node.input[0]]) != 2 or not usual:
            raise _unknown(node, "is translated for N×D rows and constant weights only")
        rows = weight if options.get("transB") else weight.T
        bias = self._bias(node, len(rows), found.tensor if whole else None, scale)
        weights = self.file.constant(np.ascontiguousarray(rows), scale)
        self._emit(node, "FULLY_CONNECTED", [found.tensor, weights, bias], False, "FullyConnected")

    def pool(self, node: onnx.NodeProto, options: dict[str, Any]) -> None:
        found = self.held[node.input[0]] if self._in_integers(node) else self._float(node.input[0])
        kernel, strides, pads = options["kernel_shape"], options.get("strides", [1, 1]), options.get("pads", [0] * 4)
        plain = not any(pads) and not options.get("ceil_mode") and options.get("dilations", [1, 1]) == [1, 1]
        if len(kernel) != 2 or not plain or not found.last:
            raise _unknown(node, "is translated without padding and dilation only")
        name = {"MaxPool": "MAX_POOL_2D", "AveragePool": "AVERAGE_POOL_2D"}[node.op_type]
        sides = {"filterHeight": kernel[0], "filterWidth": kernel[1], "strideH": strides[0], "strideW": strides[1]}
        self._emit(node, name, [found.tensor], True, "Pool2D", padding=self.file.schema.Padding.VALID, **sides)

    def mean(self, node: onnx.NodeProto, options: dict[str, Any]) -> None:
        axes = [2, 3] if node.op_type == "GlobalAveragePool" else self._axes(node, options)
        keep = node.op_type == "GlobalAveragePool" or bool(options.get("keepdims", 1))
        found = self.held[node.input[0]] if self._in_integers(node) else self._float(node.input[0])
        rank = len(self.shapes[node.input[0]])
        axes = [axis % rank for axis in axes]
        if found.last and axes != [2, 3]:
            raise _unknown(node, "is translated over rows and columns only")
        places = self.file.constant(np.array([1, 2] if found.last else axes, np.int32))
        kind = "SUM" if node.op_type == "ReduceSum" else "MEAN"
        self._emit(node, kind, [found.tensor, places], found.last and keep, "Reducer", keepDims=keep)

    def _axes(self, node: onnx.NodeProto, options: dict[str, Any]) -> list[int]:
        stated = self.constants.get(node.input[1]) if len(node.input) > 1 else options.get("axes")
        if stated is None:
            raise _unknown(node, "has no constant axes")
        return [int(axis) for axis in np.ravel(stated)]

    def flatten(self, node: onnx.NodeProto, options: dict[str, Any]) -> None:
        """Lay each crop's numbers in one row, in the order that ONNX has."""
        before, after = self.shapes[node.input[0]], self.shapes[node.output[0]]
        if len(after) != 2 or after[0] != before[0] or not all(after):
            raise _unknown(node, "is translated into N×D rows only")
        whole = self._in_integers(node)
        found = self.held[node.input[0]]
        if whole:
            scale, own = self._scale(whole), self.file.tensors[found.tensor].quantization
            if (float(scale.scale), scale.zero) != (float(np.float32(own.scale[0])), int(own.zeroPoint[0])):
                whole = None
        tensor = found.tensor if whole else self._float(node.input[0]).tensor
        if found.last and before[2] * before[3] > 1:
            n, h, w, c = self.file.shape(tensor)
            made = self.file.tensor([n, c, h, w], self.whole if whole else "float32")
            self.file.tensors[made].quantization = self.file.tensors[tensor].quantization
            order = self.file.constant(np.array([0, 3, 1, 2], np.int32))
            self.file.operator("TRANSPOSE", [tensor, order], made, "Transpose")
            tensor = made
        name = whole.output[0] if whole else node.output[0]
        row = self.file.tensor(
            after, self.whole if whole else "float32", quantised=self._scale(whole) if whole else None
        )
        shape = self.file.constant(np.array(after, np.int32))
        self.file.operator("RESHAPE", [tensor, shape], row, "Reshape", newShape=np.array(after, np.int32))
        self.held[name] = _Held(row, False, whole is not None)

    def transpose(self, node: onnx.NodeProto, options: dict[str, Any]) -> None:
        """Take pictures channels-first, which is a matter of names here: they stay as they are."""
        found = self._float(node.input[0])
        if list(options.get("perm", [])) != [0, 3, 1, 2] or found.last:
            raise _unknown(node, "is translated for the crops only")
        self.held[node.output[0]] = _Held(found.tensor, True)

    def gather(self, node: onnx.NodeProto, options: dict[str, Any]) -> None:
        found, chosen = self._float(node.input[0]), self.constants.get(node.input[1])
        if chosen is None or chosen.ndim != 1 or found.last:
            raise _unknown(node, "is translated for the channels of the crops only")
        places = self.file.constant(chosen.astype(np.int32))
        self._emit(node, "GATHER", [found.tensor, places], False, "Gather", axis=options.get("axis", 0))


OPERATORS: dict[str, Callable[[_Translation, onnx.NodeProto, dict[str, Any]], None]] = {
    **dict.fromkeys(BINARY, _Translation.binary),
    **dict.fromkeys(UNARY, _Translation.unary),
    **dict.fromkeys(["MaxPool", "AveragePool"], _Translation.pool),
    **dict.fromkeys(["GlobalAveragePool", "ReduceMean", "ReduceSum"], _Translation.mean),
    **dict.fromkeys(["Flatten", "Reshape"], _Translation.flatten),
    **dict.fromkeys(["Gemm", "MatMul"], _Translation.dense),
    "Cast": _Translation.cast,
    "Pow": _Translation.power,
    "Clip": _Translation.clip,
    "PRelu": _Translation.prelu,
    "BatchNormalization": _Translation.norm,
    "Conv": _Translation.conv,
    "Transpose": _Translation.transpose,
    "Gather": _Translation.gather,
}


def _shape_of(shape: tuple[int, ...], last: bool, node: onnx.NodeProto) -> tuple[int, ...]:
    if not shape or not all(shape):
        raise _unknown(node, "has an output whose shape depends on values")
    return (shape[0], *shape[2:], shape[1]) if last else shape


def _unknown(node: onnx.NodeProto, why: str) -> InputError:
    return InputError(f"LiteRT: {node.op_type} ({node.name or node.output[0]}) {why}. Leave --format litert out.")


def _build(graph: Variant, precision: str, options: BuildOptions, tell: Tell) -> Built:
    data = to_litert(graph.data)
    net = LiteRtNet(data, 1)
    made_with = f"pkd, schema of ai-edge-litert {version('ai-edge-litert')}"
    return Built({"encoder.tflite": data}, made_with, {}, net.version, net)


FORMAT = Format(
    "litert",
    ("fp32", "int8", "w8a16"),
    GraphForm("s8s8a", wide="s16s8"),
    _build,
    need_packages("litert", "ai_edge_litert", "flatbuffers"),
)
