"""Write embeddings as ``float``, ``b64_f32``, ``b64_f16`` or ``b64_i8``, and read and check what strangers send."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import BadVector

Encoding = Literal["float", "b64_f32", "b64_f16", "b64_i8"]
DTYPES: dict[str, np.dtype[Any]] = {"b64_f32": np.dtype("<f4"), "b64_f16": np.dtype("<f2"), "b64_i8": np.dtype("i1")}
"""Little-endian element types of the base64 encodings."""

NORM_TOLERANCE = 0.01
"""Largest accepted distance of an embedding's length from 1: anything else was not made by an encoder."""


def encode(vector: NDArray[np.float32], encoding: Encoding) -> NDArray[np.float32] | str:
    """Write a unit vector (float32 D) for an answer: itself for ``float``, otherwise base64.

    ``b64_i8`` is round(127·x / max|x|): its scale is lost, which cosine similarity does not notice.
    """
    if encoding == "float":
        return vector
    if encoding == "b64_i8":
        vector = np.rint(vector * (127.0 / np.abs(vector).max()))
    return base64.b64encode(vector.astype(DTYPES[encoding]).tobytes()).decode()


def decode(sent: str | Sequence[float], encoding: Encoding, dim: int | None) -> NDArray[np.float64]:
    """Read what a client sent as a unit vector, float64 D. ``dim``: its space's dimension where this server knows it.

    Raises BadVector for a wrong dimension, NaN, infinity, zero, or a length outside 1 ± 0.01 (``b64_i8`` has none).
    """
    vector = _parse(sent, encoding)
    if dim is not None and len(vector) != dim:
        raise BadVector(f"the embedding has {len(vector):,} numbers, its space has {dim:,}.")
    if not np.isfinite(vector).all():
        raise BadVector("the embedding holds NaN or infinity.")
    with np.errstate(over="ignore"):  # huge but finite numbers square to infinity, which the range below refuses
        norm = float(np.linalg.norm(vector))
    if norm == 0:
        raise BadVector("the embedding is zero.")
    if encoding != "b64_i8" and not abs(norm - 1) <= NORM_TOLERANCE:
        raise BadVector(
            f"the embedding's length is {norm:.4g}, expected 1 ± {NORM_TOLERANCE:g}. Send it as embed gave it."
        )
    unit: NDArray[np.float64] = vector / norm
    return unit


def _parse(sent: str | Sequence[float], encoding: Encoding) -> NDArray[np.float64]:
    if encoding == "float":
        if isinstance(sent, str):
            raise BadVector(
                "the embedding is a string but its encoding is float. State the encoding, for example b64_f32."
            )
        return np.asarray(sent, np.float64)
    if not isinstance(sent, str):
        raise BadVector(f"the embedding is a list but its encoding is {encoding}. Send base64, or encoding float.")
    dtype = DTYPES[encoding]
    try:
        raw = decode_base64(sent)
    except ValueError as error:
        raise BadVector(f"the embedding {error}.") from None
    if len(raw) % dtype.itemsize:
        raise BadVector(
            f"the embedding has {len(raw):,} bytes, not a multiple of {dtype.itemsize} as {encoding} needs."
        )
    return np.frombuffer(raw, dtype).astype(np.float64)


DATA_URI = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
"""Beginning of a data: URI, as browsers' FileReader and canvas give images."""
ALPHABET = re.compile("[A-Za-z0-9+/]*")
URL_ALPHABET = str.maketrans("-_", "+/")


def decode_base64(text: str) -> bytes:
    """Decode base64: white space anywhere, ``data:…;base64,`` before it (then ``%2B`` for ``+``), ``-_`` for
    ``+/``, and no padding are taken.

    Raises ValueError, whose text says what is wrong and continues a sentence.
    """
    with suppress(ValueError):  # binascii.Error is one; most clients send it plain
        return base64.b64decode(text, validate=True)
    if found := DATA_URI.match(text):
        if not found[0][:-1].lower().endswith(";base64"):
            raise ValueError("is a data: URI without ;base64. Send base64")
        text = unquote(text[found.end() :])
    text = "".join(text.lstrip("\ufeff").split()).translate(URL_ALPHABET)
    bare = text.rstrip("=")
    if not ALPHABET.fullmatch(bare):
        raise ValueError("is not base64. Send the bytes as base64, without a path or a link")
    if len(bare) % 4 == 1 or len(text) - len(bare) > 2:
        raise ValueError("is not base64: its length does not fit. Send all of it")
    return base64.b64decode(bare + "=" * (-len(bare) % 4))
