"""Build ExecuTorch targets, for phones and small boards: one program that XNNPACK computes from end to end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from pkd.export.formats.base import Built, Format, Tell, need_packages
from pkd.export.graph.precision_variants import GraphForm, Variant
from pkd.export.options import BuildOptions
from pkd.toolkit.core.errors import InputError, PkdError, plain_reason
from pkd.toolkit.encoders.executorch import ExecuTorchNet, quiet

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pkd.toolkit.distill.models.onnx_graph import Node, Translate

AROUND = ("executorch_call_delegate", "getitem")
"""Calls that remain in a graph whose every operation was given to XNNPACK."""


def to_executorch(model: bytes) -> tuple[bytes, int, str]:
    """Convert the ONNX of ``uint8_graph`` to ``.pte``, the number of operations that XNNPACK got, ExecuTorch's version.

    The graph is plain or quantised, and INT8 keeps its ranges. The program takes float32 1×S×S×3, values 0 to 255, one
    crop at a time: bytes as tensors and a batch of any size would each leave operations outside XNNPACK. Raises
    InputError for a graph that is not XNNPACK's from end to end: the rest would run in kernels that are many times
    slower.
    """
    with quiet():
        import torch
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

    made_with = version("executorch")
    graph = onnx.load_model_from_string(model)
    size = [1, *(d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim[1:])]
    module = torch_module(graph)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(module, (torch.zeros(size),), strict=False)
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            given, left = _shares(lowered.exported_program().graph_module)
            data = bytes(lowered.to_executorch().buffer)
    except PkdError:
        raise
    except Exception as error:  # torch's and ExecuTorch's errors share no base class
        raise InputError(
            f"ExecuTorch {made_with} cannot convert the graph: {plain_reason(error)} Leave --format executorch out."
        ) from None
    if left or not given:
        raise InputError(f"XNNPACK has no {', '.join(left)}, which this network needs. Leave --format executorch out.")
    return data, given, made_with


def _shares(module: Any) -> tuple[int, list[str]]:
    """Count the operations that went to a delegate, and name those that did not."""
    called = [node for node in module.graph.nodes if node.op == "call_function"]
    names = [getattr(node.target, "__name__", str(node.target)) for node in called]
    inner = [getattr(module, node.target) for node in module.graph.nodes if node.op == "get_attr"]
    given = [node for part in inner for node in part.original_module.graph.nodes if node.op == "call_function"]
    return len(given), sorted({name for name in names if name not in AROUND})


def torch_module(model: onnx.ModelProto) -> nn.Module:
    """Translate a graph of ``uint8_graph``, plain or quantised: float32 N×S×S×3 with the values 0 to 255 → float32 N×D.

    Raises InputError for an operator, or a use of one, that is not translated.
    """
    from pkd.toolkit.distill.models.onnx_graph import OnnxModule
    from pkd.toolkit.distill.models.onnx_operators import OPERATORS

    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:]
    made.graph.node.extend(_own_dequantisers(model.graph.node))
    return OnnxModule(made, {**OPERATORS, **_quantised()}, remedy="Leave --format executorch out.").eval()


def _own_dequantisers(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield the nodes with a DequantizeLinear of its own for each reader: XNNPACK looks for layers between them."""
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


def _quantised() -> Mapping[str, Translate]:
    """Return the operators that only these graphs have, and those that XNNPACK wants in another form."""
    import torch
    from torch import nn
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers torch.ops.quantized_decomposed
    from torch.nn.functional import linear

    from pkd.toolkit.distill.models.onnx_graph import Bound, Function, need

    operators = torch.ops.quantized_decomposed

    def zero_of(node: Node) -> int:
        """Return the offset moved to signed bytes: the same 256 steps, in the type that XNNPACK computes with."""
        zero = node.constant(2)
        assert zero is not None
        return int(zero) - (128 if zero.dtype == np.uint8 else 0)

    def quantise(node: Node) -> nn.Module:
        scale = node.constant(1)
        need(scale is not None and scale.size == 1, "with one scale for the whole tensor")
        step, zero = float(np.asarray(scale)), zero_of(node)
        return Function(lambda x: operators.quantize_per_tensor(x, step, zero, -128, 127, torch.int8))

    def dequantise(node: Node) -> nn.Module:
        scale = node.constant(1)
        assert scale is not None
        if scale.size == 1:
            step, zero = float(scale.reshape(())), zero_of(node)

            def whole(x: Tensor, *_: Tensor) -> Tensor:
                made: Tensor = operators.dequantize_per_tensor(x, step, zero, -128, 127, torch.int8)
                return made

            return Bound(node, whole)
        axis = node.options.get("axis", 1)
        weight = node.constant(0)
        need(weight is None or weight.dtype == np.int8, "of signed weights")

        def by_channel(x: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
            made: Tensor = operators.dequantize_per_channel(x, scales, zeros, axis, -127, 127, torch.int8)
            return made

        return Bound(node, by_channel, trained=False)

    class RowSum(nn.Module):
        """Sum the numbers of each row: XNNPACK has no sum, but products with a row of ones."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.register_buffer("ones", torch.ones(1, width))

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, self.get_buffer("ones"))

    def row_sum(node: Node) -> nn.Module:
        shape = node.shape()
        keeps = node.options.get("keepdims", 1) and node.setting("axes", 1) in ([1], [-1])
        need(len(shape) == 2 and shape[1] > 0 and bool(keeps), "of an embedding")
        return RowSum(shape[1])

    def cast(node: Node) -> nn.Module:
        need(node.options["to"] == onnx.TensorProto.FLOAT, "of the crops to float32")
        return nn.Identity()

    return {"Cast": cast, "DequantizeLinear": dequantise, "QuantizeLinear": quantise, "ReduceSum": row_sum}


def _build(graph: Variant, precision: str, options: BuildOptions, tell: Tell) -> Built:
    program, given, made_with = to_executorch(graph.data)
    net = ExecuTorchNet(program, 1)
    settings = {"xnnpack_operations": given}
    return Built({"encoder.pte": program}, f"executorch {made_with}", {**settings}, net.version, net)


FORMAT = Format(
    "executorch", ("fp32", "int8"), GraphForm("u8s8"), _build, need_packages("executorch", "executorch", "torch")
)
