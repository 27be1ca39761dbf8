"""Read images that are files of their own, from a folder per identity or from a list of paths."""

from __future__ import annotations

import os
import posixpath
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import BadImage, InputError
from pkd.toolkit.data.source import UNLABELLED, Found, Ints, Keys, PackedNames, stamp
from pkd.toolkit.images.codec import SUFFIXES


class ImageFiles:
    """Read files below ``root`` by relative path."""

    def __init__(self, root: Path, names: PackedNames) -> None:
        self.root = root
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, row: int) -> str:
        """Return the path as the folder or the list gives it."""
        return self._names[row]

    def read(self, row: int) -> bytes:
        """Read all bytes of the file. Raises BadImage."""
        path = self._path(row)
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123 — a Path would cost more than the reading
                return file.read()
        except OSError as error:
            raise BadImage(f"{path}: {error.strerror or error}.") from None

    def is_file(self) -> bool:
        """Return True."""
        return True

    def stamps(self, rows: Ints) -> tuple[Keys, NDArray[np.bool_]]:
        """Make a key per file over path, size and times; see ``image_source.stamp``."""
        found = [stamp(self._path(row)) for row in rows.tolist()]
        return np.array([key for key, _ in found], np.uint64), np.array([settled for _, settled in found], np.bool_)

    def _path(self, row: int) -> str:
        return posixpath.join(self.root, self._names[row])


def read_folder(folder: Path, labelled: bool) -> Found:
    """Find images below ``folder``, in the order of their path's parts; identity = the path of an image's folder."""
    owners, files = _Owners(), _walk(folder, "")
    names = PackedNames(owners.note(name, posixpath.dirname(name)) for name in files)
    if not len(names):
        raise InputError(f"{folder}: holds no image ({', '.join(sorted(SUFFIXES))}), no .rec and no .tar file.")
    if labelled and "" in owners.identities:
        stray = np.flatnonzero(owners.labels() == owners.identities[""])
        raise InputError(
            f"{folder}: {len(stray):,} images lie directly in it (first: {names[int(stray[0])]}), so they have no "
            "identity. Put each person's images in a folder of their own, or pass the folder as --unlabelled."
        )
    return owners.found(ImageFiles(folder, names), labelled)


def read_list(listing: Path, labelled: bool) -> Found:
    """Find the images that a text file names, a path a line, relative to the file's folder or that folder's parent."""
    owners = _Owners()
    tidy: dict[str, str] = {}  # a list names few folders and many files

    def lines() -> Iterator[str]:
        with listing.open(encoding="utf-8") as file:
            for line in map(str.strip, file):
                if line and not line.startswith("#"):
                    parent = posixpath.dirname(line)
                    if parent not in tidy:
                        tidy[parent] = Path(parent).as_posix()
                    yield owners.note(line, tidy[parent])

    try:
        names = PackedNames(lines())
    except UnicodeDecodeError:
        raise InputError(
            f"{listing}: not a text file. Give a folder, a list with one image path a line, a .rec or a .tar."
        ) from None
    if not len(names):
        raise InputError(f"{listing}: the list is empty.")
    roots = (listing.parent, listing.parent.parent, listing.parent.resolve().parent)
    root = next((r for r in roots if (r / names[0]).is_file()), None)
    if root is None:
        raise InputError(f"{listing}: its first image {names[0]!r} lies neither in {roots[0]} nor in {roots[2]}.")
    missing = [row for row in range(len(names)) if not os.path.isfile(posixpath.join(root, names[row]))]  # noqa: PTH113
    if missing:
        raise InputError(
            f"{listing}: {len(missing):,} of {len(names):,} images do not exist (first: {names[missing[0]]})."
        )
    return owners.found(ImageFiles(root, names), labelled)


class _Owners:
    """Number the identities in the order in which they first occur."""

    def __init__(self) -> None:
        self.identities: dict[str, int] = {}
        self._labels = array("q")

    def note(self, name: str, identity: str) -> str:
        self._labels.append(self.identities.setdefault(identity, len(self.identities)))
        return name

    def labels(self) -> Ints:
        return np.frombuffer(self._labels, np.int64)

    def found(self, images: ImageFiles, labelled: bool) -> Found:
        if not labelled:
            return Found(images, np.full(len(images), UNLABELLED, np.int64), ())
        return Found(images, self.labels(), tuple(self.identities))


def _walk(folder: Path, below: str) -> Iterable[str]:
    with os.scandir(folder / below) as entries:
        here = sorted(entries, key=lambda entry: entry.name)
    for entry in here:
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder, name)
        elif posixpath.splitext(name)[1].lower() in SUFFIXES and entry.is_file():
            yield name
