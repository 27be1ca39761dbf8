"""ImageSource: where encoded images come from, one interface for files, RecordIO and tar shards."""

from __future__ import annotations

import hashlib
import os
import time
from bisect import bisect_right
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
SETTLED_NS = 2_000_000_000


class ImageSource(Protocol):
    """N encoded images, by row. No implementation holds an open file: threads and processes may share one."""

    root: Path
    """What ``name`` is relative to."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """Short and unique in the source, for messages and reports."""

    def read(self, row: int) -> bytes:
        """The bytes of the JPEG, PNG, WebP or BMP. Raises BadImage."""

    def is_file(self) -> bool:
        """Whether every image is the file ``root / name(row)``."""

    def stamps(self, rows: Ints) -> tuple[Keys, NDArray[np.bool_]]:
        """A 64-bit key per row that changes when its bytes may have changed, and whether it may be relied on later."""


@dataclass(frozen=True)
class Found:
    """What a source shows. ``owners``: int64 N into ``identities`` (in any order), −1 where unknown.

    ``numbered``: the identities are class numbers, which mean the same people in all files of ``folder`` and others in
    another data set.
    """

    images: ImageSource
    owners: Ints
    identities: tuple[str, ...]
    numbered: bool = False
    folder: Path = Path()


def stamp(path: str | Path) -> tuple[int, bool]:
    """A 64-bit key over a file's path, size and times, and whether the file has been left alone for two seconds.

    A file that is written twice within one tick of the clock keeps its times, so a fresh one must not be remembered
    by them. The change time catches what restores the modification time, such as ``cp -p``.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 — once per image: a Path would double its cost
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror or error}.") from None
    facts = f"{os.path.abspath(path)}\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"  # noqa: PTH100
    key = int.from_bytes(hashlib.sha256(os.fsencode(facts)).digest()[:8], "little")
    return key, time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS


def within(container: int, offsets: Ints) -> Keys:
    """64-bit keys of places in a container from its own stamp (the finaliser of SplitMix64, Steele et al. 2014)."""
    mixed = np.uint64(container) + offsets.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), np.uint64)


class ImageCollection:
    """Several sources in a row; rows count through all of them."""

    def __init__(self, sources: tuple[ImageSource, ...]) -> None:
        self.sources = sources
        self._ends = list(accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, row: int) -> tuple[ImageSource, int]:
        """The source that holds a row, and the row within it."""
        which = bisect_right(self._ends, row)
        source = self.sources[which]
        return source, row - self._ends[which] + len(source)

    def where(self, row: int) -> Path:
        """Where an image lies, for error messages."""
        source, own = self.locate(row)
        return source.root / source.name(own)

    def read(self, row: int) -> bytes:
        """The encoded image. Raises BadImage."""
        source, own = self.locate(row)
        return source.read(own)

    def stamps(self, rows: Ints) -> tuple[Keys, NDArray[np.bool_]]:
        """As ``ImageSource.stamps``."""
        keys, settled = np.empty(len(rows), np.uint64), np.empty(len(rows), np.bool_)
        order = np.argsort(rows, kind="stable")
        cuts = np.searchsorted(rows[order], [0, *self._ends])
        for source, end, start, stop in zip(self.sources, self._ends, cuts[:-1], cuts[1:], strict=True):
            mine = order[start:stop]
            keys[mine], settled[mine] = source.stamps(rows[mine] - end + len(source))
        return keys, settled
