"""Keep rows of numbers on disk by 64-bit key, tens of millions of them, for several writers."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import InputError

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]
FILTER_BITS = 20
BLOCK = 1 << 20


class KeyedRows:
    """Keep two growing files: 8-byte keys, and rows of ``width`` numbers. A torn tail of either is ignored.

    Rows are written before their keys, and a row that has its key is never written again: whatever kills a writer,
    what was readable stays right. Several processes may append at a time.
    """

    def __init__(self, folder: Path, name: str, suffix: str, width: int, dtype: type[np.generic]) -> None:
        self._keys = folder / f"{name}.keys"
        self._rows = folder / f"{name}.{suffix}"
        self._width = width
        self._dtype = np.dtype(dtype)
        try:
            # Rows may be embeddings of faces, which are personal data: nobody but the owner reads them.
            for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
                missing.mkdir(mode=0o700, exist_ok=True)
            for path in (self._keys, self._rows):
                path.touch(mode=0o600)
                if path.stat().st_mode & 0o077 and path.stat().st_uid == os.geteuid():
                    path.chmod(0o600)  # made by an older pkd
        except OSError as error:
            raise InputError(f"cache {folder}: {error.strerror}. Pass --cache DIR or set PKD_CACHE.") from None

    def find(self, keys: Keys) -> Ints:
        """Find the row of each key, −1 where none is stored. Sorts only what may match: few are found fast in many."""
        known = np.fromfile(self._keys, np.uint64, self._count())
        place: Ints | None = None
        if len(keys) * 8 < len(known):
            place = _candidates(known, keys)
            known = known[place]
        if not len(known):
            return np.full(len(keys), -1, np.int64)
        order, asked = np.argsort(known, kind="stable"), np.argsort(keys, kind="stable")
        known = known[order]
        at = np.minimum(np.searchsorted(known, keys[asked]), len(known) - 1)  # in order: ten times as fast as at random
        rows = order[at] if place is None else place[order[at]]
        found = np.empty(len(keys), np.int64)
        found[asked] = np.where(known[at] == keys[asked], rows, -1)
        return found

    def rows(self) -> NDArray[Any]:
        """Map all stored rows into memory."""
        count = self._count()
        if not count:
            return np.empty((0, self._width), self._dtype)
        return np.memmap(self._rows, self._dtype, "r", shape=(count, self._width))

    def view(self, keys: Keys) -> StoredRows:
        """Map the rows of keys that are all stored, by index. Raises InputError if any has gone."""
        places = self.find(keys)
        if len(lost := np.flatnonzero(places < 0)):
            raise InputError(
                f"{self._rows}: {len(lost):,} of {len(keys):,} rows that were just written are gone; something else "
                "changed the file. Delete it, or pass another --cache."
            )
        return StoredRows(self.rows(), places)

    def append(self, keys: Keys, rows: NDArray[Any]) -> None:
        """Store rows. They are on disk before their keys are."""
        with self._keys.open("r+b") as key_file, self._rows.open("r+b") as row_file:
            fcntl.flock(key_file, fcntl.LOCK_EX)  # two runs may share a cache
            count = self._count()
            row_file.seek(count * self._width * self._dtype.itemsize)
            row_file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
            row_file.flush()
            os.fdatasync(row_file.fileno())
            key_file.seek(count * 8)
            key_file.write(keys.tobytes())
            key_file.flush()

    def _count(self) -> int:
        return min(self._keys.stat().st_size // 8, self._rows.stat().st_size // (self._width * self._dtype.itemsize))


def _candidates(known: Keys, keys: Keys) -> Ints:
    """Find where ``known`` begins with the same bits as any of ``keys``."""
    shift = np.uint64(64 - FILTER_BITS)
    wanted = np.zeros(1 << FILTER_BITS, np.bool_)
    wanted[keys >> shift] = True
    starts = range(0, len(known), BLOCK)
    return np.concatenate([start + np.flatnonzero(wanted[known[start : start + BLOCK] >> shift]) for start in starts])


class Rows(Protocol):
    """Read N rows by index; they need not be in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return N and the width."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Copy the rows at an int64 array, a mask or a slice; one row at a number."""


class StoredRows:
    """Read rows of a store in an order of one's own: 8 bytes of memory each; indexing copies what is asked for."""

    def __init__(self, stored: NDArray[Any], places: Ints) -> None:
        self._stored = stored
        self._places = places

    @property
    def shape(self) -> tuple[int, ...]:
        """Return N and the width."""
        return len(self._places), self._stored.shape[1]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        return np.array(self._stored[self._places[index]])
