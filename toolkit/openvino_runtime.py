"""Run an OpenVINO model of a bundle on the CPU, in the precision it was made for and no other."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import numpy as np

from pkd.toolkit.bundle import Bundle
from pkd.toolkit.errors import MissingExtra, TargetUnavailable
from pkd.toolkit.images import Rgb
from pkd.toolkit.runtime import Embeddings, unit_rows
from pkd.toolkit.space import EncoderInfo
from pkd.toolkit.target import Target

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""Precision → what floating-point layers compute in. Unpinned, OpenVINO takes bf16 wherever the processor has it."""


class OpenVinoEncoder:
    """An encoder in OpenVINO. Safe to share between threads: each call has an inference request of its own."""

    def __init__(self, info: EncoderInfo, model: Any) -> None:
        self.info = info
        self._model = model

    def embed(self, crops: Rgb) -> Embeddings:
        """uint8 N×H×W×3 RGB → float32 N×D with unit rows. Raises InputError or BadVector."""
        self.info.preprocess.check(crops)
        if not len(crops):
            return np.empty((0, self.info.space.dim), np.float32)
        (rows,) = self._model.create_infer_request().infer([crops]).values()
        return unit_rows(np.asarray(rows, np.float32), self.info.name)


def open_openvino(bundle: Bundle, target: Target, file: str, threads: int) -> OpenVinoEncoder:
    """Open ``file`` (IR, weights beside it). Raises MissingExtra, or TargetUnavailable for a lacking precision."""
    weights = str(PurePosixPath(file).with_suffix(".bin"))
    compiled = compile_model(bundle.read(file), bundle.read(weights), target.precision, threads)
    return OpenVinoEncoder(target.encoder, compiled)


def compile_model(model: bytes, weights: bytes, precision: str, threads: int) -> Any:
    """IR for the CPU with the precision pinned. Raises as ``open_openvino``."""
    try:
        import openvino
    except ImportError:
        raise MissingExtra("openvino", "openvino") from None
    hint = HINTS[precision]
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(model, weights), "CPU", settings)
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if taken != hint:
        raise TargetUnavailable(f"OpenVINO computes in {taken} on this processor, not in {hint}. Use another target.")
    return compiled
