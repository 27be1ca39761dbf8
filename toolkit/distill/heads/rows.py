"""Read the rows of a head in chunks, normalise them, and keep them in memory or mapped from disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pkd.toolkit.core.errors import BadHead
from pkd.toolkit.data.row_store import Rows

Float = NDArray[np.float32]
Int = NDArray[np.int64]
MEMORY_BYTES = 2 * 2**30
"""Heads that are larger in float32 are written to disk as bfloat16 and memory-mapped."""
CHUNK = 8192
"""Rows read at a time."""


def unit_rows(
    chunks: Iterable[Float],
    count: int,
    dim: int,
    source: str,
    describe: Callable[[int], str],
    scratch: Path | None = None,
) -> Tensor:
    """Normalise ``count`` rows that come in chunks → C×D: float32 in memory, or above MEMORY_BYTES bfloat16 on disk.

    ``describe``: names a row in messages. ``scratch``: folder of the file; without one all stays in memory. Raises
    BadHead for rows that are zero or not finite: they have no direction, and each would join every denominator.
    """
    target = _mapped(scratch, count, dim) if scratch and count * dim * 4 > MEMORY_BYTES else torch.empty(count, dim)
    bad: list[int] = []
    start = 0
    for chunk in chunks:
        with np.errstate(invalid="ignore", over="ignore"):  # such rows are refused below
            norms = np.linalg.norm(chunk, axis=1, keepdims=True)
            unit = torch.from_numpy(chunk / np.maximum(norms, 1e-6))
        bad += (start + np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] >= 1e-6)))).tolist()
        target[start : start + len(chunk)] = unit
        start += len(chunk)
    if bad:
        raise BadHead(
            f"head {source}: {len(bad):,} of {count:,} centres are zero or not finite (first: {describe(bad[0])}). "
            "Such a class would join every denominator: remove it, or pass --head means."
        )
    return target


def class_sums(plain: Rows, mirrored: Rows, labels: Int, classes: int) -> Iterable[tuple[Int, Float, Float, Float]]:
    """Walk the labelled images class by class, without ever holding all of them.

    Yields for a run of consecutive classes: the images' indices in class order, their plain and their mirrored rows,
    and the classes' sums of both (zero where a class has no image). The sums of all runs together are C×D.
    """
    order = np.argsort(labels, kind="stable")
    order = order[np.searchsorted(labels[order], 0) :]
    ends = np.searchsorted(labels[order], np.arange(classes), side="right")
    first = 0
    while first < classes:
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, min(int(np.searchsorted(ends, begin + CHUNK, side="right")), first + CHUNK))
        indices = order[begin : ends[last - 1]]
        rows, turned = plain[indices], mirrored[indices]
        sums = np.zeros((last - first, rows.shape[1]), np.float32)
        np.add.at(sums, labels[indices] - first, rows + turned)
        yield indices, rows, turned, sums
        first = last


def map_rows(path: Path, count: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Map C×D rows from a file that holds their values alone, so that a head may be larger than memory.

    A missing file is made, full of zeros; writing to the tensor writes to the file.
    Raises BadHead for a file of another size.
    """
    expected = count * dim * dtype.itemsize
    if path.exists() and path.stat().st_size != expected:
        raise BadHead(
            f"{path}: holds {path.stat().st_size:,} bytes, {count:,} rows of {dim} in {dtype} are {expected:,}. "
            "Give the file of this head, or delete it."
        )
    return torch.from_file(str(path), shared=True, size=count * dim, dtype=dtype).view(count, dim)


def _mapped(folder: Path, count: int, dim: int) -> Tensor:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="head.", suffix=".bf16") as file:
        file.truncate(count * dim * 2)
        return map_rows(Path(file.name), count, dim)  # the name goes now, the rows when nobody holds them any more


def compute_device() -> torch.device:
    """Choose the device of large products before training: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
