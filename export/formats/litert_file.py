"""Write LiteRT (TensorFlow Lite) files: tensors, constants and operators of one graph, as a FlatBuffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

TYPES = {"float32": "FLOAT32", "int8": "INT8", "uint8": "UINT8", "int32": "INT32", "int16": "INT16", "int64": "INT64"}
"""Numpy's names of types → the schema's."""
VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 5, "ADD": 2, "PAD": 2, "MEAN": 2}
"""Version of an operator on int8, where it is another than that on float32, which is 1."""
VERSIONS |= {"DEQUANTIZE": 2, "TRANSPOSE": 2, "MAX_POOL_2D": 2}
WIDE_VERSIONS = {"CONV_2D": 4, "DEPTHWISE_CONV_2D": 5, "FULLY_CONNECTED": 7, "ADD": 4, "PAD": 3, "MEAN": 3}
"""Version of an operator on int16."""
WIDE_VERSIONS |= {"DEQUANTIZE": 3, "TRANSPOSE": 4, "MAX_POOL_2D": 3, "QUANTIZE": 2}


@dataclass(frozen=True)
class Scale:
    """Say how int8 stands for numbers: value = scale · (step − zero), by channel or for the whole tensor."""

    scale: NDArray[np.float32]
    """One number, or one per channel."""
    zero: int = 0
    axis: int = 0
    """Axis of the channels, where there are several."""


@dataclass
class LiteRtFile:
    """Collect one graph and write it."""

    tensors: list[Any] = field(default_factory=list)
    buffers: list[Any] = field(default_factory=list)
    operators: list[Any] = field(default_factory=list)
    codes: dict[tuple[str, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema = schema
        self.buffers.append(schema.BufferT())  # the empty one, of every tensor that is computed

    def tensor(
        self,
        shape: Sequence[int],
        dtype: str,
        *,
        data: NDArray[Any] | None = None,
        quantised: Scale | None = None,
    ) -> int:
        """Add a tensor, a constant where there is ``data`` → its number."""
        made = self.schema.TensorT()
        made.shape, made.name = np.array(shape, np.int32), f"{len(self.tensors):x}".encode()
        made.type = getattr(self.schema.TensorType, TYPES[dtype])
        made.buffer = 0
        if data is not None:
            buffer = self.schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data, dtype).tobytes(), np.uint8)
            self.buffers.append(buffer)
            made.buffer = len(self.buffers) - 1
        if quantised:
            made.quantization = self.schema.QuantizationParametersT()
            made.quantization.scale = quantised.scale.reshape(-1)
            made.quantization.zeroPoint = np.full(quantised.scale.size, quantised.zero, np.int64)
            made.quantization.quantizedDimension = quantised.axis
        self.tensors.append(made)
        return len(self.tensors) - 1

    def constant(self, values: NDArray[Any], quantised: Scale | None = None) -> int:
        """Add a constant → its number."""
        return self.tensor(values.shape, values.dtype.name, data=values, quantised=quantised)

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(int(side) for side in self.tensors[tensor].shape)

    def operator(self, kind: str, inputs: Sequence[int], output: int, options: str = "", **values: Any) -> None:
        """Add an operator. ``options``: name of its options in the schema, without ``Options``, set to ``values``."""
        types = {self.tensors[i].type for i in (*inputs, output) if i >= 0}
        versions = VERSIONS if self.schema.TensorType.INT8 in types else {}
        versions = WIDE_VERSIONS if self.schema.TensorType.INT16 in types else versions
        key = kind, versions.get(kind, 1)
        made = self.schema.OperatorT()
        made.opcodeIndex = self.codes.setdefault(key, len(self.codes))
        made.inputs, made.outputs = np.array(inputs, np.int32), np.array([output], np.int32)
        if options:
            made.builtinOptionsType = getattr(self.schema.BuiltinOptions, f"{options}Options")
            made.builtinOptions = getattr(self.schema, f"{options}OptionsT")()
            for name, value in values.items():
                assert hasattr(made.builtinOptions, name), name
                setattr(made.builtinOptions, name, value)
        self.operators.append(made)

    def write(self, taken: tuple[str, int], given: tuple[str, int]) -> bytes:
        """Write the file. ``taken``, ``given``: names and numbers of the input and the output."""
        import flatbuffers

        schema = self.schema
        graph, model, signature = schema.SubGraphT(), schema.ModelT(), schema.SignatureDefT()
        graph.name, graph.tensors, graph.operators = b"main", self.tensors, self.operators
        graph.inputs, graph.outputs = np.array([taken[1]], np.int32), np.array([given[1]], np.int32)
        model.version, model.description = 3, b"pkd"
        model.subgraphs, model.buffers = [graph], self.buffers
        model.operatorCodes = []
        for kind, version in self.codes:
            code = schema.OperatorCodeT()
            code.builtinCode = getattr(schema.BuiltinOperator, kind)
            code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), version
            model.operatorCodes.append(code)
        ports = []
        for name, tensor in (taken, given):
            port = schema.TensorMapT()
            port.name, port.tensorIndex = name.encode(), tensor
            self.tensors[tensor].name = name.encode()
            ports.append(port)
        signature.inputs, signature.outputs = ports[:1], ports[1:]
        signature.signatureKey, signature.subgraphIndex = b"serving_default", 0
        model.signatureDefs = [signature]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())
