"""Read images in an uncompressed tar, as WebDataset lays them out or as a folder per identity was packed.

Images stay where they are: one pass over the headers (POSIX.1-1988 ustar, its pax extension, GNU long names) notes
offset and size of each. The identity of ``<key>.jpg`` is in ``<key>.cls``, ``<key>.txt`` or ``<key>.json`` next to
it (a JSON object with ``identity`` or ``label``), else it is the folder that the image lies in.
"""

from __future__ import annotations

import json
import os
import posixpath
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import BadImage, InputError
from pkd.toolkit.core.text import decode_text
from pkd.toolkit.data.source import UNLABELLED, Found, Ints, Keys, PackedNames, stamp, within
from pkd.toolkit.data.tree import CONTAINERS, OTHER_IMAGES, LeaveOut, LeftOut, is_hidden, printable, report_left_out
from pkd.toolkit.images.codec import SUFFIXES

LINKS = (tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
"""Members without content."""
LABELS = (".cls", ".json", ".txt")
"""Endings of label files; the first counts where a sample has several."""
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
LONGEST_LABEL = 1 << 20


class TarImages:
    """Read the images of one tar: 16 bytes of memory and the name for each."""

    def __init__(self, path: Path, names: PackedNames, offsets: Ints, sizes: Ints) -> None:
        self.root = path
        self._names = names
        self._offsets = offsets
        self._sizes = sizes
        self._stamp = stamp(path)

    def __len__(self) -> int:
        return len(self._offsets)

    def name(self, row: int) -> str:
        """Return the path within the tar, as text that can be written anywhere."""
        return printable(self._names[row])

    def read(self, row: int) -> bytes:
        """Read the bytes of a member. Raises BadImage."""
        size = int(self._sizes[row])
        try:
            data = _read(self.root, int(self._offsets[row]), size)
        except OSError as error:
            raise BadImage(f"{self.root}: {error.strerror or error}.") from None
        if len(data) < size:
            raise BadImage(f"{self.root / self.name(row)}: truncated, {len(data):,} of {size:,} bytes.")
        return data

    def stamps(self, rows: Ints) -> tuple[Keys, NDArray[np.bool_]]:
        """Make keys from the tar's path, size and times when it was opened, and the image's place."""
        key, untouched = self._stamp
        return within(key, self._offsets[rows]), np.full(len(rows), untouched)


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int


@dataclass
class _Sample:
    """Hold files next to each other that share a key."""

    key: str = ""
    images: list[_Member] = field(default_factory=list)
    labels: list[_Member] = field(default_factory=list)


def read_tar(path: Path, labelled: bool) -> Found:
    """Index a tar. Raises InputError for one that is compressed, truncated or corrupt, and for a missing identity."""
    numbers: dict[str, int] = {}
    owners, offsets, sizes = array("q"), array("q"), array("q")
    strays: list[str] = []
    folders: set[str] = set()
    left_out: list[LeftOut] = []
    counted = True

    _require_plain(path)

    def images() -> Iterator[str]:
        nonlocal counted
        for sample in _samples(path, left_out.append):
            if labelled and not sample.images:
                _refuse_lonely(path, sample)
            for image in sample.images:
                identity, is_number = _identity(path, sample, image) if labelled else ("", False)
                if identity and not sample.labels:
                    folders.add(identity)
                if identity:
                    owners.append(numbers.setdefault(identity, len(numbers)))
                    counted &= is_number
                else:
                    owners.append(UNLABELLED)
                    strays.append(image.name)
                offsets.append(image.offset)
                sizes.append(image.size)
                yield image.name

    try:
        names = PackedNames(images())
    except tarfile.TarError as error:
        raise InputError(f"{path}: no tar header at byte 0 or truncated: {error}. Copy it again.") from None
    report_left_out(path, left_out)
    if not len(names):
        raise InputError(f"{path}: holds no image ({', '.join(sorted(SUFFIXES))}).")
    if labelled and strays:
        raise InputError(
            f"{path}: {len(strays):,} images have neither a .cls, .txt or .json next to them nor a folder (first: "
            f"{strays[0]}), so they have no identity. Add labels, or pass the file as --unlabelled."
        )
    people = _people(path, list(numbers), folders)
    if people != list(numbers):
        index = {person: i for i, person in enumerate(dict.fromkeys(people))}
        place = np.array([*(index[person] for person in people), UNLABELLED], np.int64)
        owners, numbers = array("q", place[np.frombuffer(owners, np.int64)].tobytes()), index
    found = TarImages(path, names, *(np.frombuffer(a, np.int64) for a in (offsets, sizes)))
    return Found(
        found, np.frombuffer(owners, np.int64), tuple(map(printable, numbers)),
        numbered=counted and bool(numbers), folder=path.parent.resolve(),
    )  # fmt: skip


def _people(path: Path, identities: list[str], folders: set[str]) -> list[str]:
    """Name the person of each folder of a tar: its first part, or the first two where all lie in one folder of folders.

    ``tar -cf faces.tar faces`` puts the packed folder's own name before every person's. What is no folder is a label.
    Raises InputError where images lie in that one folder and in folders of it: it may be a person, or hold people.
    """
    parts = {folder: folder.split("/") for folder in folders}
    one = len({each[0] for each in parts.values()}) == 1
    deep = [folder for folder, each in parts.items() if len(each) > 1]
    if one and 1 < len(deep) < len(parts):
        raise InputError(
            f"{path}: images lie in the folder {printable(deep[0].split('/')[0])} and in folders of it (first: "
            f"{printable(deep[0])}), so it may be one person or hold people. Pack each person's images in one folder."
        )
    top = one and len(deep) == len(parts)
    return ["/".join(parts[each][: 2 if top else 1]) if each in folders else each for each in identities]


def _refuse_lonely(path: Path, sample: _Sample) -> None:
    lonely = next((label for label in sample.labels if label.name.endswith(".cls")), None)
    if lonely is not None:
        raise InputError(
            f"{path}: {lonely.name}: no image next to it. The files of one sample must follow each other in the tar."
        )


def _read(path: Path, offset: int, size: int) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, size, offset)
    finally:
        os.close(file)


def _require_plain(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise InputError(f"{path}: empty, no tar. Copy it again.")
    if (packed := COMPRESSED.get(start[:2])) and start[257:262] != b"ustar":
        raise InputError(f"{path}: compressed with {packed}; images in it cannot be reached singly. Unpack it first.")


def _samples(path: Path, leave_out: LeaveOut) -> Iterator[_Sample]:
    sample = _Sample()
    for member in _members(path, leave_out):
        key, suffix = posixpath.splitext(member.name)
        suffix = suffix.lower()
        hidden = any(is_hidden(part) for part in key.removeprefix("./").split("/"))
        if hidden or not (suffix in SUFFIXES or suffix in LABELS):
            if not hidden and suffix in OTHER_IMAGES:
                leave_out(LeftOut(member.name, f"not one of {', '.join(sorted(SUFFIXES))}; convert it first"))
            elif not hidden and suffix in CONTAINERS:
                leave_out(LeftOut(member.name, "a container within a tar; give it by itself"))
            continue
        if key != sample.key:
            yield sample
            sample = _Sample(key)
        (sample.images if suffix in SUFFIXES else sample.labels).append(member)
    yield sample


def _identity(path: Path, sample: _Sample, image: _Member) -> tuple[str, bool]:
    """Name the identity (class numbers with eight digits) and whether it is a class number."""
    if not sample.labels:
        return posixpath.dirname(image.name).removeprefix("./"), False
    member = min(sample.labels, key=lambda label: LABELS.index(posixpath.splitext(label.name)[1].lower()))
    where = f"{path}: {member.name}"
    try:
        text = decode_text(_read(path, member.offset, min(member.size, LONGEST_LABEL))).strip()
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


def _members(path: Path, leave_out: LeaveOut) -> Iterator[_Member]:
    """Yield the regular files of a tar, in order; what ``tarfile`` would pass over is refused.

    ``tarfile`` takes a damaged header behind the first, and a cut within one, for the end of the tar.
    """
    size = path.stat().st_size
    with tarfile.open(path, "r:", errorlevel=2) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # millions of them would be kept
            if member.offset_data + (member.size if member.isreg() else 0) > size:
                raise InputError(
                    f"{path}: truncated: a file at byte {member.offset:,} needs {member.offset_data + member.size:,} "
                    f"bytes, the tar has {size:,}. Copy it again."
                )
            if member.issparse() or not (member.isreg() or member.type in (*LINKS, tarfile.CONTTYPE)):
                raise InputError(
                    f"{path}: {member.name} is stored as type {member.type!r}. Pack it again as a plain tar."
                )
            if member.islnk() or member.issym():
                leave_out(LeftOut(member.name, "a link; pack files in its place: tar -h --hard-dereference"))
            if member.isreg():
                yield _Member(member.name, member.offset_data, member.size)
        with path.open("rb") as file:
            file.seek(tar.offset)
            rest = file.read(tarfile.BLOCKSIZE)
        if len(rest) not in (0, tarfile.BLOCKSIZE):
            raise InputError(f"{path}: truncated: it ends within a header at byte {tar.offset:,}. Copy it again.")
        if any(rest):
            raise InputError(f"{path}: no tar header at byte {tar.offset:,}: no tar, or corrupt. Copy it again.")
