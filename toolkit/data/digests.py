"""SHA-256 of every image, remembered on disk so that the images need not be read again at each start."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.parallel import in_order
from pkd.toolkit.data.row_store import KeyedRows, Rows
from pkd.toolkit.data.source import ImageCollection, Ints

BYTES = 32
CHUNK = 512
BLOCK = 1 << 16
READERS = 8
"""Threads that read and hash; more than cores, since most of the time goes into waiting for the disk."""


def digests_of(images: ImageCollection, rows: Ints, cache: Path | None) -> Rows:
    """SHA-256 of the bytes of each image → N rows of 32 uint8. Raises BadImage.

    ``cache``: folder that remembers them by path, size and times of the file. The result is memory-mapped then, unless
    a file is so young that another change of it could go unnoticed; such files are not remembered.
    """
    if cache is None:
        return _hash(images, rows)
    store = KeyedRows(cache / "digests", "sha256", "u8", BYTES, np.uint8)
    keys, settled = images.stamps(rows)
    missing = np.flatnonzero((store.find(keys) < 0) & settled)
    missing = missing[np.argsort(rows[missing], kind="stable")]  # containers are read from front to back
    for part, found in _hashed(images, rows[missing]):
        store.append(keys[missing[part]], found)
    young = np.flatnonzero(~settled)
    if not len(young):
        return store.view(keys)
    found = np.empty((len(rows), BYTES), np.uint8)
    found[settled] = store.view(keys[settled])[:]
    found[young] = _hash(images, rows[young])
    return found


def content_digest(digests: Rows, labels: Ints, identities: tuple[str, ...]) -> str:
    """One SHA-256 over the sorted lines ``<hex digest> <identity>``, whatever the order of the images.

    ``labels``: int64 N into ``identities``, −1 for images without one, whose line ends after the space.
    """
    owners = [*identities, ""]
    rank = np.empty(len(owners), np.int64)
    rank[np.argsort(np.array(owners, object), kind="stable")] = np.arange(len(owners))
    halves = np.empty((2, len(labels)), ">u8")  # 16 of 32 bytes: enough to tell 10²⁰ images apart
    for start in range(0, len(labels), BLOCK):
        rows = np.ascontiguousarray(digests[start : start + BLOCK])
        halves[:, start : start + BLOCK] = rows.view(">u8")[:, :2].T
    order = np.lexsort((rank[labels], halves[1].astype(np.uint64), halves[0].astype(np.uint64)))
    sha = hashlib.sha256()
    for start in range(0, len(labels), BLOCK):
        block = order[start : start + BLOCK]
        text = digests[block].tobytes().hex()
        lines = [f"{text[64 * i : 64 * i + 64]} {owners[label]}" for i, label in enumerate(labels[block].tolist())]
        sha.update((("\n" if start else "") + "\n".join(lines)).encode())
    return sha.hexdigest()


def _hash(images: ImageCollection, rows: Ints) -> NDArray[np.uint8]:
    out = np.empty((len(rows), BYTES), np.uint8)
    for part, found in _hashed(images, rows):
        out[part] = found
    return out


def _hashed(images: ImageCollection, rows: Ints) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    def work(part: slice) -> tuple[slice, NDArray[np.uint8]]:
        raw = b"".join(hashlib.sha256(images.read(row)).digest() for row in rows[part].tolist())
        return part, np.frombuffer(raw, np.uint8).reshape(-1, BYTES)

    parts = (slice(start, start + CHUNK) for start in range(0, len(rows), CHUNK))
    return in_order(work, parts, workers=READERS)
