"""Make, read and save a head: C×D unit class centres in the teacher's space, from files or from embeddings."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from pkd.toolkit.core.errors import BadHead
from pkd.toolkit.data.row_store import Rows
from pkd.toolkit.distill.heads.checkpoints import expand, read_shards, starts
from pkd.toolkit.distill.heads.label_map import class_names, read_label_map
from pkd.toolkit.distill.heads.rows import CHUNK, Float, Int, class_sums, unit_rows

FILE = "head.npz"


@dataclass(frozen=True)
class Head:
    """Hold a classifier's class centres.

    ``centres``: C×D unit rows, float32, or bfloat16 mapped from disk where they are many. ``source``: its file or kind.

    ``identities``: names in class order. ``owners``: int64 C, sorted, where every image is a centre: the identity that
    a row belongs to; numbers from ``len(identities)`` on are images without identity. ``parts``: the files of a sharded
    head and their first rows, for messages.
    """

    centres: Tensor
    identities: tuple[str, ...]
    source: str
    owners: Int | None = None
    parts: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.centres.ndim != 2:
            raise BadHead(f"{self.source}: centres of shape {tuple(self.centres.shape)}, expected C×D.")
        if self.owners is None and len(self.centres) != len(self.identities):
            raise BadHead(f"{self.source}: {len(self.centres):,} centres for {len(self.identities):,} identities.")
        if len(set(self.identities)) != len(self.identities):
            raise BadHead(f"{self.source}: an identity names two classes. Merge them first.")

    def rows(self, indices: Int) -> Float:
        """Return float32 B×D centres of int64 class rows."""
        found: Float = self.centres[torch.from_numpy(indices)].float().numpy()
        return found

    @property
    def exclude(self) -> Int | None:
        """Return int64 C×2: per row the half-open range of rows of its identity. None where each has one row."""
        if self.owners is None:
            return None
        return np.stack([np.searchsorted(self.owners, self.owners, side) for side in ("left", "right")], axis=1)


def class_means(
    plain: Rows, mirrored: Rows, labels: Int, identities: tuple[str, ...], scratch: Path | None = None
) -> Head:
    """Average the teacher's unit embeddings of each identity's images and their mirror images, and normalise.

    ``plain``, ``mirrored``: N×D unit rows. ``labels``: int64 N, −1 for unlabelled images, which do not count.
    ``scratch``: folder for a head too large for memory.
    """
    runs = class_sums(plain, mirrored, labels, len(identities))
    sums = (sums for _, _, _, sums in runs)
    centres = unit_rows(
        sums, len(identities), plain.shape[1], "class means", lambda row: f"row {row}, {identities[row]}", scratch
    )
    return Head(centres, identities, "means")


def image_centres(
    plain: Rows,
    mirrored: Rows,
    labels: Int,
    identities: tuple[str, ...],
    share: float = 1.0,
    scratch: Path | None = None,
) -> tuple[Head, Int]:
    """Make a centre per image: ``share`` × its own embedding + (1 − ``share``) × its class mean, normalised.

    An image's embedding is the normalised sum of its plain and mirrored rows; images without identity are classes of
    their own. Returns the head, rows sorted by owner, and int64 N: the row of every image.
    """
    known = labels >= 0
    owners = labels.copy()
    owners[~known] = len(identities) + np.arange(int((~known).sum()))
    order = np.argsort(owners, kind="stable")
    row_of = np.empty(len(owners), np.int64)
    row_of[order] = np.arange(len(owners))

    def chunks() -> Iterator[Float]:
        for indices, rows, turned, sums in class_sums(plain, mirrored, labels, len(identities)):
            own = _unit(rows + turned)
            means = _unit(sums)[np.searchsorted(np.unique(labels[indices]), labels[indices])] if len(indices) else own
            yield share * own + (1 - share) * means
        for start in range(int(known.sum()), len(order), CHUNK):
            indices = order[start : start + CHUNK]
            yield plain[indices] + mirrored[indices]

    centres = unit_rows(chunks(), len(order), plain.shape[1], "images", lambda row: f"image {order[row]}", scratch)
    return Head(centres, identities, f"images:{share:g}", owners[order]), row_of


def merge_classes(head: Head, classes: Int, identities: tuple[str, ...], scratch: Path | None = None) -> Head:
    """Merge classes of a head: the mean direction of the centres that become one.

    ``classes``: int64 C, the new class of every old one. ``identities``: names of the new ones.
    """
    order = np.argsort(classes, kind="stable")
    ends = np.searchsorted(classes[order], np.arange(len(identities)), side="right")

    def chunks() -> Iterator[Float]:
        for start in range(0, len(identities), CHUNK):
            stop = min(start + CHUNK, len(identities))
            old = order[ends[start - 1] if start else 0 : ends[stop - 1]]
            sums = np.zeros((stop - start, head.centres.shape[1]), np.float32)
            np.add.at(sums, classes[old] - start, head.rows(old))
            yield sums

    dim = head.centres.shape[1]
    rows = unit_rows(chunks(), len(identities), dim, head.source, lambda row: identities[row], scratch)
    return Head(rows, identities, head.source)


def read_head(
    paths: str | Path | Sequence[str],
    identities: tuple[str, ...],
    dim: int,
    *,
    labels: str | Path | None = None,
    scratch: Path | None = None,
) -> Head:
    """Read ``head.npz`` (``centres`` C×D, ``identities`` C, optional), or checkpoints and shards of other trainers.

    ``identities``: those of the images; each needs a row. ``labels``: a label map; without one, and without names in
    the file, rows are taken as ``class_names`` says, and the audit finds out if that is wrong. ``scratch``: folder for
    a head too large for memory. Raises BadHead naming file, row and remedy.
    """
    files = expand([str(paths)] if isinstance(paths, str | Path) else paths)
    given = read_label_map(labels) if labels else None
    source = str(files[0]) if len(files) == 1 else f"{files[0].parent}/{{{len(files)} shards}}"
    if len(files) == 1 and files[0].suffix == ".npz":
        stored, centres = _read_npz(files[0], dim)
        names = class_names(given or stored, identities, len(centres), source, str(labels) if labels else None)
        chunks: Iterable[Float] = (centres[i : i + CHUNK].astype(np.float32) for i in range(0, len(centres), CHUNK))
        rows = unit_rows(chunks, len(centres), dim, source, lambda row: f"row {row}, {names[row]}", scratch)
        return Head(rows, names, source)
    shards = read_shards(files, dim)
    firsts = starts(shards)
    count = sum(len(s.weight) for s in shards)
    names = class_names(given, identities, count, source, str(labels) if labels else None)

    def describe(row: int) -> str:
        part = int(np.searchsorted(firsts, row, side="right")) - 1
        return f"row {row - firsts[part]} of {shards[part].path.name}, {names[row]}"

    rows = unit_rows((c for s in shards for c in s.chunks()), count, dim, source, describe, scratch)
    parts = tuple((s.path.name, first) for s, first in zip(shards, firsts, strict=True)) if len(shards) > 1 else ()
    return Head(rows, names, source, parts=parts)


def save_head(head: Head, path: Path, key: str = "") -> None:
    """Write ``head.npz`` (float32) atomically. ``key``: what it was made from, so that a resumed run can tell."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez(file, centres=head.centres.float().numpy(), identities=np.array(head.identities), key=np.array(key))
    part.replace(path)


def _read_npz(path: Path, dim: int) -> tuple[tuple[str, ...] | None, NDArray[np.floating]]:
    """Read names, if the file has any, and centres, mapped from the file where they are not compressed."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = tuple(map(str, arrays["identities"])) if "identities" in arrays else None
            mapped = _map_member(path, "centres.npy")
            centres = arrays["centres"] if mapped is None else mapped
    except OSError as error:
        raise BadHead(f"{path}: {error.strerror}. Pass --head means, or the head.npz of a run.") from None
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BadHead(f"{path}: not a head: {error}. It needs an array 'centres' of C×{dim}.") from None
    if centres.dtype.kind not in "fiu":
        raise BadHead(f"{path}: not a head: its centres are of type {centres.dtype}, expected numbers.")
    if centres.ndim != 2 or centres.shape[1] != dim:
        hint = " It looks transposed (D×C)." if centres.ndim == 2 and centres.shape[0] == dim else ""
        raise BadHead(f"{path}: centres have shape {centres.shape}, the teacher's space has {dim} dimensions.{hint}")
    return names, centres


def _map_member(path: Path, name: str) -> NDArray[np.floating] | None:
    """Map an array inside an uncompressed npz; None where it is compressed."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entry = archive.getinfo(name)
        if entry.compress_type != zipfile.ZIP_STORED:
            return None
        file.seek(entry.header_offset + 26)  # local header: lengths of name and extra field, then both, then the data
        name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
        file.seek(name_length + extra_length, 1)
        version = npy.read_magic(file)
        shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
        if dtype.hasobject or not np.prod(shape):
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _unit(rows: Float) -> Float:
    unit: Float = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit
