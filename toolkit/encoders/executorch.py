"""Run an ExecuTorch program of a bundle on the CPU, in XNNPACK.

ExecuTorch's Python binding is linked to torch's own and takes nothing but its tensors. Hence torch is imported here,
and nowhere else in the toolkit outside distill/; on a device neither Python nor torch is there.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
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

_TURN = threading.Lock()
"""Lock of every call of every program: one is not safe between threads, and its pool of threads is the process's."""


class ExecuTorchNet:
    """Run a loaded program. Safe to share between threads: calls take turns."""

    def __init__(self, program: bytes, threads: int) -> None:
        with _TURN, quiet():
            try:
                import torch
                from executorch.extension.pybindings import portable_lib
                from executorch.runtime import Runtime
            except ImportError:
                raise MissingExtra("executorch", "executorch") from None
            self.version = f"executorch {version('executorch')}"
            self._tensor = torch.from_numpy
            if portable_lib._threadpool_get_thread_count() != threads:
                portable_lib._unsafe_reset_threadpool(threads)
            try:
                self._program = Runtime.get().load_program(program)  # keeps the bytes that the method reads from
                self._method = self._program.load_method("forward")
                meta = self._method.metadata
                self.shapes = (tuple(meta.input_tensor_meta(0).sizes()), tuple(meta.output_tensor_meta(0).sizes()))
                """Shapes of the input and the output."""
            except (RuntimeError, KeyError):
                raise BundleError(f"{self.version} cannot read the program. Export the bundle again.") from None

    def __call__(self, crops: Rgb) -> NDArray[np.float32]:
        """Run uint8 N×S×S×3 → float32 N×D as the program gives it, one crop after the other."""
        return np.stack([self._one(crop) for crop in crops])

    def _one(self, crop: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = self._tensor(np.ascontiguousarray(crop[None], np.float32))
        with _TURN:
            (row,) = self._method.execute([pixels])
            return np.array(row.numpy()[0], np.float32)  # a copy: the next call writes to the same memory


def open_executorch(bundle: Bundle, target: Target, file: str, threads: int) -> NetEncoder:
    """Open ``file`` (``.pte``). Raises MissingExtra, or BundleError for a program of other shapes."""
    net = ExecuTorchNet(bundle.read(file), threads)
    size = target.encoder.preprocess.size
    expected = ((1, size, size, 3), (1, target.encoder.space.dim))
    if net.shapes != expected:
        raise BundleError(f"{bundle.path / file}: takes and gives {net.shapes}, expected {expected}. Export it again.")
    return NetEncoder(target.encoder, net)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide ExecuTorch's warnings, its log, and what its C++ side writes to stderr about the processor."""
    before = logging.root.manager.disable
    sys.stderr.flush()
    stderr, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        logging.disable(logging.ERROR)
        os.dup2(nothing, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nothing)
        logging.disable(before)
