"""Remember which images and people a training saw, as numbers that say nothing else: ``seen.npz`` of a run.

It stays with the run and goes into no bundle: whoever has a person's name can make its number.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.data.face_set import FaceSet

FILE = "seen.npz"


def write_seen(run: Path, faces: FaceSet) -> None:
    """Write the first eight bytes of each image's SHA-256, and of each name's, into the run's folder."""
    part = run / f"{FILE}.part"
    with part.open("wb") as file:
        np.savez(file, images=np.unique(_images(faces, None)), people=np.unique(_people(faces.identities)))
    part.replace(run / FILE)


def seen_in(run: Path, faces: FaceSet, cache: Path | None) -> tuple[int, int]:
    """Count the images of ``faces``, and the people by name, that the training of ``run`` saw; 0, 0 where none is."""
    try:
        with (run / FILE).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            images, people = file["images"], file["people"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return 0, 0
    return int(np.isin(_images(faces, cache), images).sum()), int(np.isin(_people(faces.identities), people).sum())


def _images(faces: FaceSet, cache: Path | None) -> NDArray[np.uint64]:
    return np.ascontiguousarray(faces.digests(cache)[:][:, :8]).view(np.uint64)[:, 0]


def _people(identities: tuple[str, ...]) -> NDArray[np.uint64]:
    """Make a number of the last part of each name; class numbers mean other people in every set."""
    names = (name.rpartition("/")[2] for name in identities)
    known = [name.encode("utf-8", "surrogateescape") for name in names if not name.isdigit()]
    return np.frombuffer(b"".join(hashlib.sha256(name).digest()[:8] for name in known), np.uint64)
