"""Read and write golden crops: synthetic faces and their embeddings, which every runtime tries itself on."""

from __future__ import annotations

import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.errors import BundleError
from pkd.toolkit.images.codec import Rgb

MAX_GOLDEN = 64 << 20
"""Bytes of golden.npz once decompressed."""


@dataclass(frozen=True)
class Golden:
    """Hold synthetic crops and their embeddings: the self-test that a server, a phone or a browser runs at start."""

    crops: Rgb
    """uint8 N×H×W×3."""
    embeddings: NDArray[np.float32]
    """N×D, unit rows."""


def pack_golden(golden: Golden) -> bytes:
    """Write ``golden.npz`` as bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, crops=golden.crops, embeddings=golden.embeddings)
    return buffer.getvalue()


def read_golden(data: bytes, encoder: EncoderInfo, where: str | Path) -> Golden:
    """Read ``golden.npz``; ``where`` is what errors name.

    Raises BundleError unless the arrays fit the encoder and are finite unit rows, before memory is taken for more
    than MAX_GOLDEN bytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            size = sum(part.file_size for part in parts.infolist())
            if size > MAX_GOLDEN:
                raise BundleError(f"{where}: holds {size:,} bytes, over the limit of {MAX_GOLDEN:,}. Do not trust it.")
            for part in parts.infolist():
                with parts.open(part) as file:
                    declared = _declared(file)
                if declared > part.file_size:
                    raise BundleError(
                        f"{where}: {part.filename} declares {declared:,} bytes and holds {part.file_size:,}. "
                        "Do not trust it."
                    )
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            golden = Golden(arrays["crops"], arrays["embeddings"])
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise BundleError(f"{where}: cannot be read: {error}. Export the bundle again.") from None
    if wrong := _fault(golden, encoder):
        raise BundleError(f"{where}: {wrong}. Export the bundle again.")
    return golden


def _declared(file: IO[bytes]) -> int:
    """Return the bytes of the array that the header of a ``.npy`` file promises; NumPy would allocate them unseen."""
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    return math.prod(shape) * dtype.itemsize


def _fault(golden: Golden, encoder: EncoderInfo) -> str | None:
    size = encoder.preprocess.size
    crops, rows = golden.crops, golden.embeddings
    if crops.dtype != np.uint8 or crops.shape[1:] != (size, size, 3) or not len(crops):
        return f"crops are {crops.dtype} {crops.shape}, expected uint8 N×{size}×{size}×3"
    if rows.dtype != np.float32 or rows.shape != (len(crops), encoder.space.dim):
        return f"embeddings are {rows.dtype} {rows.shape}, expected float32 {len(crops)}×{encoder.space.dim}"
    norms = np.linalg.norm(rows, axis=1)
    if not np.all(np.abs(norms - 1) <= 1e-3):  # also false for NaN
        return "an embedding is not a finite unit vector"
    return None
