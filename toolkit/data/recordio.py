"""Read MXNet RecordIO (``.rec`` with its ``.idx``) as InsightFace lays it out, without MXNet.

A file is a chain of frames: ``uint32 magic, uint32 cflag << 29 | length, length bytes, zeros up to a multiple of 4``
(little-endian; dmlc-core, recordio.h). A record that contains the magic number at a multiple of 4 is cut there into
parts of cflag 1, 2 … 2, 3, and the number itself is left out; others have cflag 0. Each record starts with MXNet's
image header ``uint32 flag, float32 label, uint64 id, uint64 id2``; flag > 0 says that so many float32 labels follow,
of which the first is the identity. Then comes the JPEG or PNG.

``.idx`` is text, ``key TAB offset`` a line. In InsightFace's files record 0 holds no image but two labels, of which
the first is one more than the last image's key, and records behind the images hold the keys of each identity.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import BadImage, InputError
from pkd.toolkit.data.source import UNLABELLED, Found, Ints, Keys, stamp, within

MAGIC = 0xCED7230A
HEADER = 24
EXACT = 2**24
"""Labels are float32: from here on neighbouring identities would share a number."""
BLOCK = 1 << 16
Words = NDArray[np.uint32]


class RecordImages:
    """Read the images of one ``.rec``. 16 bytes of memory an image."""

    def __init__(self, path: Path, keys: Ints, offsets: Ints) -> None:
        self.root = path.parent
        self._path = path
        self._keys = keys
        self._offsets = offsets
        self._stamp = stamp(path)

    def __len__(self) -> int:
        return len(self._offsets)

    def name(self, row: int) -> str:
        """Name the record: ``train.rec#7`` for the one of key 7."""
        return f"{self._path.name}#{self._keys[row]}"

    def read(self, row: int) -> bytes:
        """Read the image of a record. Raises BadImage naming it."""
        try:
            data = _record(self._path, int(self._offsets[row]))
        except (OSError, ValueError) as error:
            raise BadImage(f"{self.root / self.name(row)}: {error}.") from None
        return data[HEADER + 4 * int.from_bytes(data[:4], "little") :]

    def stamps(self, rows: Ints) -> tuple[Keys, NDArray[np.bool_]]:
        """Make keys from the ``.rec``'s path, size and times when it was opened, and the record's place."""
        key, untouched = self._stamp
        return within(key, self._offsets[rows]), np.full(len(rows), untouched)


def read_recordio(path: Path, labelled: bool) -> Found:
    """Index a ``.rec`` from its ``.idx``, or by one pass through it where there is none. Identities are eight digits.

    Raises InputError for a file that is no RecordIO, truncated or corrupt, and for labels that are no class numbers.
    """
    size = path.stat().st_size
    if size < 8:
        raise InputError(f"{path}: {size} bytes, no RecordIO. Copy it again.")
    words = np.memmap(path, "<u4", "r", shape=(size // 4,))
    index = path.with_suffix(".idx")
    keys, offsets = _read_index(index, path, size) if index.is_file() else _scan(path, words, size)
    labels, holds_image = _headers(path, words, size, keys, offsets)
    announced = _announced(path, keys, offsets, holds_image)
    if announced is not None and announced > holds_image.sum():
        raise InputError(
            f"{path}: its first record announces {announced:,} images, {int(holds_image.sum()):,} are there. "
            "Copy the .rec and the .idx again."
        )
    keys, offsets, labels = keys[holds_image], offsets[holds_image], labels[holds_image]
    if not len(keys):
        raise InputError(f"{path}: holds no image.")
    images = RecordImages(path, keys, offsets)
    if not labelled:
        return Found(images, np.full(len(keys), UNLABELLED, np.int64), ())
    bad = np.flatnonzero(~(np.isfinite(labels) & (labels == np.floor(labels)) & (labels < EXACT)))
    if len(bad):
        raise InputError(
            f"{images.root / images.name(int(bad[0]))}: label {labels[bad[0]]:g} is no class number from 0 to "
            f"{EXACT - 1:,} ({len(bad):,} such records). Pass the file as --unlabelled, or number the classes anew."
        )
    owners = np.maximum(labels.astype(np.int64), UNLABELLED)
    classes = np.unique(owners[owners >= 0])
    owners = np.where(owners >= 0, np.searchsorted(classes, owners), UNLABELLED)
    names = tuple(f"{number:08d}" for number in classes.tolist())
    return Found(images, owners, names, numbered=True, folder=path.parent.resolve())


def _read_index(index: Path, path: Path, size: int) -> tuple[Ints, Ints]:
    try:
        table = (
            np.loadtxt(index, np.int64, comments=None, ndmin=2) if index.stat().st_size else np.empty((0, 2), np.int64)
        )
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{index}: not an index of 'key<TAB>offset' lines: {str(error)[:120]}.") from None
    if table.size == 0 or table.shape[1] != 2:
        raise InputError(f"{index}: holds no 'key<TAB>offset' lines. Remove it, and {path.name} is indexed anew.")
    table = table[np.argsort(table[:, 0], kind="stable")]
    keys, offsets = np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        raise InputError(f"{index}: has the key {keys[twice[0]]} twice. Remove it, and {path.name} is indexed anew.")
    outside = np.flatnonzero((offsets < 0) | (offsets % 4 != 0) | (offsets > size - 8))
    if len(outside):
        raise InputError(
            f"{path}: {size:,} bytes, but {index.name} puts record {keys[outside[0]]} at {offsets[outside[0]]:,} "
            f"({len(outside):,} such records). The .rec is truncated, or the .idx belongs to another; copy them again."
        )
    return keys, offsets


def _scan(path: Path, words: Words, size: int) -> tuple[Ints, Ints]:
    """Find the places of all records; their number in the file is their key."""
    starts: list[int] = []
    at, inside = 0, False
    while at < size:
        length, cflag = _frame(path, words, size, at)
        if cflag in (0, 1) if inside else cflag in (2, 3):
            raise InputError(f"{path}: corrupt at byte {at:,}: a record's parts are out of order. Copy it again.")
        if not inside:
            starts.append(at)
        inside = cflag in (1, 2)
        at += 8 + (length + 3) // 4 * 4
    if inside:
        raise InputError(f"{path}: truncated: its last record lacks a part. Copy it again.")
    return np.arange(len(starts)), np.array(starts, np.int64)


def _frame(path: Path, words: Words, size: int, at: int) -> tuple[int, int]:
    """Read length and cflag of the frame at a byte."""
    if at + 8 > size:
        raise InputError(f"{path}: truncated: it ends within a frame at byte {at:,}. Copy it again.")
    magic, field = words[at // 4 : at // 4 + 2].tolist()
    length, cflag = field & 0x1FFFFFFF, field >> 29
    if magic != MAGIC or cflag > 3:
        raise InputError(f"{path}: no RecordIO frame at byte {at:,} (magic {magic:#x}). It is corrupt; copy it again.")
    if at + 8 + length > size:
        raise InputError(
            f"{path}: truncated: the frame at byte {at:,} needs {at + 8 + length:,} bytes, the file has {size:,}. "
            "Copy it again."
        )
    return length, cflag


def _headers(
    path: Path, words: Words, size: int, keys: Ints, offsets: Ints
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Read the label of every record (of an image header's flag labels the first), and whether an image follows it."""
    labels = np.zeros(len(offsets), np.float32)
    holds_image = np.zeros(len(offsets), np.bool_)
    for start in range(0, len(offsets), BLOCK):
        rows = slice(start, start + BLOCK)
        at = offsets[rows] // 4
        last = len(words) - 1
        frame, flag, label, first = (words[np.minimum(at + i, last)] for i in (1, 2, 3, 8))
        length, cflag = (frame & 0x1FFFFFFF).astype(np.int64), frame >> 29
        payload = length - HEADER - 4 * flag.astype(np.int64)
        odd = (words[at] != MAGIC) | (cflag != 0) | (payload < 0) | (offsets[rows] + 8 + length > size)
        labels[rows] = np.where(flag > 0, first, label).astype(np.uint32).view(np.float32)
        holds_image[rows] = payload > 0
        for i in np.flatnonzero(odd) + start:
            labels[i], holds_image[i] = _odd_header(path, words, size, int(keys[i]), int(offsets[i]))
    return labels, holds_image


def _odd_header(path: Path, words: Words, size: int, key: int, at: int) -> tuple[float, bool]:
    """Read the same for one record that is cut into parts; raises InputError for one that is corrupt."""
    _frame(path, words, size, at)
    try:
        data = _record(path, at)
    except ValueError as error:
        raise InputError(f"{path}#{key}: {error}. Copy the file again.") from None
    (flag, label) = struct.unpack_from("<If", data)
    if flag:
        (label,) = struct.unpack_from("<f", data, HEADER)
    return label, len(data) > HEADER + 4 * flag


def _announced(path: Path, keys: Ints, offsets: Ints, holds_image: NDArray[np.bool_]) -> int | None:
    """Read how many images InsightFace's record 0 announces; None without such a record."""
    if keys[0] != 0 or holds_image[0]:
        return None
    data = _record(path, int(offsets[0]))
    if int.from_bytes(data[:4], "little") != 2:
        return None
    end = float(struct.unpack_from("<f", data, HEADER)[0])
    rounded = float(np.spacing(np.float32(end))) / 2  # the number went through float32: take the least it can mean
    return math.ceil(end - rounded) - 1


def _record(path: Path, at: int) -> bytes:
    """Read the whole record at ``at``, its parts joined. Raises ValueError for what is no record, and OSError."""
    parts: list[bytes] = []
    file = os.open(path, os.O_RDONLY)
    try:
        while True:
            head = os.pread(file, 8, at)
            magic, field = struct.unpack("<II", head) if len(head) == 8 else (0, 0)
            length, cflag = field & 0x1FFFFFFF, field >> 29
            if magic != MAGIC or cflag not in ((2, 3) if parts else (0, 1)):
                raise ValueError(f"no RecordIO frame at byte {at:,}")
            parts.append(os.pread(file, length, at + 8))
            if len(parts[-1]) < length:
                raise ValueError(f"truncated: the frame at byte {at:,} is {length:,} bytes long")
            if cflag in (0, 3):
                break
            at += 8 + (length + 3) // 4 * 4
    finally:
        os.close(file)
    data = parts[0] if len(parts) == 1 else struct.pack("<I", MAGIC).join(parts)
    if len(data) < HEADER or len(data) < HEADER + 4 * int.from_bytes(data[:4], "little"):
        raise ValueError(f"a record of {len(data)} bytes has no room for the image header it claims")
    return data
