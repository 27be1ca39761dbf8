"""Run a LiteRT (TensorFlow Lite) file of a bundle on the CPU, in XNNPACK where that has the operator."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.errors import BundleError, MissingExtra
from pkd.toolkit.encoders.base import NetEncoder
from pkd.toolkit.images.codec import Rgb


class LiteRtNet:
    """Run a loaded file. Safe to share between threads: calls take turns, for an interpreter keeps its tensors."""

    def __init__(self, model: bytes, threads: int) -> None:
        """Load ``.tflite``. Raises MissingExtra, or BundleError for what is none."""
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError:
            raise MissingExtra("ai-edge-litert", "litert") from None
        self.version = f"ai-edge-litert {version('ai-edge-litert')}"
        self._turn = threading.Lock()
        try:
            with _quiet():
                self._interpreter = Interpreter(model_content=model, num_threads=threads)
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError):
            raise BundleError(f"{self.version} cannot read the file. Export the bundle again.") from None
        (taken,), (given,) = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        self._taken, self._given = int(taken["index"]), int(given["index"])
        self.ports = (tuple(taken["shape"].tolist()), taken["dtype"]), (tuple(given["shape"].tolist()), given["dtype"])
        """Shape and type of the input and the output."""

    def __call__(self, crops: Rgb) -> NDArray[np.float32]:
        """Run uint8 N×S×S×3 → float32 N×D as the file gives it, one crop after the other."""
        return np.stack([self._one(crop) for crop in crops])

    def _one(self, crop: NDArray[np.uint8]) -> NDArray[np.float32]:
        with self._turn:
            self._interpreter.set_tensor(self._taken, np.ascontiguousarray(crop[None]))
            self._interpreter.invoke()
            return np.array(self._interpreter.get_tensor(self._given)[0], np.float32)


def open_litert(bundle: Bundle, target: Target, file: str, threads: int) -> NetEncoder:
    """Open ``file`` (``.tflite``). Raises MissingExtra, or BundleError for a file of other shapes."""
    net = LiteRtNet(bundle.read(file), threads)
    size = target.encoder.preprocess.size
    expected = ((1, size, size, 3), np.uint8), ((1, target.encoder.space.dim), np.float32)
    if net.ports != expected:
        raise BundleError(f"{bundle.path / file}: takes and gives {net.ports}, expected {expected}. Export it again.")
    return NetEncoder(target.encoder, net)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what LiteRT's C++ side writes to stderr: which delegate it made."""
    sys.stderr.flush()
    stderr, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nothing)
