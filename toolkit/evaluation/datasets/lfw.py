"""Read LFW's pair lists: ``pairs.txt`` (View 2, ten folds) and ``pairsDevTest.txt`` (one).

Format (Huang et al. 2007): a first line ``FOLDS N`` or ``N``, then for each fold N genuine pairs ``name i j`` and N
impostor pairs ``name i name j``. An image is ``<faces>/<name>/<name>_%04d`` with any image suffix. The folds of View 2
share no identity.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.text import read_text
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.files import ImageFiles
from pkd.toolkit.data.source import ImageCollection, PackedNames
from pkd.toolkit.evaluation.datasets.pair_list import PairList
from pkd.toolkit.images.codec import SUFFIXES


def read_lfw(listing: Path, faces: Path) -> PairList:
    """Read an LFW pair list whose images lie in ``faces``. Raises InputError naming the line or the missing images."""
    pairs, same, fold = _parse(listing)
    if not faces.is_dir():
        raise InputError(f"{faces}: no such folder. Pass the folder of aligned crops that {listing.name} is about.")
    images = sorted({image for pair in pairs for image in pair})
    found = {image: _locate(faces, *image) for image in images}
    missing = [f"{name}/{name}_{number:04d}" for (name, number), path in found.items() if path is None]
    if missing:
        raise InputError(
            f"{faces}: {len(missing):,} of the {len(images):,} images of {listing.name} are missing (first: "
            f"{missing[0]}.*). Pass the folder that holds <name>/<name>_0001.*, with every image aligned."
        )
    files = PackedNames(path.relative_to(faces).as_posix() for path in found.values() if path is not None)
    names = sorted({name for name, _ in images})
    label = {name: i for i, name in enumerate(names)}
    index = {image: i for i, image in enumerate(images)}
    return PairList(
        faces=FaceSet(
            images=ImageCollection((ImageFiles(faces, files),)),
            rows=np.arange(len(images)),
            labels=np.array([label[name] for name, _ in images], np.int64),
            identities=tuple(names),
        ),
        first=np.array([index[a] for a, _ in pairs], np.int64),
        second=np.array([index[b] for _, b in pairs], np.int64),
        same=np.array(same),
        fold=np.array(fold, np.int64),
    )


Image = tuple[str, int]


def _parse(listing: Path) -> tuple[list[tuple[Image, Image]], list[bool], list[int]]:
    try:
        lines = read_text(listing).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{listing}: {reason}. Give LFW's pairs.txt or a list in its format.") from None
    rows = [(i, line.split()) for i, line in enumerate(lines, 1) if line.strip()]
    try:
        head = [int(field) for field in rows[0][1]]
        folds, each = head if len(head) == 2 else (1, *head)
    except (IndexError, ValueError):
        raise InputError(f"{listing}:1: expected 'FOLDS PAIRS' or 'PAIRS', as in LFW's pairs.txt.") from None
    if min(folds, each) < 1 or len(rows) - 1 != 2 * folds * each:
        raise InputError(
            f"{listing}: {len(rows) - 1:,} pairs, but its first line announces {folds} × 2 × {each}. "
            "Use the file as published."
        )
    pairs: list[tuple[Image, Image]] = []
    for place, (number, fields) in enumerate(rows[1:]):
        genuine = place % (2 * each) < each
        try:
            name, i, other, j = fields if not genuine else (fields[0], fields[1], fields[0], *fields[2:])
            pairs.append(((name, int(i)), (other, int(j))))
        except (IndexError, ValueError):
            expected = "name number number" if genuine else "name number name number"
            raise InputError(f"{listing}:{number}: expected '{expected}'.") from None
    same = [place % (2 * each) < each for place in range(len(pairs))]
    return pairs, same, [place // (2 * each) for place in range(len(pairs))]


def _locate(faces: Path, name: str, number: int) -> Path | None:
    stem = faces / name / f"{name}_{number:04d}"
    return next((path for s in sorted(SUFFIXES) if (path := stem.with_name(stem.name + s)).is_file()), None)
