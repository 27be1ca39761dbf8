"""Embed a whole FaceSet: decode in threads, and cache results on disk by what made them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.parallel import in_order
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.row_store import KeyedRows, Keys, StoredRows
from pkd.toolkit.encoders.base import Embeddings, Encoder, batches
from pkd.toolkit.images.codec import Rgb

Advance = Callable[[int], None]
Ints = NDArray[np.int64]
BATCH = 32
BLOCK = 1 << 16


def embed_faces(
    encoder: Encoder,
    faces: FaceSet,
    *,
    flip: bool = False,
    cache: Path | None = None,
    jobs: int | None = None,
    advance: Advance = lambda done: None,
) -> Embeddings:
    """Embed every image of ``faces`` (mirrored left to right with ``flip``) → float32 N×D in memory, unit rows.

    ``cache``: folder that keeps the vectors by encoder id, image digest and flip, so that each is computed once.
    ``jobs``: threads, by default one per core. ``advance`` is told how many images are done.
    """
    if cache is not None:
        return embed_stored(encoder, faces, flip=flip, cache=cache, jobs=jobs, advance=advance)[:]
    out = np.empty((len(faces), encoder.info.space.dim), np.float32)
    for indices, vectors in _embedded(encoder, _reader(encoder, faces, flip), np.arange(len(faces)), jobs):
        out[indices] = vectors
        advance(len(indices))
    return out


def embed_stored(
    encoder: Encoder,
    faces: FaceSet,
    *,
    flip: bool = False,
    cache: Path,
    half: bool = False,
    jobs: int | None = None,
    advance: Advance = lambda done: None,
) -> StoredRows:
    """Embed as ``embed_faces``, but leave the vectors on disk: rows by index, 8 bytes of memory an image.

    The rows are float32, or float16 with ``half``.
    """
    load = _reader(encoder, faces, flip)
    return embed_keyed(encoder, _keys(faces, flip, cache), load, cache=cache, half=half, jobs=jobs, advance=advance)


def embed_keyed(
    encoder: Encoder,
    keys: Keys,
    load: Callable[[Ints], Rgb],
    *,
    cache: Path,
    half: bool = False,
    jobs: int | None = None,
    advance: Advance = lambda done: None,
) -> StoredRows:
    """Embed crops that are known by a key each, and keep the vectors on disk: float32 rows, or float16 with ``half``.

    ``keys``: uint64 N. ``load``: int64 B positions among the keys → uint8 B×S×S×3 RGB; called for what is not stored.
    """
    dim = encoder.info.space.dim
    suffix, dtype = ("f16", np.float16) if half else ("f32", np.float32)
    name = hashlib.sha256(encoder.info.id.encode()).hexdigest()[:32]
    store = KeyedRows(cache, f"{name}.views" if half else name, suffix, dim, dtype)
    missing = np.flatnonzero(store.find(keys) < 0)
    advance(len(keys) - len(missing))
    first = missing[np.unique(keys[missing], return_index=True)[1]]  # of copies of an image one is enough
    advance(len(missing) - len(first))
    for indices, vectors in _embedded(encoder, load, np.sort(first), jobs):
        store.append(keys[indices], vectors)
        advance(len(indices))
    return store.view(keys)


def default_cache() -> Path:
    """Return ``$PKD_CACHE``, or ``pkd`` in the user's cache folder."""
    named = os.environ.get("PKD_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pkd"


def _reader(encoder: Encoder, faces: FaceSet, flip: bool) -> Callable[[Ints], Rgb]:
    size = encoder.info.preprocess.size

    def load(indices: Ints) -> Rgb:
        crops = faces.load(indices, size)
        return np.ascontiguousarray(crops[:, :, ::-1]) if flip else crops

    return load


def _embedded(
    encoder: Encoder, load: Callable[[Ints], Rgb], indices: Ints, jobs: int | None
) -> Iterator[tuple[Ints, Embeddings]]:
    def work(chunk: range) -> tuple[Ints, Embeddings]:
        these = indices[chunk.start : chunk.stop]
        return these, encoder.embed(load(these))

    return in_order(work, batches(len(indices), BATCH), workers=jobs or os.cpu_count() or 1)


def _keys(faces: FaceSet, flip: bool, cache: Path) -> Keys:
    """Make keys: the first eight bytes of SHA-256 over an image's hex digest and which way round it is."""
    digests, tag = faces.digests(cache), b" flip" if flip else b" as is"
    keys = np.empty(len(faces), np.uint64)
    for start in range(0, len(faces), BLOCK):
        text = digests[start : start + BLOCK].tobytes().hex().encode()
        raw = b"".join(hashlib.sha256(text[i : i + 64] + tag).digest()[:8] for i in range(0, len(text), 64))
        keys[start : start + BLOCK] = np.frombuffer(raw, np.uint64)
    return keys
