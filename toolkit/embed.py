"""Embed a whole FaceSet: decoding in threads, results cached on disk by what made them."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.errors import InputError
from pkd.toolkit.faces import FaceSet
from pkd.toolkit.runtime import Embeddings, Encoder, batches

Advance = Callable[[int], None]
BATCH = 32


def embed_faces(
    encoder: Encoder,
    faces: FaceSet,
    *,
    flip: bool = False,
    cache: Path | None = None,
    jobs: int | None = None,
    advance: Advance = lambda done: None,
) -> Embeddings:
    """Embed every image of ``faces`` (mirrored left to right with ``flip``) → float32 N×D, unit rows.

    ``cache``: folder that keeps the vectors by encoder id, image digest and flip, so that each is computed once.
    ``jobs``: threads, by default one per core. ``advance`` is told how many images are done.
    """
    size = encoder.info.preprocess.size
    store = _Store(cache, encoder.info.id, encoder.info.space.dim) if cache else None
    keys = _keys(faces, flip) if store else np.empty(0, np.uint64)
    out = np.empty((len(faces), encoder.info.space.dim), np.float32)
    todo = np.arange(len(faces))
    if store:
        rows = store.find(keys)
        hit = rows >= 0
        out[hit] = store.vectors()[rows[hit]]
        advance(int(hit.sum()))
        todo = np.flatnonzero(~hit)

    def work(chunk: range) -> NDArray[np.int64]:
        indices: NDArray[np.int64] = todo[chunk.start : chunk.stop]
        crops = faces.load(indices, size)
        out[indices] = encoder.embed(np.ascontiguousarray(crops[:, :, ::-1]) if flip else crops)
        return indices

    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        pending = [pool.submit(work, chunk) for chunk in batches(len(todo), BATCH)]
        try:
            for future in pending:
                indices = future.result()
                if store:
                    store.append(keys[indices], out[indices])
                advance(len(indices))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return out


def default_cache() -> Path:
    """``$PKD_CACHE``, or ``pkd`` in the user's cache folder."""
    named = os.environ.get("PKD_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pkd"


class _Store:
    """Two growing files per encoder: 8-byte keys and D float32 each. A torn tail of either is ignored."""

    def __init__(self, folder: Path, encoder_id: str, dim: int) -> None:
        name = hashlib.sha256(encoder_id.encode()).hexdigest()[:32]
        self._keys = folder / f"{name}.keys"
        self._vectors = folder / f"{name}.f32"
        self._dim = dim
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._keys.touch()
            self._vectors.touch()
        except OSError as error:
            raise InputError(f"cache {folder}: {error.strerror}. Pass --cache DIR or set PKD_CACHE.") from None

    def _count(self) -> int:
        return min(self._keys.stat().st_size // 8, self._vectors.stat().st_size // (4 * self._dim))

    def find(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Row of each key, −1 where it is not stored."""
        known = np.fromfile(self._keys, np.uint64, self._count())
        if not len(known):
            return np.full(len(keys), -1, np.int64)
        order = np.argsort(known, kind="stable")
        place = np.minimum(np.searchsorted(known[order], keys), len(known) - 1)
        rows = order[place]
        return np.where(known[rows] == keys, rows, -1)

    def vectors(self) -> Embeddings:
        """All stored rows, memory-mapped."""
        count = self._count()
        if not count:
            return np.empty((0, self._dim), np.float32)
        return np.memmap(self._vectors, np.float32, "r", shape=(count, self._dim))

    def append(self, keys: NDArray[np.uint64], vectors: Embeddings) -> None:
        with self._keys.open("r+b") as key_file, self._vectors.open("r+b") as vector_file:
            fcntl.flock(key_file, fcntl.LOCK_EX)  # two runs may share a cache
            count = self._count()
            vector_file.seek(count * 4 * self._dim)
            vector_file.write(vectors.tobytes())
            vector_file.flush()
            key_file.seek(count * 8)
            key_file.write(keys.tobytes())
            key_file.flush()


def _keys(faces: FaceSet, flip: bool) -> NDArray[np.uint64]:
    tag = "flip" if flip else "as is"
    raw = b"".join(hashlib.sha256(f"{digest} {tag}".encode()).digest()[:8] for digest in faces.digests())
    return np.frombuffer(raw, np.uint64)
