"""Build ncnn targets, for phones and small boards: the ONNX graph converted by pnnx, in float32."""

from __future__ import annotations

import importlib.util
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from onnx import TensorProto

from pkd.export.formats.base import Built, Format, Tell, need_packages
from pkd.export.graph.build import serialise
from pkd.export.graph.precision_variants import GraphForm, Variant
from pkd.export.options import BuildOptions
from pkd.toolkit.core.errors import InputError, plain_reason
from pkd.toolkit.encoders.ncnn import NcnnNet

SECONDS = 300
"""Time limit of pnnx, which says nothing while it works. Small networks take two seconds."""


def to_ncnn(model: bytes) -> tuple[bytes, bytes, str]:
    """Convert the ONNX of ``uint8_graph`` to ``.param``, ``.bin`` and pnnx's version.

    ncnn has neither bytes as tensors nor a batch, so the file takes float32 S×S×3, values 0 to 255, one crop at a time.
    Raises InputError if it converts to something that ncnn does not have.
    """
    found = importlib.util.find_spec("pnnx")
    program = Path(str(found and found.origin)).with_name("pnnx")
    graph = onnx.load_model_from_string(model)
    shape = [1, *(d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim[1:])]
    with TemporaryDirectory() as folder:
        source = Path(folder, "encoder.onnx")
        source.write_bytes(serialise(_float_pixels(graph)))
        command = [str(program), source.name, f"inputshape=[{','.join(map(str, shape))}]", "fp16=0"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise InputError(f"pnnx did not convert the graph within {SECONDS} seconds.") from None
        param, weights = source.with_suffix(".ncnn.param"), source.with_suffix(".ncnn.bin")
        if done.returncode or not param.is_file() or not weights.is_file():
            said = plain_reason(RuntimeError((done.stderr or done.stdout).strip()))
            raise InputError(f"pnnx cannot convert the graph: {said} Leave --format ncnn out.")
        text = param.read_text()
        kinds = [line.split()[0] for line in text.splitlines()[2:] if line.strip()]
        unknown = sorted({kind for kind in kinds if "." in kind or "::" in kind})  # left as torch's or ONNX's
        if unknown:
            raise InputError(f"ncnn has no {', '.join(unknown)}, which this network needs. Leave --format ncnn out.")
        return text.encode(), weights.read_bytes(), _version()


def _float_pixels(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give the graph float pixels for input, in place, by leaving out its first node, the Cast from bytes."""
    graph = model.graph
    taken, cast = graph.input[0], graph.node[0]
    if cast.op_type != "Cast" or cast.input[0] != taken.name:
        raise InputError("the graph does not begin with a cast from bytes. Export the source again.")
    taken.type.tensor_type.elem_type = TensorProto.FLOAT
    cast.op_type = "Identity"
    del cast.attribute[:]
    return model


def _version() -> str:
    try:
        return version("pnnx")
    except PackageNotFoundError:
        return "of unknown version"


def _build(graph: Variant, precision: str, options: BuildOptions, tell: Tell) -> Built:
    param, weights, made_with = to_ncnn(graph.data)
    net = NcnnNet(param, weights, 1)
    return Built({"encoder.param": param, "encoder.bin": weights}, f"pnnx {made_with}", {}, net.version, net)


FORMAT = Format("ncnn", ("fp32",), GraphForm("u8s8"), _build, need_packages("ncnn", "pnnx", "ncnn"))
