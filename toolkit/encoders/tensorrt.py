"""Run a TensorRT engine of a bundle, on the GPU and with the TensorRT that it was built for and on no other.

One code for ``tensorrt`` 10, ``tensorrt`` 11 and ``tensorrt_rtx``: what it uses of them is the same. See
docs/tensorrt.md for what of it was run.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.errors import BundleError, MissingExtra, PkdError, TargetUnavailable
from pkd.toolkit.core.gpu import find_gpu
from pkd.toolkit.encoders.base import NetEncoder, batches
from pkd.toolkit.encoders.cuda_buffers import CudaMemory, enter_device
from pkd.toolkit.images.codec import Rgb

Settings = Mapping[str, str | int | float | bool]
EXTRAS = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}
"""Package → the extra of pkd that installs it, which is also what pkd-export --format calls it."""


class TensorRtEncoder(NetEncoder):
    """Run an encoder in TensorRT. Safe to share between threads: each call has an execution context to itself."""

    def __init__(self, info: EncoderInfo, engine: Any, ports: tuple[str, str]) -> None:
        """Take ``ports``: names of the engine's input and output."""
        super().__init__(info, self.raw)
        self._engine, self._ports = engine, ports
        smallest, _, largest = engine.get_tensor_profile_shape(ports[0], 0)
        self._limits = int(smallest[0]), int(largest[0])
        self._idle: list[_Slot] = []
        self._opening = Lock()

    def raw(self, crops: Rgb) -> NDArray[np.float32]:
        """Run uint8 N×S×S×3, N ≥ 1 → float32 N×D as the engine gives it. Raises PkdError where TensorRT fails."""
        slot = self._slot()
        rows = [slot.run(part)[:kept] for part, kept in split(crops, *self._limits)]
        self._idle.append(slot)  # not after an error: it may be of no more use
        return np.concatenate(rows)

    def _slot(self) -> _Slot:
        with self._opening:
            return self._idle.pop() if self._idle else _Slot(self.info, self._engine, self._ports, self._limits[1])


class _Slot:
    """Hold what one call at a time needs: an execution context, which is not thread-safe, with memory and a stream."""

    def __init__(self, info: EncoderInfo, engine: Any, ports: tuple[str, str], largest: int) -> None:
        self._name, self._dim, self._taken = info.name, info.space.dim, ports[0]
        self._memory = CudaMemory(largest * info.preprocess.size**2 * 3, largest * info.space.dim)
        self._context = engine.create_execution_context()
        if self._context is None:
            raise PkdError(f"{info.name}: TensorRT makes no execution context. Free memory of the GPU.")
        for port, address in zip(ports, (self._memory.device_in, self._memory.device_out), strict=True):
            self._must(self._context.set_tensor_address(port, address), f"set_tensor_address({port})")

    def run(self, crops: Rgb) -> NDArray[np.float32]:
        """Run uint8 N×S×S×3, N within the engine's profile → float32 N×D as the engine gives it."""
        enter_device()  # the calling thread may be another than last time
        self._memory.upload(crops)
        self._must(self._context.set_input_shape(self._taken, crops.shape), f"set_input_shape{crops.shape}")
        self._must(self._context.execute_async_v3(self._memory.stream), "execute_async_v3")
        return self._memory.download(len(crops), self._dim)

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise PkdError(f"{self._name}: TensorRT refused {what}. Export the bundle again on this machine.")


def open_tensorrt(bundle: Bundle, target: Target, file: str, threads: int) -> TensorRtEncoder:
    """Open the engine ``file``. ``threads``: of the CPU, of no effect. Raises as ``load_engine``."""
    ports = bundle.manifest.graph.input_name, bundle.manifest.graph.output_name
    try:
        return load_engine(target.runtime, bundle.read(file), target.settings, target.encoder, ports)
    except TargetUnavailable as reason:
        raise TargetUnavailable(
            f"{bundle.path}: {target.name}: {reason}. Use another target, or build this one where it shall run: "
            f"pkd-export --from-bundle {bundle.path} --format {EXTRAS[target.runtime]} --precision {target.precision}"
        ) from None


def load_engine(
    package: str, data: bytes, settings: Settings, info: EncoderInfo, ports: tuple[str, str]
) -> TensorRtEncoder:
    """Load a serialised engine. ``settings``: of its target; ``ports``: names of its input and output.

    Raises TargetUnavailable without a GPU and for an engine of another GPU or version, MissingExtra without the
    package, BundleError for an engine that does not load or is not what was stated.
    """
    gpu = find_gpu()
    if gpu is None:
        raise TargetUnavailable("no NVIDIA GPU with a working driver was found")
    try:
        trt = importlib.import_module(package)
    except ImportError:
        raise MissingExtra(package, EXTRAS[package]) from None
    messages: list[str] = []
    runtime = trt.Runtime(error_logger(trt, messages))
    refusal = mismatch(settings, gpu.capability, str(trt.__version__)) or invalidity(trt, runtime, data)
    if refusal:
        raise TargetUnavailable(refusal)
    enter_device()
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise BundleError(f"{info.name}: {package} cannot load the engine: {messages[-1] if messages else 'no reason'}")
    size = info.preprocess.size
    expected = {
        ports[0]: (trt.TensorIOMode.INPUT, trt.DataType.UINT8, (size, size, 3)),
        ports[1]: (trt.TensorIOMode.OUTPUT, trt.DataType.FLOAT, (info.space.dim,)),
    }
    found = {
        name: (engine.get_tensor_mode(name), engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))[1:])
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
    }
    if found != expected:
        raise BundleError(f"{info.name}: the engine has {found}, expected {expected}. Export the bundle again.")
    return TensorRtEncoder(info, engine, ports)


def split(crops: Rgb, smallest: int, largest: int) -> Iterator[tuple[Rgb, int]]:
    """Yield batches of ``smallest`` to ``largest`` crops, filled up with zeros, and how many of each are real."""
    for chosen in batches(len(crops), largest):
        part = crops[chosen.start : chosen.stop]
        missing = max(0, smallest - len(part))
        yield np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)]) if missing else part, len(part)


def mismatch(settings: Settings, capability: str, version: str) -> str | None:
    """Say how what an engine with these ``settings`` needs differs from what is here. ``capability``: ``8.9``."""
    built_for, built_by = str(settings.get("compute_capability")), str(settings.get("tensorrt"))
    if built_by != version:
        return f"the engine is of TensorRT {built_by}, here is {version}"
    if stated := re.fullmatch(r"(\d{1,3})\.(\d{1,3})( and later)?", built_for):
        needed, here = (int(stated[1]), int(stated[2])), tuple(map(int, capability.split(".")))
        if here == needed or (stated[3] and here > needed):
            return None
    return f"the engine is for compute capability {built_for}, this GPU has {capability}"


def invalidity(trt: Any, runtime: Any, data: bytes) -> str | None:
    """Ask why TensorRT itself would refuse the engine, as far as its header tells; only ``tensorrt_rtx`` can say."""
    if not hasattr(runtime, "get_engine_validity"):
        return None
    _, bits = runtime.get_engine_validity(data)
    reasons = [name for name, reason in trt.EngineInvalidityDiagnostics.__members__.items() if bits & int(reason)]
    return f"TensorRT says {', '.join(reasons)}" if reasons else None


def error_logger(trt: Any, messages: list[str]) -> Any:
    """Keep errors for our own message and prints nothing. The class exists only once the package is imported."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                messages.append(one_line(message))

    return Logger()


def one_line(message: str) -> str:
    """Return the start of TensorRT's message on one line."""
    return " ".join(message.split())[:300]
