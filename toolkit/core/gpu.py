"""Find an NVIDIA GPU with a working driver: the driver itself is asked, by the standard library alone.

TensorRT without a device logs error 35 and goes on until something fails far away; this is asked first.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Literal

Device = Literal["cpu", "cuda"]
"""Device that an encoder is to run on."""
LIBRARIES = {"linux": "libcuda.so.1", "win32": "nvcuda.dll"}
MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the CUDA driver interface (cuda.h)."""


@dataclass(frozen=True)
class Gpu:
    """Name the first device."""

    name: str
    capability: str
    """Compute capability, ``9.0``: engines belong to one."""


def find_gpu() -> Gpu | None:
    """Find the first NVIDIA device, or None: no driver, one too old to start, or no device."""
    library = LIBRARIES.get(sys.platform)
    try:
        cuda = ctypes.CDLL(library) if library else None
    except OSError:
        return None
    if cuda is None or cuda.cuInit(0) != 0:
        return None
    count, device = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or not count.value:
        return None
    name, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
    )
    return None if failed else Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}")
