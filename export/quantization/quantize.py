"""Quantise graphs to INT8 statically: weights per output channel, activations by their range on real crops.

The ranges are measured once; a graph is then quantised as often as needed: in two forms, with layers left in float32,
and with each layer left out in turn to see what it costs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
from onnx import shape_inference
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from pkd.export.options import RangeMethod
from pkd.export.quantization.ranges import Ranges, observe
from pkd.toolkit.core.models import Record
from pkd.toolkit.encoders.base import Embeddings, batches, make_session, unit_rows
from pkd.toolkit.images.codec import Rgb

LINEAR = ("Conv", "Gemm", "MatMul")
"""Layers that INT8 makes smaller, and that can be left in float32."""
OPERATORS = (*LINEAR, "Add")
AROUND = ("Relu", "Clip", "PRelu")
"""Their outputs feed quantised layers, so their ranges are needed, too."""
COMMON = {"WeightSymmetric": True, "MatMulConstBOnly": True, "QuantizeBias": False}
"""Biases stay in float32: TensorRT refuses int32 ones, and onnxruntime makes them itself, to the same bits."""
INT8_TYPES: dict[str, tuple[QuantType, dict[str, bool]]] = {
    "u8s8": (QuantType.QUInt8, COMMON),
    "s8s8": (QuantType.QInt8, {**COMMON, "ActivationSymmetric": True}),
    "s8s8a": (QuantType.QInt8, COMMON),
    "u16s8": (QuantType.QUInt16, COMMON),
    "s16s8": (QuantType.QInt16, {**COMMON, "ActivationSymmetric": True}),
}
"""Name → type of the activations, and options. ``u8s8``: unsigned with an offset, what x86 has instructions for.
``s8s8``: signed without offset, the only one that TensorRT takes. ``s8s8a``: signed with an offset, LiteRT's own.
``u16s8``: activations of 16 bits with an offset, the weights as in the others; the precision ``w8a16``.
``s16s8``: the same without an offset, LiteRT's 16x8."""


class LayerCost(Record):
    """Say how much of the error of an INT8 graph is one layer's."""

    layer: str
    operator: str
    saved: float
    """Pairwise-similarity RMS of the whole INT8 graph less the same with this layer in float32. Larger: costlier."""


def calibrate(graph: onnx.ModelProto, crops: Rgb, method: RangeMethod, advance: Callable[[int], None]) -> Ranges:
    """Choose the range of every activation that INT8 may touch, on ``crops`` uint8 N×S×S×3."""
    constant = {tensor.name for tensor in graph.graph.initializer}
    touched = [n for n in graph.graph.node if n.op_type in (*OPERATORS, *AROUND) and not _ours(n)]
    names = [name for n in touched for name in [*n.input, *n.output] if name and name not in constant]
    return observe(graph, list(dict.fromkeys(names)), crops, method, advance)


def quantise(graph: onnx.ModelProto, ranges: Ranges, int8: str, keep: Sequence[str] = ()) -> onnx.ModelProto:
    """Return a copy of ``graph`` with QuantizeLinear and DequantizeLinear around every linear layer.

    ``int8``: one of ``INT8_TYPES``. ``keep``: names of layers that stay in float32. Preprocessing and the division by
    the length always do.
    """
    activation, options = INT8_TYPES[int8]
    data = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    with _quiet():
        quantiser = QDQQuantizer(
            shape_inference.infer_shapes(graph),
            True,  # weights per channel
            False,  # all eight bits
            QuantType.QInt8,
            activation,
            TensorsData(CalibrationMethod.MinMax, data),
            [],
            [*keep, *(node.name for node in graph.graph.node if _ours(node))],
            list(OPERATORS),
            options,
        )
        quantiser.quantize_model()
        quantiser.model.topological_sort()
    made: onnx.ModelProto = quantiser.model.model
    made.producer_name, made.producer_version = graph.producer_name, graph.producer_version
    return made


def layers(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """List the layers that INT8 computes, in the order of the graph."""
    constant = {tensor.name for tensor in graph.graph.initializer}
    return [n for n in graph.graph.node if n.op_type in LINEAR and not _ours(n) and n.input[1] in constant]


def sensitivity(
    graph: onnx.ModelProto,
    ranges: Ranges,
    int8: str,
    crops: Rgb,
    advance: Callable[[int], None],
    expected: Embeddings | None = None,
) -> list[LayerCost]:
    """Measure what each layer costs in INT8, costliest first: the error with all in INT8 less that with it in float32.

    ``crops``: uint8 N×S×S×3 that did not take part in the calibration. ``expected``: the N×D unit rows that errors are
    measured against, by default those of ``graph`` itself.
    """
    expected = embeddings(graph, crops) if expected is None else expected
    whole = similarity_rms(embeddings(quantise(graph, ranges, int8), crops), expected)
    costs = []
    for node in layers(graph):
        without = embeddings(quantise(graph, ranges, int8, [node.name]), crops)
        saved = whole - similarity_rms(without, expected)
        costs.append(LayerCost(layer=node.name, operator=node.op_type, saved=saved))
        advance(1)
    return sorted(costs, key=lambda cost: -cost.saved)


def embeddings(graph: onnx.ModelProto, crops: Rgb) -> Embeddings:
    """Embed uint8 N×S×S×3 in onnxruntime as float32 N×D unit rows."""
    session = make_session(graph.SerializeToString(), 1)
    taken = session.get_inputs()[0].name
    parts = [session.run(None, {taken: crops[c.start : c.stop]})[0] for c in batches(len(crops), 32)]
    return unit_rows(np.concatenate(parts))


def similarity_rms(rows: Embeddings, expected: Embeddings) -> float:
    """Return the root mean square difference of the cosines of all pairs of N×D unit rows: an error as matching sees.

    A row's cosine to its own reference hides it: errors that all rows share leave similarities alone, and others ruin
    them at 0.9999.
    """
    upper = np.triu_indices(len(rows), 1)
    difference = (rows @ rows.T - expected @ expected.T)[upper]
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))


def _ours(node: onnx.NodeProto) -> bool:
    """Tell preprocessing and normalisation, by the names that graph/build.py gives them."""
    return bool(node.name.startswith("pkd/"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence onnxruntime's advice on the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
