"""ExecuTorch, for phones and small boards: the ONNX graph as one program that XNNPACK computes from end to end."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import onnx

from pkd.toolkit.core.errors import InputError, PkdError, TargetUnavailable
from pkd.toolkit.encoders.executorch import quiet

AROUND = ("executorch_call_delegate", "getitem")
"""What a graph consists of whose every operation was given away."""


def to_executorch(model: bytes) -> tuple[bytes, int, str]:
    """ONNX of ``uint8_graph``, plain or quantised → ``.pte``, how many operations XNNPACK got, ExecuTorch's version.

    Bytes as tensors and a batch of any size would each leave operations outside XNNPACK: the program is given float32
    1×S×S×3, values 0 to 255, one crop at a time. INT8 keeps the graph's own ranges. Raises TargetUnavailable without
    ExecuTorch, InputError for a graph that is not XNNPACK's from end to end: the rest would run in kernels that are
    many times slower.
    """
    try:
        with quiet():
            import torch
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
    except ImportError:
        raise TargetUnavailable("executorch is not installed (pip install 'pkd[executorch]')") from None
    from pkd.export.graph.onnx_to_torch import OnnxModule

    made_with = version("executorch")
    graph = onnx.load_model_from_string(model)
    size = [1, *(d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim[1:])]
    module = OnnxModule(graph).eval()
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(module, (torch.zeros(size),), strict=False)
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            given, left = _shares(lowered.exported_program().graph_module)
            data = bytes(lowered.to_executorch().buffer)
    except PkdError:
        raise
    except Exception as error:  # torch's and ExecuTorch's errors share no base class
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"ExecuTorch {made_with} cannot convert the graph: {reason}") from None
    if left or not given:
        raise InputError(f"XNNPACK has no {', '.join(left)}, which this network needs. Leave --format executorch out.")
    return data, given, made_with


def _shares(module: Any) -> tuple[int, list[str]]:
    """How many operations went to a delegate, and the names of those that did not."""
    called = [node for node in module.graph.nodes if node.op == "call_function"]
    names = [getattr(node.target, "__name__", str(node.target)) for node in called]
    inner = [getattr(module, node.target) for node in module.graph.nodes if node.op == "get_attr"]
    given = [node for part in inner for node in part.original_module.graph.nodes if node.op == "call_function"]
    return len(given), sorted({name for name in names if name not in AROUND})
