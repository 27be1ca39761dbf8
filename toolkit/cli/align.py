"""Align (pkd-align) folders of photographs → the same folders of aligned crops, 112×112 unless stated."""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import posixpath
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
from pydantic import Field
from rich.console import Console

from pkd.toolkit.core.cli_options import Argument, Options, run_command
from pkd.toolkit.core.cli_support import Result
from pkd.toolkit.core.errors import InputError, PkdError
from pkd.toolkit.core.models import Record
from pkd.toolkit.core.parallel import in_order
from pkd.toolkit.core.progress import ConsoleProgress
from pkd.toolkit.data.quality_file import QUALITY_FILE, quality_row, read_quality, write_quality
from pkd.toolkit.data.tree import LeftOut, printable, walk_images
from pkd.toolkit.encoders.detector import Detector, choose, open_detector
from pkd.toolkit.images.alignment import SIZE, warp
from pkd.toolkit.images.codec import SUFFIXES, read_rgb, write_rgb
from pkd.toolkit.images.quality import FaceQuality, measure_face

EXAMPLES = """
  pkd-align photos faces --detector yunet.onnx
  pkd-align photos faces --detector insightface:buffalo_l --min-score 0.6
  pkd-align photos faces160 --detector yunet.onnx --size 160         (for an encoder of larger crops)
"""


class Settings(Record):
    """Record in ``align.json`` beside the crops what made them, so that a later run does not mix two ways."""

    detector: str
    """SHA-256 (hex) of the detector's weights."""
    min_score: float
    size: int = SIZE


@dataclass(frozen=True)
class Photo:
    """Pair one file below SRC with the crop it becomes; names are relative, with forward slashes."""

    source: str
    target: str


class AlignOptions(Options):
    """Hold what pkd-align was asked for."""

    src: Annotated[Path, Argument("SRC", positional=True)]
    """Folder with one folder of photographs per person."""
    dst: Annotated[Path, Argument("DST", positional=True)]
    """Folder for the crops; made if it does not exist."""
    detector: Annotated[str, Argument("SPEC")]
    """A YuNet .onnx file, or insightface:PACK, or insightface:FOLDER."""
    min_score: float = 0.5
    """Detector confidence, 0 to 1, below which a face is ignored."""
    size: int = Field(SIZE, ge=32, le=1024)
    """Height and width of the crops, pixels: what the encoder takes, for most 112."""
    jobs: int = Field(os.cpu_count() or 1, ge=1)
    """Threads; one per core by default."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pkd-align``; returns the exit code."""
    return run_command(
        "pkd-align",
        "Find the face in every photograph below SRC and write it to DST as an aligned WebP crop, of 112×112 pixels or "
        "--size, in the same folder per identity. Where a photograph shows several faces the large, central one is "
        "taken. What could not be used is listed with the reason in DST/skipped.csv, and each face's measures in "
        "DST/quality.csv. Run again to continue: finished crops stay.",
        EXAMPLES,
        AlignOptions,
        align,
        argv,
    )


def align(options: AlignOptions, console: Console) -> Result:
    """Align every photograph below ``options.src``; returns the counts that the command prints."""
    src, dst = options.src, options.dst
    _check_folders(src, dst)
    detector = open_detector(options.detector, options.min_score)
    photos, skipped = _list(src)
    _claim(dst, Settings(detector=detector.digest, min_score=options.min_score, size=options.size))
    record = CropRecord(src, dst)
    gone = record.remove_gone(photos)
    todo = [photo for photo in photos if not record.is_finished(photo)]
    record.rewrite()

    def one(photo: Photo) -> tuple[Photo, str | None]:
        made = _align_one(src / photo.source, dst / photo.target, detector, options.size)
        if isinstance(made, str):
            return photo, made
        record.note(photo, made)
        return photo, None

    cv2.setNumThreads(1)  # one thread per photograph is faster than many threads on one
    done = 0
    try:
        with ConsoleProgress(console)("aligning", len(todo)) as advance:
            for photo, reason in in_order(one, todo, workers=options.jobs):
                done += reason is None
                skipped += [] if reason is None else [(photo.source, reason)]
                advance(1)
    finally:
        _write_skipped(dst / "skipped.csv", skipped)
    before = len(photos) - len(todo)
    if not done and not before:
        raise InputError(
            f"{src}: none of {len(skipped):,} files gave a crop (first: {printable(skipped[0][0])}: "
            f"{skipped[0][1]}). All reasons are in {dst / 'skipped.csv'}."
        )
    return _report(console, dst, done, before, gone, skipped)


def _align_one(source: Path, target: Path, detector: Detector, size: int) -> FaceQuality | str:
    """Write the crop → its measures, or the reason why there is none; an older crop does not stay then."""
    try:
        image = read_rgb(source)
        face = choose(detector.detect(image), image)
        crop = warp(image, face.landmarks, size)
    except PkdError as error:
        with contextlib.suppress(OSError):
            target.unlink(missing_ok=True)
        return str(error).removeprefix(f"{source}: ")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_rgb(target, crop)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # a full disk ends the run
            raise
        return f"its crop would be called {target.name[:20]}…, a name longer than this disk takes; shorten it"
    return measure_face(crop, face.landmarks, face.occlusion)


def _check_folders(src: Path, dst: Path) -> None:
    if not src.is_dir():
        raise InputError(f"{src}: no such folder. Give the folder that holds the photographs.")
    inside, outside = dst.resolve(), src.resolve()
    if inside == outside or inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise InputError(f"{dst}: SRC and DST must not hold one another. Choose a DST beside {src}.")
    if dst.exists() and not dst.is_dir():
        raise InputError(f"{dst}: is a file. Choose another folder for the crops.")


def _list(src: Path) -> tuple[list[Photo], list[tuple[str, str]]]:
    """List the photographs below ``src``, and the files that are none with the reason. Hidden files are ignored."""
    left_out: list[LeftOut] = []
    images = list(walk_images(src, left_out.append, every_file=True))
    skipped = [(name, reason) for name, reason in left_out]
    if not images:
        raise InputError(f"{src}: holds no photograph ({', '.join(sorted(SUFFIXES))}), {len(skipped):,} other files.")
    alike = Counter(posixpath.splitext(name)[0] for name in images)
    photos = []
    for name in images:
        stem = posixpath.splitext(name)[0]
        photos.append(Photo(name, (stem if alike[stem] == 1 else name) + ".webp"))  # a.jpg beside a.png keeps both
    return photos, skipped


def _claim(dst: Path, settings: Settings) -> None:
    """Make DST, or check that its crops were made in the same way."""
    stamp = dst / "align.json"
    if stamp.is_file():
        if stamp.read_text(encoding="utf-8").strip() != settings.model_dump_json():
            raise InputError(
                f"{dst}: its crops were made with another detector, --min-score or --size. Choose another DST, or "
                "delete it."
            )
    elif dst.is_dir() and any(dst.iterdir()):
        raise InputError(f"{dst}: is not empty and was not made by pkd-align. Choose another DST.")
    else:
        dst.mkdir(parents=True, exist_ok=True)
        part = stamp.with_name(stamp.name + ".part")
        part.write_text(settings.model_dump_json() + "\n", encoding="utf-8")
        part.replace(stamp)


class CropRecord:
    """Remember in DST/crops.csv what each crop was made of: the photograph, its size and its times.

    Dates alone would not do: what takes a photograph's place may be older than it (cp -p, rsync, unzip). A line is
    appended for each crop, so that whatever kills a run, the next one knows what is done.
    """

    def __init__(self, src: Path, dst: Path) -> None:
        self._src, self._dst, self._path, self._quality = src, dst, dst / "crops.csv", dst / QUALITY_FILE
        self._lock = threading.Lock()
        self._made: dict[str, tuple[str, str]] = {}
        if self._path.is_file():
            with self._path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                self._made = {row[0]: (row[1], row[2]) for row in csv.reader(file) if len(row) == 3}
        self._measured = read_quality(dst)

    def is_finished(self, photo: Photo) -> bool:
        """Tell whether the crop is there and was made of this very photograph."""
        return self._made.get(photo.target) == self._facts(photo) and (self._dst / photo.target).is_file()

    def remove_gone(self, photos: Sequence[Photo]) -> list[str]:
        """Delete the crops whose photographs are no longer there, and folders that this empties → their names."""
        gone = sorted(self._made.keys() - {photo.target for photo in photos})
        for name in gone:
            del self._made[name]
            crop = self._dst / name
            crop.unlink(missing_ok=True)
            for folder in crop.relative_to(self._dst).parents[:-1]:
                with contextlib.suppress(OSError):  # not empty
                    (self._dst / folder).rmdir()
        return gone

    def rewrite(self) -> None:
        """Write the file anew, without crops that are gone or made again."""
        part = self._path.with_name(".crops.csv.part")
        with part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows([target, *facts] for target, facts in sorted(self._made.items()))
        part.replace(self._path)
        write_quality(self._dst, {name: found for name, found in self._measured.items() if name in self._made})

    def note(self, photo: Photo, quality: FaceQuality) -> None:
        """Append a finished crop and its measures; several threads may."""
        rows = {self._quality: quality_row(photo.target, quality), self._path: [photo.target, *self._facts(photo)]}
        with self._lock:
            for path, row in rows.items():
                with path.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:
                    csv.writer(file).writerow(row)

    def _facts(self, photo: Photo) -> tuple[str, str]:
        try:
            found = (self._src / photo.source).stat()
        except OSError:
            return photo.source, ""
        return photo.source, f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _write_skipped(path: Path, skipped: list[tuple[str, str]]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "reason"])
        writer.writerows(sorted(skipped))
    part.replace(path)


def _report(
    console: Console, dst: Path, done: int, before: int, gone: list[str], skipped: list[tuple[str, str]]
) -> Result:
    kept = f", {before:,} were there already" if before else ""
    console.print(
        f"{done:,} crops written to {dst}{kept}; {len(skipped):,} files skipped.", markup=False, soft_wrap=True
    )
    if gone:
        console.print(
            f"{len(gone):,} crops removed, their photographs are gone (first: {printable(gone[0])}).",
            markup=False,
            soft_wrap=True,
        )
    if skipped:
        first = f"{printable(skipped[0][0])}: {skipped[0][1]}"
        console.print(f"Reasons in {dst / 'skipped.csv'}; first: {first}", markup=False, soft_wrap=True)
    return {
        "out": str(dst),
        "written": done,
        "already_there": before,
        "removed": len(gone),
        "skipped": len(skipped),
        "skipped_list": str(dst / "skipped.csv"),
    }
