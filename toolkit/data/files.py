"""Read images that are files of their own, from a folder per identity or from a list of paths."""

from __future__ import annotations

import os
import posixpath
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import BadImage, InputError
from pkd.toolkit.core.text import text_encoding
from pkd.toolkit.data.source import UNLABELLED, Found, Ints, Keys, PackedNames, stamp
from pkd.toolkit.data.tree import LeftOut, person_of, printable, report_left_out, walk_images
from pkd.toolkit.images.codec import SUFFIXES


class ImageFiles:
    """Read files below ``root`` by relative path."""

    def __init__(self, root: Path, names: PackedNames) -> None:
        self.root = root
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, row: int) -> str:
        """Return the path as the folder or the list gives it, as text that can be written anywhere."""
        return printable(self._names[row])

    def path(self, row: int) -> Path:
        """Return the file itself."""
        return Path(self._path(row))

    def read(self, row: int) -> bytes:
        """Read all bytes of the file. Raises BadImage."""
        path = self._path(row)
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123 — a Path would cost more than the reading
                return file.read()
        except OSError as error:
            raise BadImage(f"{path}: {error.strerror or error}.") from None

    def stamps(self, rows: Ints) -> tuple[Keys, NDArray[np.bool_]]:
        """Make a key per file over path, size and times; see ``image_source.stamp``."""
        found = [stamp(self._path(row)) for row in rows.tolist()]
        return np.array([key for key, _ in found], np.uint64), np.array([untouched for _, untouched in found], np.bool_)

    def _path(self, row: int) -> str:
        return posixpath.join(self.root, self._names[row])


def read_folder(folder: Path, labelled: bool) -> Found:
    """Find images below ``folder``, in the order of their path's parts; the identity is the first folder below it."""
    owners, left_out = _Owners(), list[LeftOut]()
    names = PackedNames(owners.note(name, person_of(name)) for name in walk_images(folder, left_out.append))
    report_left_out(folder, left_out)
    if not len(names):
        raise InputError(f"{folder}: holds no image ({', '.join(sorted(SUFFIXES))}), no .rec and no .tar file.")
    if labelled and "" in owners.identities:
        stray = np.flatnonzero(owners.labels() == owners.identities[""])
        raise InputError(
            f"{folder}: {len(stray):,} images lie directly in it (first: {printable(names[int(stray[0])])}), so they "
            "have no identity. Put each person's images in a folder of their own, or pass the folder as --unlabelled."
        )
    return owners.found(ImageFiles(folder, names), labelled)


def read_list(listing: Path, labelled: bool) -> Found:
    """Find the images that a text file names, a path a line, relative to the file's folder or that folder's parent."""
    owners = _Owners()
    tidy: dict[str, str] = {}  # a list names few folders and many files

    def lines() -> Iterator[str]:
        with listing.open(encoding=text_encoding(listing)) as file:
            for line in map(str.strip, file):
                if windows:
                    line = line.replace("\\", "/")
                if line and not line.startswith("#"):
                    parent = posixpath.dirname(line)
                    if parent not in tidy:
                        tidy[parent] = Path(parent).as_posix()
                    yield owners.note(line, tidy[parent])

    roots = (listing.parent, listing.parent.parent, listing.parent.resolve().parent)
    windows = _written_on_windows(listing, roots)
    try:
        names = PackedNames(lines())
    except UnicodeError:
        raise InputError(
            f"{listing}: not a text file. Give a folder, a list with one image path a line, a .rec or a .tar."
        ) from None
    if not len(names):
        raise InputError(f"{listing}: the list is empty.")
    root = next((r for r in roots if (r / names[0]).is_file()), None)
    if root is None:
        parts = re.split(r"[\s,;\"]+", names[0])  # what sets labels apart in other projects' lists
        more = " A list holds one path a line and no labels: the identity is the image's folder." * (len(parts) > 1)
        raise InputError(f"{listing}: its first image {names[0]!r} lies neither in {roots[0]} nor in {roots[2]}.{more}")
    missing = [row for row in range(len(names)) if not os.path.isfile(posixpath.join(root, names[row]))]  # noqa: PTH113
    if missing:
        raise InputError(
            f"{listing}: {len(missing):,} of {len(names):,} images do not exist (first: {names[missing[0]]})."
        )
    return owners.found(ImageFiles(root, names), labelled)


def _written_on_windows(listing: Path, roots: tuple[Path, ...]) -> bool:
    """Tell whether the first path of a list is there only with its backslashes turned."""
    with listing.open(encoding=text_encoding(listing), errors="replace") as file:
        first = next((line for line in map(str.strip, file) if line and not line.startswith("#")), "")
    return "\\" in first and not any((root / first).is_file() for root in roots)


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
        return Found(images, self.labels(), tuple(map(printable, self.identities)))
