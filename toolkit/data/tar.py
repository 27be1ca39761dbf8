"""TarImages: images in an uncompressed tar, as WebDataset lays them out or as a folder per identity was packed.

Images stay where they are: one pass over the headers (POSIX.1-1988 ustar, its pax extension, GNU long names) notes
offset and size of each. The identity of ``<key>.jpg`` is in ``<key>.cls``, ``<key>.txt`` or ``<key>.json`` next to
it (a JSON object with ``identity`` or ``label``), else it is the folder that the image lies in.
"""

from __future__ import annotations

import json
import mmap
import os
import posixpath
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import BadImage, InputError
from pkd.toolkit.data.packed_names import PackedNames
from pkd.toolkit.data.source import UNLABELLED, Found, Ints, Keys, stamp, within
from pkd.toolkit.images.codec import SUFFIXES

BLOCK = 512
LABELS = (".cls", ".json", ".txt")
"""In this order where a sample has several."""
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
LONGEST_LABEL = 1 << 20


class TarImages:
    """The images of one tar: 16 bytes of memory and the name for each."""

    def __init__(self, path: Path, names: PackedNames, offsets: Ints, sizes: Ints) -> None:
        self.root = path
        self._names = names
        self._offsets = offsets
        self._sizes = sizes
        self._stamp = stamp(path)

    def __len__(self) -> int:
        return len(self._offsets)

    def name(self, row: int) -> str:
        """Path within the tar."""
        return self._names[row]

    def read(self, row: int) -> bytes:
        """Bytes of a member. Raises BadImage."""
        size = int(self._sizes[row])
        try:
            file = os.open(self.root, os.O_RDONLY)
            try:
                data = os.pread(file, size, int(self._offsets[row]))
            finally:
                os.close(file)
        except OSError as error:
            raise BadImage(f"{self.root}: {error.strerror or error}.") from None
        if len(data) < size:
            raise BadImage(f"{self.root / self.name(row)}: truncated, {len(data):,} of {size:,} bytes.")
        return data

    def is_file(self) -> bool:
        """False."""
        return False

    def stamps(self, rows: Ints) -> tuple[Keys, NDArray[np.bool_]]:
        """Keys from the tar's path, size and times when it was opened, and the image's place."""
        key, settled = self._stamp
        return within(key, self._offsets[rows]), np.full(len(rows), settled)


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int


@dataclass
class _Sample:
    """Files next to each other that share a key."""

    key: str = ""
    images: list[_Member] = field(default_factory=list)
    labels: list[_Member] = field(default_factory=list)


def read_tar(path: Path, labelled: bool) -> Found:
    """Index a tar. Raises InputError for one that is compressed, truncated or corrupt, and for a missing identity."""
    numbers: dict[str, int] = {}
    owners, offsets, sizes = array("q"), array("q"), array("q")
    strays: list[str] = []
    counted = True

    with path.open("rb") as file, _map(path, file.fileno()) as data:

        def images() -> Iterator[str]:
            nonlocal counted
            for sample in _samples(path, data):
                if labelled and not sample.images:
                    _refuse_lonely(path, sample)
                for image in sample.images:
                    identity, is_number = _identity(path, data, sample, image) if labelled else ("", False)
                    if identity:
                        owners.append(numbers.setdefault(identity, len(numbers)))
                        counted &= is_number
                    else:
                        owners.append(UNLABELLED)
                        strays.append(image.name)
                    offsets.append(image.offset)
                    sizes.append(image.size)
                    yield image.name

        names = PackedNames(images())
    if not len(names):
        raise InputError(f"{path}: holds no image ({', '.join(sorted(SUFFIXES))}).")
    if labelled and strays:
        raise InputError(
            f"{path}: {len(strays):,} images have neither a .cls, .txt or .json next to them nor a folder (first: "
            f"{strays[0]}), so they have no identity. Add labels, or pass the file as --unlabelled."
        )
    found = TarImages(path, names, *(np.frombuffer(a, np.int64) for a in (offsets, sizes)))
    return Found(
        found, np.frombuffer(owners, np.int64), tuple(numbers),
        numbered=counted and bool(numbers), folder=path.parent.resolve(),
    )  # fmt: skip


def _refuse_lonely(path: Path, sample: _Sample) -> None:
    lonely = next((label for label in sample.labels if label.name.endswith(".cls")), None)
    if lonely is not None:
        raise InputError(
            f"{path}: {lonely.name}: no image next to it. The files of one sample must follow each other in the tar."
        )


def _map(path: Path, file: int) -> mmap.mmap:
    try:
        data = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise InputError(f"{path}: empty, no tar. Copy it again.") from None
    if (start := COMPRESSED.get(data[:2])) and data[257:262] != b"ustar":
        data.close()
        raise InputError(f"{path}: compressed with {start}; images in it cannot be reached singly. Unpack it first.")
    return data


def _samples(path: Path, data: mmap.mmap) -> Iterator[_Sample]:
    sample = _Sample()
    for member in _members(path, data):
        key, suffix = posixpath.splitext(member.name)
        suffix = suffix.lower()
        if posixpath.basename(key).startswith(".") or not (suffix in SUFFIXES or suffix in LABELS):
            continue
        if key != sample.key:
            yield sample
            sample = _Sample(key)
        (sample.images if suffix in SUFFIXES else sample.labels).append(member)
    yield sample


def _identity(path: Path, data: mmap.mmap, sample: _Sample, image: _Member) -> tuple[str, bool]:
    """Name of the identity (class numbers with eight digits) and whether it is a class number."""
    if not sample.labels:
        return posixpath.dirname(image.name), False
    member = min(sample.labels, key=lambda label: LABELS.index(posixpath.splitext(label.name)[1].lower()))
    where = f"{path}: {member.name}"
    try:
        text = data[member.offset : member.offset + min(member.size, LONGEST_LABEL)].decode().strip()
        if member.name.lower().endswith(".json"):
            content = json.loads(text)
            text = str(content["identity"] if "identity" in content else content["label"]).strip()
    except UnicodeDecodeError:
        raise InputError(f"{where}: not text. A label is a class number or a name.") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{where}: not a JSON object with 'identity' or 'label'. Add one of them.") from None
    if not text or "\n" in text:
        raise InputError(f"{where}: {text[:40]!r} is no label. Give a class number or a name on one line.")
    return (f"{int(text):08d}", True) if text.isascii() and text.isdigit() else (text, False)


def _members(path: Path, data: mmap.mmap) -> Iterator[_Member]:
    """Regular files of a tar, in order."""
    at, end = 0, len(data)
    long_name, long_size = "", None
    while at + BLOCK <= end:
        head = data[at : at + BLOCK]
        if head[0] == 0 and not any(head):
            return
        size = _number(head[124:136]) if _sound(head) else None
        if size is None:
            raise InputError(f"{path}: no tar header at byte {at:,}: no tar, or corrupt. Copy it again.")
        kind, start = head[156:157], at + BLOCK
        if kind in b"x" + b"LKg":
            extra = data[start : start + size]
            if kind == b"L":
                long_name = os.fsdecode(extra.rstrip(b"\0"))
            elif kind == b"x":
                fields = _pax(extra)
                long_name = fields.get("path", long_name)
                long_size = int(fields["size"]) if fields.get("size", "").isdigit() else long_size
        else:
            size = size if long_size is None else long_size
            if start + size > end:
                raise InputError(
                    f"{path}: truncated: a file at byte {at:,} needs {start + size:,} bytes, the tar has {end:,}. "
                    "Copy it again."
                )
            if kind in b"0\0" + b"7":
                yield _Member(long_name or _name(head), start, size)
            elif kind in b"123456":
                size = 0  # links, devices and folders have no content, whatever their header says
            else:
                raise InputError(f"{path}: {_name(head)} is stored as type {kind!r}. Pack it again as a plain tar.")
            long_name, long_size = "", None
        at = start + (size + BLOCK - 1) // BLOCK * BLOCK
    if at < end or end % BLOCK:
        raise InputError(f"{path}: truncated: it ends within a header at byte {at:,}. Copy it again.")


def _sound(head: bytes) -> bool:
    """Whether the header's checksum, computed with its own field as spaces, is right."""
    told = _number(head[148:156])
    return told is not None and sum(head) - sum(head[148:156]) + 8 * 32 == told


def _number(digits: bytes) -> int | None:
    """Octal text, or GNU's base 256 for sizes from 8 GB."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    try:
        return int(digits.rstrip(b"\0 ").lstrip() or b"0", 8)
    except ValueError:
        return None


def _name(head: bytes) -> str:
    name, prefix = head[:100].split(b"\0", 1)[0], b""
    if head[257:263] == b"ustar\0":
        prefix = head[345:500].split(b"\0", 1)[0]
    return os.fsdecode(prefix + b"/" + name if prefix else name)


def _pax(extra: bytes) -> dict[str, str]:
    """Records ``<length> <key>=<value>\\n`` of a pax header."""
    fields: dict[str, str] = {}
    while extra[:1].isdigit():
        length = int(extra.split(b" ", 1)[0])
        key, _, value = extra[:length].split(b" ", 1)[-1].rstrip(b"\n").partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        extra = extra[max(length, 1) :]
    return fields
