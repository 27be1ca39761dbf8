"""Read CFP's verification protocol (Sengupta et al. 2016): frontal against frontal (FF) or against profile images (FP).

``Protocol/Pair_list_F.txt`` and ``Pair_list_P.txt`` number the frontal and the profile images, one ``number path`` a
line, the path ending in ``<person>/<frontal|profile>/<image>.jpg``. ``Protocol/Split/<FF|FP>/<fold>/same.txt`` and
``diff.txt`` hold one pair ``i,j`` a line: i numbers a frontal image, j a frontal (FF) or a profile image (FP).
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.text import read_text
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.files import ImageFiles
from pkd.toolkit.data.source import ImageCollection, PackedNames
from pkd.toolkit.evaluation.datasets.pair_list import PairList
from pkd.toolkit.images.codec import SUFFIXES

LISTS = {"FF": ("F", "F"), "FP": ("F", "P")}
PARTS = 3
"""Last parts of an image's path that name it: person, kind, file."""


def read_cfp(split: Path, faces: Path) -> PairList:
    """Read ``Protocol/Split/FF`` or ``FP``; a crop is ``<faces>/<person>/<kind>/<image>`` with any image suffix.

    Raises InputError naming the file and line, or the missing crops.
    """
    split = split.resolve()
    if split.name not in LISTS:
        raise InputError(f"{split}: no pair list. Give LFW's pairs.txt, a .bin, or CFP's Protocol/Split/FF or …/FP.")
    sides = [_images(split.parent.parent / f"Pair_list_{kind}.txt") for kind in LISTS[split.name]]
    folders = sorted(entry for entry in split.iterdir() if entry.is_dir())
    if not folders:
        raise InputError(f"{split}: holds no folders 01, 02 … with same.txt and diff.txt. Copy the protocol again.")
    pairs: list[tuple[str, str]] = []
    same: list[bool] = []
    fold: list[int] = []
    for number, folder in enumerate(folders):
        for name, is_same in (("same.txt", True), ("diff.txt", False)):
            found = _pairs(folder / name, *sides)
            for a, b in found:
                if (_person(a) == _person(b)) != is_same:
                    raise InputError(
                        f"{folder / name}: {a} and {b} are of {'two people' if is_same else 'one person'}. "
                        "Copy the protocol again."
                    )
            pairs += found
            same += [is_same] * len(found)
            fold += [number] * len(found)
    images = sorted({image for pair in pairs for image in pair})
    people = sorted({_person(image) for image in images})
    index = {image: i for i, image in enumerate(images)}
    place = {person: i for i, person in enumerate(people)}
    return PairList(
        faces=FaceSet(
            images=ImageCollection((ImageFiles(faces, _crops(faces, images, split)),)),
            rows=np.arange(len(images)),
            labels=np.array([place[_person(image)] for image in images], np.int64),
            identities=tuple(people),
        ),
        first=np.array([index[a] for a, _ in pairs], np.int64),
        second=np.array([index[b] for _, b in pairs], np.int64),
        same=np.array(same),
        fold=np.array(fold, np.int64),
        sides_differ=split.name == "FP",
        notes=("First images (queries) are frontal, second images (gallery) profile.",) if split.name == "FP" else (),
    )


def _images(listing: Path) -> dict[int, str]:
    """Read a ``Pair_list`` file: number → the last parts of the path, without its suffix."""
    found: dict[int, str] = {}
    for number, line in _lines(listing):
        key, _, path = line.strip().partition(" ")
        parts = PurePosixPath(path.strip().replace("\\", "/")).with_suffix("").parts if path.strip() else ()
        if not key.isdecimal() or len(parts) < PARTS or ".." in parts[-PARTS:]:
            raise InputError(f"{listing}:{number}: expected 'number …/person/kind/image', found {line.strip()[:60]!r}.")
        if int(key) in found:
            raise InputError(f"{listing}:{number}: number {key} occurs twice. Use the file as published.")
        found[int(key)] = "/".join(parts[-PARTS:])
    return found


def _pairs(listing: Path, first: dict[int, str], second: dict[int, str]) -> list[tuple[str, str]]:
    pairs = []
    for number, line in _lines(listing):
        try:
            a, b = (int(field) for field in line.split(","))
        except ValueError:
            raise InputError(f"{listing}:{number}: expected 'number,number', found {line.strip()[:60]!r}.") from None
        if a not in first or b not in second:
            missing, side = (a, "first") if a not in first else (b, "second")
            raise InputError(f"{listing}:{number}: image {missing} is not in the {side} side's Pair_list file.")
        pairs.append((first[a], second[b]))
    return pairs


def _lines(path: Path) -> list[tuple[int, str]]:
    """Read numbered lines that are not blank. Raises InputError for none."""
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{path}: {reason}. Give CFP's Protocol folder as published.") from None
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise InputError(f"{path}: empty. Copy the protocol again.")
    return lines


def _person(image: str) -> str:
    return image.split("/", 1)[0]


def _crops(faces: Path, images: list[str], split: Path) -> PackedNames:
    if not faces.is_dir():
        raise InputError(f"{faces}: no such folder. Pass the folder of aligned CFP crops, <person>/<kind>/<image>.")
    found = [next((name for s in sorted(SUFFIXES) if (faces / (name := image + s)).is_file()), "") for image in images]
    missing = [image for image, name in zip(images, found, strict=True) if not name]
    if missing:
        raise InputError(
            f"{faces}: {len(missing):,} of the {len(images):,} images of {split.name} are missing (first: "
            f"{missing[0]}.*). Pass the folder that holds <person>/frontal and <person>/profile, every image aligned."
        )
    return PackedNames(found)
