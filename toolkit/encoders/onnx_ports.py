"""Read how an ONNX encoder takes pixels and gives embeddings: layout, types, which output, and how crops are fed.

Encoders of other projects differ here: TensorFlow's take N×S×S×3, halved ones float16, some bytes, some end in
N×D×1×1 or N×1×1×D, or give more than the embedding. What is unambiguous is obeyed; the rest is refused with a remedy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pkd.toolkit.core.errors import InputError, plain_reason
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.images.codec import Rgb

DTYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}


@dataclass(frozen=True)
class InputPort:
    """Say how a network takes pixels."""

    name: str
    dtype: type[np.generic]
    nhwc: bool
    """True for N×S×S×3, False for N×3×S×S."""
    batch: int | None
    """Batch size that the file is fixed to; None where it takes any."""

    def feed(self, crops: Rgb, preprocess: Preprocess) -> NDArray[np.generic]:
        """Scale uint8 N×S×S×3 RGB crops and give them the network's layout and type."""
        pixels = preprocess(crops)
        if self.nhwc:
            pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        return pixels.astype(self.dtype, copy=False)


@dataclass(frozen=True)
class Ports:
    """Say how a network takes pixels, and which output is the embedding."""

    input: InputPort
    output: str
    dim: int
    flat: bool
    """True for an output of N×D, False for one with further dimensions of 1."""


def read_input(session: ort.InferenceSession, preprocess: Preprocess, source: Path) -> InputPort:
    """Read the one input, as ``read_inputs``; of two layouts the first."""
    return read_inputs(session, preprocess, source)[0]


def read_inputs(session: ort.InferenceSession, preprocess: Preprocess, source: Path) -> list[InputPort]:
    """Read the one input; where a file leaves open which layout it takes, both are given, N×3×S×S first.

    Raises InputError that names layout, type and size as they are, and what to do.
    """
    ports, size = session.get_inputs(), preprocess.size
    if len(ports) != 1:
        raise InputError(f"{source}: it has {len(ports)} inputs, expected one. Give an encoder of faces.")
    port = ports[0]
    has = f"{source}: its input is {port.type.removeprefix('tensor(').rstrip(')')} {'×'.join(map(str, port.shape))}"
    if port.type not in DTYPES:
        raise InputError(
            f"{has}; pkd feeds float32, float16, float64 or uint8. Cast it in the graph, and export it again."
        )
    if len(port.shape) == 3:
        raise InputError(
            f"{has}, expected N×3×{size}×{size} or N×{size}×{size}×3. Export it again with a batch dimension."
        )
    if len(port.shape) != 4:
        raise InputError(f"{has}, expected an image, N×3×{size}×{size} or N×{size}×{size}×3. Give an encoder of faces.")
    nchw, nhwc = (_fits(port.shape[1:], shape) for shape in ((3, size, size), (size, size, 3)))
    if not nchw and not nhwc:
        raise InputError(f"{has}, expected N×3×{size}×{size} or N×{size}×{size}×3. {_remedy(port.shape[1:])}")
    if port.type == "tensor(uint8)" and not preprocess.scales_nothing:
        raise InputError(f"{has}: it takes bytes and scales them itself. State mean=0,std=1 with the preprocessing.")
    batch = port.shape[0] if isinstance(port.shape[0], int) else None
    layouts = [nhwc for nhwc, fits in ((False, nchw), (True, nhwc)) if fits]
    return [InputPort(port.name, DTYPES[port.type], nhwc, batch) for nhwc in layouts]


def readable_outputs(session: ort.InferenceSession, source: Path) -> list[str]:
    """List the outputs whose type has a counterpart in numpy. Raises InputError where there is none."""
    outputs = session.get_outputs()
    names = [port.name for port in outputs if port.type.startswith("tensor(") and "bfloat16" not in port.type]
    if not names:
        shown = ", ".join(f"{port.name} {port.type}" for port in outputs)
        raise InputError(
            f"{source}: it gives {shown}. Cast its embedding to float32 in the graph, and export it again."
        )
    return names


def choose_output(outputs: Mapping[str, NDArray[np.generic]], crops: int, source: Path) -> str:
    """Choose the output that is the embedding, by what each gave for ``crops`` crops; returns its name.

    Raises InputError where none or several could be it.
    """
    found = {name: _dimension(values, crops) for name, values in outputs.items()}
    fitting = {name: dim for name, dim in found.items() if dim > 1}
    shown = ", ".join(f"{name} {values.dtype} {'×'.join(map(str, values.shape))}" for name, values in outputs.items())
    if not fitting:
        raise InputError(
            f"{source}: for {crops} crop{'s' * (crops > 1)} it gives {shown}; an embedding is float {crops}×D with D "
            "above 1. Flatten or pool what it ends with, or keep another output, and export it again."
        )
    if len(fitting) > 1:
        raise InputError(
            f"{source}: several of its outputs could be the embedding: {shown}. Keep one, for example with "
            f'onnx.utils.extract_model("{source.name}", "one.onnx", ["INPUT"], ["{next(iter(fitting))}"]).'
        )
    return next(iter(fitting))


def load_refusal(error: Exception) -> str:
    """Say why onnxruntime does not load a file, and what to do, in words of our own: its are C++ and protobuf."""
    text = str(error)
    if found := re.search(r"No Op registered for (\S+) with domain_version of (\d+)", text):
        return (
            f"its operator {found[1]} is none of opset {found[2]} that this onnxruntime knows. Export it with standard "
            "operators, or upgrade onnxruntime."
        )
    if found := re.search(r"(\S+?)\(-?\d+\) is not a registered function/op", text):
        return f"its operator {found[1]} is unknown to this onnxruntime. Export it with standard operators."
    if found := re.search(r"[Oo]pset (\d+) is under development.*?till opset (\d+)", text, re.DOTALL):
        return (
            f"its opset {found[1]} is newer than {found[2]}, the last that this onnxruntime reads. Export it with that."
        )
    if found := re.search(r"IR version: (\d+), max supported IR version: (\d+)", text):
        return (
            f"its IR version {found[1]} is newer than {found[2]}, the last that is read. Export it with an older onnx."
        )
    if "protobuf" in text or "No graph" in text:
        return "it is no whole ONNX file. Export it again, or copy it again."
    remedy = "Check it with onnx.checker.check_model, and export it again."
    return f"onnxruntime cannot load it: {plain_reason(error)} {remedy}"


def flat_rows(values: NDArray[np.generic]) -> NDArray[np.float32]:
    """Bring N×D of any float type, with further dimensions of 1 or without, to float32 N×D."""
    return np.asarray(values, np.float32).reshape(len(values), -1)


def _dimension(values: NDArray[np.generic], crops: int) -> int:
    """Return D of floats N×D, N×D×1×1, N×1×1×D and the like, 0 for anything else."""
    if values.dtype not in (np.float16, np.float32, np.float64) or values.ndim < 2 or len(values) != crops:
        return 0
    long = [length for length in values.shape[1:] if length != 1]
    return (long or [1])[0] if len(long) < 2 else 0


def _fits(shape: list[object], expected: tuple[int, ...]) -> bool:
    return all(not isinstance(d, int) or d == e for d, e in zip(shape, expected, strict=True))


def _remedy(shape: list[object]) -> str:
    sides = [d for d in shape if d != 3]
    if len(sides) == 2 and sides[0] == sides[1]:
        return f"State its crop size with the preprocessing: size={sides[0]}."
    if len(sides) == 2:
        return "pkd's crops are square. Give an encoder of square crops."
    return "pkd's crops have three channels. Give an encoder of colour crops."
