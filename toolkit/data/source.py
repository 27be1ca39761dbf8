"""Define where encoded images come from: one interface for files, RecordIO and tar shards."""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import BadImage

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]
UNLABELLED = -1
UNTOUCHED_NS = 2_000_000_000


class ImageSource(Protocol):
    """Read N encoded images by row. No implementation holds an open file: threads and processes may share one."""

    root: Path
    """Folder that ``name`` is relative to."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """Name the image: short and unique in the source, for messages and reports."""

    def read(self, row: int) -> bytes:
        """Read the bytes of the JPEG, PNG, WebP or BMP. Raises BadImage."""

    def stamps(self, rows: Ints) -> tuple[Keys, NDArray[np.bool_]]:
        """Make a 64-bit key per row that changes when its bytes may have, and say whether it can be relied on later."""


@dataclass(frozen=True)
class Found:
    """Hold what a source shows. ``owners``: int64 N into ``identities`` (in any order), −1 where unknown.

    ``numbered``: the identities are class numbers, which mean the same people in all files of ``folder`` and others in
    another data set.
    """

    images: ImageSource
    owners: Ints
    identities: tuple[str, ...]
    numbered: bool = False
    folder: Path = Path()


def stamp(path: str | Path) -> tuple[int, bool]:
    """Make a 64-bit key over a file's path, size and times, and say whether it was left alone for two seconds.

    A file that is written twice within one tick of the clock keeps its times, so a fresh one must not be remembered
    by them. The change time catches what restores the modification time, such as ``cp -p``.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 — once per image: a Path would double its cost
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror or error}.") from None
    facts = f"{os.path.abspath(path)}\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"  # noqa: PTH100
    key = int.from_bytes(hashlib.sha256(os.fsencode(facts)).digest()[:8], "little")
    return key, time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > UNTOUCHED_NS


def within(container: int, offsets: Ints) -> Keys:
    """Make 64-bit keys of places in a container from its stamp (finaliser of SplitMix64, Steele et al. 2014)."""
    mixed = np.uint64(container) + offsets.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), np.uint64)


class ImageCollection:
    """Join several sources in a row; rows count through all of them."""

    def __init__(self, sources: tuple[ImageSource, ...]) -> None:
        self.sources = sources
        self._ends = list(accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, row: int) -> tuple[ImageSource, int]:
        """Find the source that holds a row, and the row within it."""
        which = bisect_right(self._ends, row)
        source = self.sources[which]
        return source, row - self._ends[which] + len(source)

    def where(self, row: int) -> Path:
        """Say where an image lies, for error messages."""
        source, own = self.locate(row)
        return source.root / source.name(own)

    def read(self, row: int) -> bytes:
        """Read the encoded image. Raises BadImage."""
        source, own = self.locate(row)
        return source.read(own)

    def stamps(self, rows: Ints) -> tuple[Keys, NDArray[np.bool_]]:
        """Make keys as ``ImageSource.stamps`` does."""
        keys, untouched = np.empty(len(rows), np.uint64), np.empty(len(rows), np.bool_)
        order = np.argsort(rows, kind="stable")
        cuts = np.searchsorted(rows[order], [0, *self._ends])
        for source, end, start, stop in zip(self.sources, self._ends, cuts[:-1], cuts[1:], strict=True):
            mine = order[start:stop]
            keys[mine], untouched[mine] = source.stamps(rows[mine] - end + len(source))
        return keys, untouched


class PackedNames:
    """Hold N strings in order; ``names[i]`` decodes one. 10 million names of 20 bytes take 280 MB instead of 770."""

    def __init__(self, names: Iterable[str]) -> None:
        packed, ends = bytearray(), array("q", [0])
        for name in names:
            packed += name.encode("utf-8", "surrogateescape")  # a file name may be any bytes
            ends.append(len(packed))
        self._bytes = bytes(packed)
        self._ends = np.frombuffer(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._bytes[self._ends[row] : self._ends[row + 1]].decode("utf-8", "surrogateescape")
