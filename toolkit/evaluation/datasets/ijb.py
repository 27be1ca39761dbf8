"""Read the templates of IJB-B and IJB-C, in the layout that InsightFace evaluates.

The folder ``meta`` holds, all beginning with ``ijbb_`` or ``ijbc_``: ``face_tid_mid.txt`` (a face a line: image,
template, medium), ``name_5pts_score.txt`` (the same faces in the same order: image, x and y of five points, detector
score), ``template_pair_label.txt`` (1:1) and NIST's ``1N_gallery_*.csv`` and ``1N_probe_mixed.csv`` (1:N, one line a
face, with TEMPLATE_ID and SUBJECT_ID). Images lie in ``loose_crop``. IJB-C: Maze et al. 2018; IJB-B: Whitelam et al.
2017.
"""

from __future__ import annotations

import csv
import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import BadImage, InputError, NoFace
from pkd.toolkit.core.text import text_encoding
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.files import ImageFiles
from pkd.toolkit.data.source import ImageCollection, ImageSource, Keys, PackedNames
from pkd.toolkit.evaluation.datasets.pair_list import linked
from pkd.toolkit.evaluation.metrics.listed_pairs import Ids, read_pair_labels
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Ints, Mask
from pkd.toolkit.images.alignment import warp
from pkd.toolkit.images.codec import decode_rgb

FACES = "_face_tid_mid.txt"
POINTS = 10
PUBLISHED = "Use the meta folder as published."


@dataclass(frozen=True)
class Templates:
    """Hold T templates of N faces, and the protocols over them."""

    faces: FaceSet
    """N; the label of a face is the row of its template."""
    ids: Ints
    """T: template numbers, ascending."""
    media: int
    """Media of all templates."""
    weight: Doubles
    """N: what a face adds to its template: its detector score (1 without) over the faces of its medium."""
    subject: Ints
    """T: subject of each template, from 0."""
    rebuilt: int
    """Templates without a SUBJECT_ID, whose subject is that of the templates that they are declared the same as."""
    pairs: tuple[Ids, Ids, Mask] | None
    """1:1: first (enrolled) and second (probe) template row of each pair, and whether they are of one subject."""
    galleries: tuple[Ints, ...]
    """1:N: template rows that each gallery enrols."""
    probes: Ints
    """1:N: template rows that are searched; empty without a 1:N protocol."""
    aligned: bool
    """The images are loose crops that are aligned by the published points."""
    scored: bool
    """Faces are weighted by their detector scores."""


def read_templates(meta: Path, images: Path, *, scored: bool = True) -> Templates:
    """Read a meta folder whose images lie in ``images``.

    Without ``name_5pts_score.txt`` the images must be aligned crops. ``scored``: weigh faces by detector score where
    there is one. Raises InputError naming the file and line.
    """
    stem = _stem(meta)
    names, template, medium = _faces(meta / f"{stem}{FACES}")
    if not images.is_dir():
        raise InputError(f"{images}: no such folder. Pass the folder of the images (loose_crop) with --faces.")
    points_file = meta / f"{stem}_name_5pts_score.txt"
    numbers = _points(points_file, names) if points_file.is_file() else None
    missing = [row for row in range(len(names)) if not (images / names[row]).is_file()]
    if missing:
        raise InputError(
            f"{images}: {len(missing):,} of the {len(names):,} images of {stem}{FACES} are missing (first: "
            f"{names[missing[0]]}). Pass the folder that holds them."
        )
    ids, row = np.unique(template, return_inverse=True)
    media, of_medium, in_medium = np.unique(np.stack([row, medium]), axis=1, return_inverse=True, return_counts=True)
    weight = 1 / in_medium[of_medium.ravel()]
    if numbers is not None and scored:
        weight = weight * numbers[:, POINTS]
    if len(empty := np.flatnonzero(np.bincount(row, weight) <= 0)):
        raise InputError(f"{points_file}: all faces of template {ids[empty[0]]} have score 0. {PUBLISHED}")
    source: ImageSource = ImageFiles(images, names)
    if numbers is not None:
        source = LooseCrops(images, names, numbers[:, :POINTS].reshape(-1, 5, 2).astype(np.float32))

    gallery_files = sorted(meta.glob(f"{stem}_1N_gallery_*.csv"))
    probe_file = meta / f"{stem}_1N_probe_mixed.csv"
    if bool(gallery_files) != probe_file.is_file():
        lacking = probe_file.name if gallery_files else f"{stem}_1N_gallery_*.csv"
        raise InputError(f"{meta}: has no {lacking}, without which nobody can be searched. {PUBLISHED}")
    listed = [(path, _subjects(path, ids)) for path in (*gallery_files, *([probe_file] if gallery_files else []))]
    label_file = meta / f"{stem}_template_pair_label.txt"
    pairs = read_pair_labels(label_file, ids) if label_file.is_file() else None
    if pairs is None and not listed:
        raise InputError(f"{meta}: has neither {label_file.name} nor 1N_*.csv files: nothing to compare. {PUBLISHED}")
    subject, rebuilt = _people(len(ids), ids, listed, pairs, label_file)
    return Templates(
        faces=FaceSet(
            images=ImageCollection((source,)),
            rows=np.arange(len(names)),
            labels=row.ravel().astype(np.int64),
            identities=tuple(f"template {number}" for number in ids.tolist()),
        ),
        ids=ids,
        media=media.shape[1],
        weight=weight,
        subject=subject,
        rebuilt=rebuilt,
        pairs=pairs,
        galleries=tuple(np.array(sorted(of), np.int64) for _, of in listed[:-1]),
        probes=np.array(sorted(listed[-1][1]) if listed else [], np.int64),
        aligned=numbers is not None,
        scored=numbers is not None and scored,
    )


def _stem(meta: Path) -> str:
    found = sorted(meta.glob(f"*{FACES}")) if meta.is_dir() else []
    if len(found) != 1:
        what = "no such folder" if not meta.is_dir() else f"holds {len(found)} files *{FACES}, expected one"
        raise InputError(f"{meta}: {what}. Give the meta folder of IJB-B or IJB-C as InsightFace packs it.")
    return found[0].name.removesuffix(FACES)


def _faces(path: Path) -> tuple[PackedNames, Ints, Ints]:
    templates, media = array("q"), array("q")
    seen: set[tuple[str, int]] = set()

    def images() -> Iterator[str]:
        for number, fields in _lines(path):
            try:
                image, template, medium = fields[0], int(fields[1]), int(fields[2])
                extra = fields[3:]
            except (IndexError, ValueError):
                extra = fields
            if extra:
                raise InputError(f"{path}:{number}: expected 'image template medium', found {' '.join(fields)[:60]!r}.")
            if (image, template) in seen:
                raise InputError(f"{path}:{number}: {image} occurs twice in template {template}. {PUBLISHED}")
            seen.add((image, template))
            templates.append(template)
            media.append(medium)
            yield image

    names = PackedNames(images())
    if not len(names):
        raise InputError(f"{path}: empty. {PUBLISHED}")
    return names, np.frombuffer(templates, np.int64), np.frombuffer(media, np.int64)


def _points(path: Path, names: PackedNames) -> NDArray[np.float32]:
    """Read N×11: five points and a score, in the order of ``names``."""
    found, count = array("f"), 0
    for number, fields in _lines(path):
        if count == len(names) or fields[0] != names[count]:
            wanted = repr(names[count]) if count < len(names) else "no further face"
            raise InputError(f"{path}:{number}: {fields[0]!r} where the list of faces has {wanted}. {PUBLISHED}")
        try:
            values = [float(field) for field in fields[1:]]
        except ValueError:
            values = []
        if len(values) != POINTS + 1 or not np.isfinite(values).all() or values[POINTS] < 0:
            raise InputError(
                f"{path}:{number}: expected image, ten finite coordinates and a score of 0 or more, found "
                f"{' '.join(fields)[:80]!r}."
            )
        found.extend(values)
        count += 1
    if count < len(names):
        raise InputError(f"{path}: truncated: {count:,} faces, the list of faces has {len(names):,}. Copy it again.")
    return np.frombuffer(found, np.float32).reshape(-1, POINTS + 1)


def _subjects(path: Path, ids: Ints) -> dict[int, str]:
    """Read one of NIST's CSV files: template row → SUBJECT_ID."""
    found: dict[int, str] = {}
    try:
        with path.open(encoding=text_encoding(path), newline="") as file:
            lines = csv.reader(file)
            head = [name.strip().upper() for name in next(lines, [])]
            if "TEMPLATE_ID" not in head or "SUBJECT_ID" not in head:
                raise InputError(
                    f"{path}:1: expected columns TEMPLATE_ID and SUBJECT_ID, found {head[:4]}. {PUBLISHED}"
                )
            at_template, at_subject = head.index("TEMPLATE_ID"), head.index("SUBJECT_ID")
            for number, fields in enumerate(lines, 2):
                if not fields:
                    continue
                try:
                    template, subject = int(fields[at_template]), fields[at_subject].strip()
                except (IndexError, ValueError):
                    raise InputError(f"{path}:{number}: no template number and subject, found {fields[:3]}.") from None
                row = int(np.searchsorted(ids, template))
                if row == len(ids) or ids[row] != template or not subject:
                    what = f"template {template} has no faces" if subject else "the subject is empty"
                    raise InputError(f"{path}:{number}: {what}. Use the files of one data set.")
                if found.setdefault(row, subject) != subject:
                    raise InputError(
                        f"{path}:{number}: template {template} is of subject {subject} here and of {found[row]} above."
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a CSV file"
        raise InputError(f"{path}: {reason}. {PUBLISHED}") from None
    if not found:
        raise InputError(f"{path}: names no template. {PUBLISHED}")
    return found


def _people(
    count: int,
    ids: Ints,
    listed: list[tuple[Path, dict[int, str]]],
    pairs: tuple[Ids, Ids, Mask] | None,
    label_file: Path,
) -> tuple[Ints, int]:
    """Find the subject of every template, and how many no CSV names. Raises InputError where the files disagree."""
    owner: dict[int, str] = {}
    enrolled: dict[int, Path] = {}
    links: list[tuple[int, int]] = []
    one_of: dict[str, int] = {}
    for path, of in listed:
        for row, subject in of.items():
            if row in enrolled:
                raise InputError(f"{path}: template {ids[row]} is also in {enrolled[row].name}. {PUBLISHED}")
            enrolled[row] = path
            owner[row] = subject
            links.append((row, one_of.setdefault(subject, row)))
    first, second = (np.array([link[side] for link in links], np.int64) for side in (0, 1))
    if pairs:
        first = np.concatenate([first, pairs[0][pairs[2]]])
        second = np.concatenate([second, pairs[1][pairs[2]]])
    subject_of = linked(count, first, second)
    names: dict[int, str] = {}
    for row, subject in owner.items():
        if names.setdefault(int(subject_of[row]), subject) != subject:
            raise InputError(
                f"{label_file}: declares templates of subjects {names[int(subject_of[row])]} and {subject} the same. "
                "Use the files of one data set."
            )
    if pairs and (clash := np.flatnonzero((subject_of[pairs[0]] == subject_of[pairs[1]]) & ~pairs[2])).size:
        a, b = (int(ids[side[clash[0]]]) for side in pairs[:2])
        raise InputError(f"{label_file}: {a} {b} 0, but both are of one subject. Use the files of one data set.")
    return subject_of, count - len(owner)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with path.open(encoding=text_encoding(path)) as file:
            for number, line in enumerate(file, 1):
                if fields := line.split():
                    yield number, fields
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{path}: {reason}. {PUBLISHED}") from None


class LooseCrops:
    """Align files below ``root`` as they are read, into a BMP of the crop, so that its digest holds the points."""

    def __init__(self, root: Path, names: PackedNames, points: NDArray[np.float32]) -> None:
        self.root = root
        self._files = ImageFiles(root, names)
        self._points = points

    def __len__(self) -> int:
        return len(self._files)

    def name(self, row: int) -> str:
        """Return the file's name."""
        return self._files.name(row)

    def read(self, row: int) -> bytes:
        """Return the aligned crop as BMP. Raises BadImage for a file that cannot be decoded or points that are none."""
        where = self.root / self.name(row)
        try:
            crop = warp(decode_rgb(self._files.read(row)), self._points[row])
        except NoFace as error:
            raise BadImage(f"{where}: {error}") from None
        except BadImage as error:
            raise type(error)(str(error) if str(where) in str(error) else f"{where}: {error}") from None
        return cv2.imencode(".bmp", cv2.cvtColor(crop, cv2.COLOR_RGB2BGR))[1].tobytes()

    def stamps(self, rows: Ints) -> tuple[Keys, NDArray[np.bool_]]:
        """Return a key per crop, over the file's own key and its points."""
        keys, known = self._files.stamps(rows)
        mixed = [
            hashlib.sha256(key.tobytes() + self._points[row].tobytes()).digest()[:8]
            for key, row in zip(keys, rows.tolist(), strict=True)
        ]
        return np.array([int.from_bytes(part, "little") for part in mixed], np.uint64), known
