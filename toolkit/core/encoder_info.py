"""Name encoders and their embedding spaces: what two vectors must share to be comparable."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pkd.toolkit.core.errors import InputError, SpaceMismatch
from pkd.toolkit.core.models import Record
from pkd.toolkit.core.preprocess import Preprocess

Role = Literal["teacher", "student"]


class EmbeddingSpace(Record):
    """Identify a space by its teacher: ``id = <name>@sha256:<weights + preprocessing>``."""

    id: str
    dim: int
    metric: Literal["cosine"] = "cosine"


class EncoderInfo(Record):
    """Say who an encoder is. ``id = <name>@sha256:<weights + preprocessing + numeric mode>``."""

    id: str
    name: str
    role: Role
    numeric_mode: str = "fp32"
    space: EmbeddingSpace
    preprocess: Preprocess


def describe(
    name: str,
    role: Role,
    weights_digest: str,
    preprocess: Preprocess,
    dim: int,
    *,
    space: EmbeddingSpace | None = None,
    numeric_mode: str = "fp32",
) -> EncoderInfo:
    """Build an EncoderInfo. A teacher (``space=None``) defines its own space; a student is given its teacher's.

    ``weights_digest``: hex SHA-256 of the weights in their source form, so that an equivalent rewrite of the graph
    (folding, another layout) leaves the id alone.
    """
    check_name(name)
    defining = combine([weights_digest, preprocess.digest()])
    if space is None:
        space = EmbeddingSpace(id=f"{name}@sha256:{defining}", dim=dim)
    elif space.dim != dim:
        raise SpaceMismatch(f"encoder {name!r} gives {dim} numbers, its space {space.id} has {space.dim}.")
    return EncoderInfo(
        id=f"{name}@sha256:{combine([defining, numeric_mode])}",
        name=name,
        role=role,
        numeric_mode=numeric_mode,
        space=space,
        preprocess=preprocess,
    )


def in_mode(encoder: EncoderInfo, numeric_mode: str) -> EncoderInfo:
    """Describe the encoder that computes ``encoder`` in another numeric mode: another id, the same space.

    Its id is made of the id that it derives from, so that a bundle alone is enough to name it.
    """
    if numeric_mode == encoder.numeric_mode:
        return encoder
    id = f"{encoder.name}@sha256:{combine([encoder.id, numeric_mode])}"
    return encoder.model_copy(update={"id": id, "numeric_mode": numeric_mode})


def check_name(name: str) -> None:
    """Raise InputError unless ``name`` can be the first part of an encoder id, and of a file name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"encoder name {name!r}: use letters, digits, '.', '-' and '_'.")


def name_of(path: Path) -> str:
    """Make an encoder's name from a weights file: its stem, with every other character as ``-``."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", path.stem).strip("-.") or "encoder"


def combine(digests: Iterable[str]) -> str:
    """Hash several hex digests or short strings, unambiguous about where each ends."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def short(identifier: str) -> str:
    """Return ``name@0123456789`` for ``name@sha256:0123456789ab…``, for tables."""
    name, _, digest = identifier.partition("@sha256:")
    return f"{name}@{digest[:10]}" if digest else identifier


def require_same_space(a: EncoderInfo, b: EncoderInfo) -> None:
    """Raise SpaceMismatch unless vectors of the two encoders may be compared."""
    if a.space != b.space:
        raise SpaceMismatch(
            f"{short(a.id)} embeds into {short(a.space.id)} ({a.space.dim}-d) and {short(b.id)} into "
            f"{short(b.space.id)} ({b.space.dim}-d): their vectors cannot be compared. Use a student distilled from "
            "this very teacher."
        )
