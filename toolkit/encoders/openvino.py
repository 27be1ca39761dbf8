"""Run an OpenVINO model of a bundle on the CPU, in the precision it was made for and no other."""

from __future__ import annotations

import threading
from pathlib import PurePosixPath
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.errors import MissingExtra, TargetUnavailable
from pkd.toolkit.encoders.base import NetEncoder
from pkd.toolkit.images.codec import Rgb

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""Precision → what floating-point layers compute in. Unpinned, OpenVINO takes bf16 wherever the processor has it."""


FIXED = 4
"""Batch sizes that get a model of their own, the first that are met: servers and loops know one or two."""


class OpenVinoModel:
    """Run IR on the CPU with the precision pinned. Safe to share between threads.

    A model of a fixed batch size is faster than one of any size, for single crops most of all.
    """

    def __init__(self, model: bytes, weights: bytes, precision: str, threads: int) -> None:
        """Compile. Raises MissingExtra, or TargetUnavailable for a precision that this processor lacks."""
        try:
            import openvino
        except ImportError:
            raise MissingExtra("openvino", "openvino") from None
        hint = HINTS[precision]
        self.version = f"openvino {str(openvino.__version__).split('-')[0]}"
        self._core = openvino.Core()
        self._source = model, weights
        self._settings = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._lock = threading.Lock()
        self._fixed: dict[int, _Requests] = {}
        self._any = self._compile(None)
        taken = self._any.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if taken != hint:
            raise TargetUnavailable(
                f"OpenVINO computes in {taken} on this processor, not in {hint}. Use another target."
            )

    def __call__(self, crops: Rgb) -> NDArray[np.float32]:
        """Run uint8 N×S×S×3 → float32 N×D as the network gives it."""
        return self._for(len(crops)).infer(crops)

    def _for(self, batch: int) -> _Requests:
        with self._lock:
            if batch not in self._fixed and len(self._fixed) < FIXED:
                self._fixed[batch] = self._compile(batch)
            return self._fixed.get(batch, self._any)

    def _compile(self, batch: int | None) -> _Requests:
        model = self._core.read_model(*self._source)
        if batch is not None:
            model.reshape([batch, *(side.get_length() for side in list(model.input(0).get_partial_shape())[1:])])
        return _Requests(self._core.compile_model(model, "CPU", self._settings))


class _Requests:
    """Keep a compiled model and idle inference requests: to make a request costs more than a crop."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._idle: SimpleQueue[Any] = SimpleQueue()

    def infer(self, crops: Rgb) -> NDArray[np.float32]:
        try:
            request = self._idle.get_nowait()
        except Empty:
            request = self.compiled.create_infer_request()
        rows = np.array(request.infer([crops])[0], np.float32)  # a copy: the request's own memory is used again
        self._idle.put(request)
        return rows


def open_openvino(bundle: Bundle, target: Target, file: str, threads: int) -> NetEncoder:
    """Open ``file`` (IR, weights beside it). Raises MissingExtra, or TargetUnavailable for a lacking precision."""
    weights = str(PurePosixPath(file).with_suffix(".bin"))
    return NetEncoder(target.encoder, OpenVinoModel(bundle.read(file), bundle.read(weights), target.precision, threads))
