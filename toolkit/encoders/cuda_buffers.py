"""Hold what an engine needs around it: the first NVIDIA GPU's context, memory on it and a stream."""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import MissingExtra, PkdError


def enter_device() -> Any:
    """Make the calling thread work on the first device, in its primary context, as TensorRT does. Returns the driver.

    Raises MissingExtra without cuda-bindings, PkdError where the driver refuses. Ask ``find_gpu`` first.
    """
    driver, context = _primary_context()
    call(driver, "cuCtxSetCurrent", context)
    return driver


class CudaMemory:
    """Hold a buffer for bytes that go in, one for float32 that come out, and the stream they are copied on.

    Each has its twin on the host, pinned, so that the driver copies it without a detour. One call at a time.
    """

    def __init__(self, bytes_in: int, floats_out: int) -> None:
        """Allocate. Raises as ``enter_device``, and PkdError where there is no room."""
        self._driver = enter_device()
        undo: list[tuple[str, Any]] = []
        finalizer = weakref.finalize(self, _release, undo)
        finalizer.atexit = False  # the driver frees everything when the process ends
        stream = call(self._driver, "cuStreamCreate", int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        undo.append(("cuStreamDestroy", stream))
        self.stream = int(stream)
        self.device_in, host_in = self._pair(bytes_in, undo)
        self.device_out, host_out = self._pair(4 * floats_out, undo)
        self._in: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * bytes_in).from_address(host_in))
        self._out: NDArray[np.float32] = np.ctypeslib.as_array((ctypes.c_float * floats_out).from_address(host_out))

    def upload(self, values: NDArray[np.uint8]) -> None:
        """Begin to copy ``values``, no more bytes than there is room for, to ``device_in``."""
        self._in[: values.size] = values.reshape(-1)
        call(self._driver, "cuMemcpyHtoDAsync", self.device_in, self._in.ctypes.data, values.size, self.stream)

    def download(self, rows: int, columns: int) -> NDArray[np.float32]:
        """Wait for all work on the stream; float32 ``rows``×``columns`` of ``device_out``, as a copy."""
        count = rows * columns
        call(self._driver, "cuMemcpyDtoHAsync", self._out.ctypes.data, self.device_out, 4 * count, self.stream)
        call(self._driver, "cuStreamSynchronize", self.stream)
        copied: NDArray[np.float32] = self._out[:count].reshape(rows, columns).copy()
        return copied

    def _pair(self, size: int, undo: list[tuple[str, Any]]) -> tuple[int, int]:
        """Allocate ``size`` bytes on the device and of as many on the host."""
        device = call(self._driver, "cuMemAlloc", size)
        undo.append(("cuMemFree", device))
        host = call(self._driver, "cuMemHostAlloc", size, 0)
        undo.append(("cuMemFreeHost", host))
        return int(device), int(host)


def call(driver: Any, name: str, *arguments: Any) -> Any:
    """Call one function of the CUDA driver. Raises PkdError in its own words where it fails."""
    error, *values = getattr(driver, name)(*arguments)
    if error != driver.CUresult.CUDA_SUCCESS:
        _, words = driver.cuGetErrorString(error)
        raise PkdError(f"CUDA: {name}: {words.decode() if words else error}.")
    return values[0] if values else None


@cache
def _primary_context() -> tuple[Any, Any]:
    """Open the driver and the context, held for as long as the process lives: engines are loaded in it."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise MissingExtra("cuda-bindings", "trt") from None
    call(driver, "cuInit", 0)
    return driver, call(driver, "cuDevicePrimaryCtxRetain", call(driver, "cuDeviceGet", 0))


def _release(undo: list[tuple[str, Any]]) -> None:
    """Give back everything, last first, in whatever thread this is. Errors are of no use to anyone by now."""
    driver = enter_device()
    for name, handle in reversed(undo):
        getattr(driver, name)(handle)
