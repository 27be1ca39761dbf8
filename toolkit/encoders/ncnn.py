"""Run an ncnn model of a bundle on the CPU, in float32 and without the GPU."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.errors import BundleError, MissingExtra
from pkd.toolkit.encoders.base import NetEncoder
from pkd.toolkit.images.codec import Rgb

PINNED = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage", "use_vulkan_compute")
"""Options of ncnn that change the numbers, all off; on ARM it would compute in float16 by itself."""


class NcnnNet:
    """Run a loaded network. Safe to share between threads: each call has an extractor of its own."""

    def __init__(self, param: bytes, weights: bytes, threads: int) -> None:
        try:
            import ncnn
        except ImportError:
            raise MissingExtra("ncnn", "ncnn") from None
        self.version = f"ncnn {ncnn.__version__}"
        self._ncnn = ncnn
        self._weights = weights  # ncnn reads from this memory for as long as it lives
        self._net: Any = ncnn.Net()
        for option in PINNED:
            setattr(self._net.opt, option, False)
        self._net.opt.num_threads = threads
        if self._net.load_param_mem(param.decode()) != 0:
            raise BundleError("ncnn cannot read the network. Export the bundle again.")
        self._net.load_model_mem(weights)

    def __call__(self, crops: Rgb) -> NDArray[np.float32]:
        """Run uint8 N×S×S×3 → float32 N×D as the network gives it, one crop after the other."""
        return np.stack([self._one(crop) for crop in crops])

    def _one(self, crop: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = np.ascontiguousarray(crop, np.float32)
        borrowed = self._ncnn.Mat(pixels)  # of numpy's memory: neither aligned as ncnn needs it nor kept alive by it
        extractor = self._net.create_extractor()
        extractor.input("in0", borrowed.clone())
        _, row = extractor.extract("out0")
        return np.array(row, np.float32).reshape(-1)


def open_ncnn(bundle: Bundle, target: Target, file: str, threads: int) -> NetEncoder:
    """Open ``file`` (``.param``, weights beside it). Raises MissingExtra or BundleError."""
    weights = str(PurePosixPath(file).with_suffix(".bin"))
    return NetEncoder(target.encoder, NcnnNet(bundle.read(file), bundle.read(weights), threads))
