"""Write the form that the compilers of NPUs take (RKNN, QNN, Hailo): the network alone, in float32, of fixed shapes.

They quantise by themselves and put scaling in front by themselves; so the graph has neither uint8 pixels, nor scaling,
nor the division by the length. The target's settings say what a device has to do instead.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, shape_inference, version_converter

from pkd.export.checks.parity import onnx_runner
from pkd.export.formats.base import ORT, Built, Format, Tell
from pkd.export.graph.build import network_of, opset_of, serialise
from pkd.export.graph.precision_variants import GraphForm, Settings, Variant
from pkd.export.options import BuildOptions
from pkd.toolkit.core.cli_support import tool_version
from pkd.toolkit.core.errors import InputError, plain_reason
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import unit_rows
from pkd.toolkit.images.codec import Rgb

OPSET = 17
"""Newest opset of the file; older graphs keep their own."""
PIXELS, FEATURES = "pixels", "features"
"""Names of input and output."""


def to_npu(model: bytes, size: int, dim: int) -> bytes:
    """Cut the network out of the ONNX of ``uint8_graph``: ``pixels`` float32 1×3×S×S → ``features`` float32 1×D.

    Pixels are scaled and in the network's channel order; features have any length. Raises InputError for a network that
    opset 17 cannot express, or whose shapes depend on its values.
    """
    network = network_of(onnx.load_model_from_string(model))
    try:
        if opset_of(network) > OPSET:
            network = version_converter.convert_version(network, OPSET)
        _fix_ports(network.graph, size, dim)
        network = shape_inference.infer_shapes(network, check_type=True, strict_mode=True, data_prop=True)
        onnx.checker.check_model(network, full_check=True)
    except Exception as error:  # onnx's errors share no public base class
        raise InputError(
            f"--format npu: this network cannot be written in opset {OPSET} with fixed shapes: {plain_reason(error)} "
            "Leave --format npu out."
        ) from None
    for value in network.graph.value_info:
        if not all(side.dim_value for side in value.type.tensor_type.shape.dim):
            raise InputError(f"--format npu: the shape of {value.name} depends on values. Leave --format npu out.")
    return serialise(network)


def _fix_ports(graph: onnx.GraphProto, size: int, dim: int) -> None:
    """Name input and output, and give them a batch of one."""
    new = {graph.input[0].name: PIXELS, graph.output[0].name: FEATURES}
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = new.get(name, name)
    graph.input[0].CopyFrom(helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, [1, 3, size, size]))
    graph.output[0].CopyFrom(helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, [1, dim]))
    del graph.value_info[:]


def _settings(preprocess: Preprocess, opset: int) -> Settings:
    numbers = {"mean": np.ravel(preprocess.mean), "std": np.ravel(preprocess.std)}
    return {
        "opset": opset,
        "input": f"{PIXELS}: float32 1×3×{preprocess.size}×{preprocess.size}, (pixel − mean) / std of 0 to 255",
        "output": f"{FEATURES}: float32 1×D; divide by its length for the embedding",
        "channels": preprocess.channels,
        **{name: ", ".join(f"{value:g}" for value in values) for name, values in numbers.items()},
    }


def _build(graph: Variant, precision: str, options: BuildOptions, tell: Tell) -> Built:
    preprocess, dim = graph.encoder.preprocess, graph.encoder.space.dim
    data = to_npu(graph.data, preprocess.size, dim)
    run = onnx_runner(data, preprocess, "the graph for NPUs")

    def embed(crops: Rgb) -> NDArray[np.float32]:
        return unit_rows(np.concatenate([run(crop[None]) for crop in crops]), graph.encoder.name)

    opset = opset_of(onnx.load_model_from_string(data))
    return Built({"encoder.onnx": data}, tool_version(), _settings(preprocess, opset), ORT, embed)


FORMAT = Format("npu", ("fp32",), GraphForm(""), _build)
