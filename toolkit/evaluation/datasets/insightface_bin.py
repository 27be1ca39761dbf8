"""Read InsightFace's ``.bin`` verification sets: a pickle of (encoded images, is-same list), two images to a pair.

arcface_torch's ``eval/verification.py`` reads them so: pair i is images 2i and 2i+1, strings of Python 2 are bytes,
and ten folds of neighbouring pairs. Such a file names no person.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.source import ImageCollection, Ints, Keys
from pkd.toolkit.evaluation.datasets.pair_list import PairList, linked
from pkd.toolkit.evaluation.datasets.safe_pickle import NotPlain, PlainArray, load_plain

FOLDS = 10
GIVE = "Give a .bin as InsightFace publishes them: (encoded images, is-same list)."


class PackedImages:
    """Hold encoded images in memory."""

    def __init__(self, path: Path, images: list[bytes]) -> None:
        self.root = path.parent
        self._name = path.name
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def name(self, row: int) -> str:
        """Return ``lfw.bin#7`` for the eighth distinct image."""
        return f"{self._name}#{row}"

    def read(self, row: int) -> bytes:
        """Return the image's bytes."""
        return self._images[row]

    def stamps(self, rows: Ints) -> tuple[Keys, NDArray[np.bool_]]:
        """Return no keys: hashing bytes in memory is as fast as looking a digest up."""
        return np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.bool_)


def looks_pickled(path: Path) -> bool:
    """Tell whether a file begins as a pickle of a tuple or list does, and not as text does."""
    with path.open("rb") as file:
        return file.read(1) in {b"\x80", b"(", b"]"}


def read_bin(path: Path) -> PairList:
    """Read a ``.bin``. Images with equal bytes are one image; people are rebuilt from what is declared the same.

    Raises InputError for a file that is truncated, holds anything but plain data, or whose counts do not fit.
    """
    try:
        images, same = _parse(path, load_plain(path))
    except NotPlain as error:
        raise InputError(f"{path}: {error} {GIVE}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. Make it readable.") from None
    index: dict[bytes, int] = {}
    which = np.array([index.setdefault(image, len(index)) for image in images], np.int64)
    first, second = which[0::2], which[1::2]
    owner = linked(len(index), first[same], second[same])
    people = int(owner.max()) + 1
    notes = [
        f"{path.name} names no people: its {len(index):,} distinct images form {people:,} groups, joined where two are "
        "declared the same, and intervals are over these. One person in several groups makes them slightly too narrow.",
        "Whether first and second images differ in kind is not known, so both directions are given.",
    ]
    if clashes := int((owner[first] == owner[second])[~same].sum()):
        notes.append(
            f"{clashes:,} pairs that are declared different join images of one group: the file contradicts itself."
        )
    return PairList(
        faces=FaceSet(
            images=ImageCollection((PackedImages(path, list(index)),)),
            rows=np.arange(len(index)),
            labels=owner,
            identities=tuple(f"group {i:06d}" for i in range(people)),
        ),
        first=first,
        second=second,
        same=same,
        fold=_folds(len(same)),
        sides_differ=True,
        notes=tuple(notes),
    )


def _parse(path: Path, content: object) -> tuple[list[bytes], NDArray[np.bool_]]:
    if not isinstance(content, (tuple, list)) or len(content) != 2:
        raise InputError(f"{path}: holds a {_kind(content)}, not two lists. {GIVE}")
    listed, flags = content
    images = _items(path, listed, "images")
    same = [_flag(path, i, flag) for i, flag in enumerate(_items(path, flags, "is-same"))]
    if not same:
        raise InputError(f"{path}: holds no pair. {GIVE}")
    if len(images) != 2 * len(same):
        raise InputError(f"{path}: {len(images):,} images for {len(same):,} pairs, expected two each. Copy it again.")
    if all(same) or not any(same):
        raise InputError(f"{path}: all {len(same):,} pairs are declared {'same' if same[0] else 'different'}. {GIVE}")
    return [_encoded(path, i, image) for i, image in enumerate(images)], np.array(same)


def _items(path: Path, listed: object, name: str) -> list[object]:
    if isinstance(listed, PlainArray):
        listed = listed.tolist()
    if not isinstance(listed, (tuple, list)):
        raise InputError(f"{path}: its {name} are a {_kind(listed)}, not a list. {GIVE}")
    return list(listed)


def _flag(path: Path, i: int, flag: object) -> bool:
    if isinstance(flag, (bool, int)) and flag in (0, 1):
        return bool(flag)
    raise InputError(f"{path}: is-same entry {i} is {str(flag)[:40]!r}, not true or false. {GIVE}")


def _encoded(path: Path, i: int, image: object) -> bytes:
    if isinstance(image, PlainArray):
        image = image.as_bytes()
    if not isinstance(image, bytes) or not image:
        raise InputError(f"{path}: image {i} is {'empty' if image == b'' else f'a {_kind(image)}, not bytes'}. {GIVE}")
    return image


def _kind(value: object) -> str:
    return "numpy array" if isinstance(value, PlainArray) else type(value).__name__


def _folds(pairs: int) -> Ints:
    """Give neighbouring pairs one fold; the first folds are one longer where the count is no multiple of ten."""
    folds = min(FOLDS, pairs)
    return np.repeat(np.arange(folds), [len(part) for part in np.array_split(np.arange(pairs), folds)])
