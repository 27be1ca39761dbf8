"""Align (pkd-align) folders of photographs → the same folders of aligned 112×112 crops."""

from __future__ import annotations

import csv
import os
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
from pkd.toolkit.encoders.detector import Detector, choose, open_detector
from pkd.toolkit.images.alignment import SIZE, warp
from pkd.toolkit.images.codec import SUFFIXES, read_rgb, write_rgb

EXAMPLES = """
  pkd-align photos faces --detector yunet.onnx
  pkd-align photos faces --detector insightface:buffalo_l --min-score 0.6
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
    jobs: int = Field(os.cpu_count() or 1, ge=1)
    """Threads; one per core by default."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pkd-align``; returns the exit code."""
    return run_command(
        "pkd-align",
        "Find the face in every photograph below SRC and write it to DST as an aligned 112×112 WebP crop, in the same "
        "folder per identity. Where a photograph shows several faces the large, central one is taken. What could not "
        "be used is listed with the reason in DST/skipped.csv. Run again to continue: finished crops stay.",
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
    _claim(dst, Settings(detector=detector.digest, min_score=options.min_score))
    todo = [photo for photo in photos if not _finished(src / photo.source, dst / photo.target)]

    def one(photo: Photo) -> tuple[str, str] | None:
        return _align_one(src / photo.source, dst / photo.target, photo.source, detector)

    cv2.setNumThreads(1)  # one thread per photograph is faster than many threads on one
    done = 0
    try:
        with ConsoleProgress(console)("aligning", len(todo)) as advance:
            for outcome in in_order(one, todo, workers=options.jobs):
                done += outcome is None
                skipped += [outcome] if outcome else []
                advance(1)
    finally:
        _write_skipped(dst / "skipped.csv", skipped)
    before = len(photos) - len(todo)
    if not done and not before:
        raise InputError(
            f"{src}: none of {len(skipped):,} files gave a crop (first: {skipped[0][0]}: "
            f"{skipped[0][1]}). All reasons are in {dst / 'skipped.csv'}."
        )
    return _report(console, dst, done, before, skipped)


def _align_one(source: Path, target: Path, name: str, detector: Detector) -> tuple[str, str] | None:
    """Write the crop; None when done, else (file, reason)."""
    try:
        image = read_rgb(source)
        crop = warp(image, choose(detector.detect(image), image).landmarks)
    except PkdError as error:
        return name, str(error).removeprefix(f"{source}: ")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_rgb(target, crop)
    return None


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
    names = sorted(
        path.relative_to(src).as_posix()
        for path in src.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(src).parts) and not path.is_dir()
    )
    images = [name for name in names if Path(name).suffix.lower() in SUFFIXES]
    if not images:
        raise InputError(f"{src}: holds no photograph ({', '.join(sorted(SUFFIXES))}), {len(names):,} other files.")
    alike = Counter(Path(name).with_suffix("").as_posix() for name in images)
    photos = []
    for name in images:
        stem = Path(name).with_suffix("").as_posix()
        photos.append(Photo(name, (stem if alike[stem] == 1 else name) + ".webp"))  # a.jpg beside a.png keeps both
    reason = f"not one of {', '.join(sorted(SUFFIXES))}; convert it first"
    return photos, [(name, reason) for name in names if Path(name).suffix.lower() not in SUFFIXES]


def _claim(dst: Path, settings: Settings) -> None:
    """Make DST, or check that its crops were made in the same way."""
    stamp = dst / "align.json"
    if stamp.is_file():
        if stamp.read_text(encoding="utf-8").strip() != settings.model_dump_json():
            raise InputError(
                f"{dst}: its crops were made with another detector or --min-score. Choose another DST, or delete it."
            )
    elif dst.is_dir() and any(dst.iterdir()):
        raise InputError(f"{dst}: is not empty and was not made by pkd-align. Choose another DST.")
    else:
        dst.mkdir(parents=True, exist_ok=True)
        part = stamp.with_name(stamp.name + ".part")
        part.write_text(settings.model_dump_json() + "\n", encoding="utf-8")
        part.replace(stamp)


def _finished(source: Path, target: Path) -> bool:
    """Tell whether the crop is there and the photograph was not replaced since."""
    try:
        return target.stat().st_mtime >= source.stat().st_mtime
    except OSError:
        return False


def _write_skipped(path: Path, skipped: list[tuple[str, str]]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "reason"])
        writer.writerows(sorted(skipped))
    part.replace(path)


def _report(console: Console, dst: Path, done: int, before: int, skipped: list[tuple[str, str]]) -> Result:
    kept = f", {before:,} were there already" if before else ""
    console.print(
        f"{done:,} crops written to {dst}{kept}; {len(skipped):,} files skipped.", markup=False, soft_wrap=True
    )
    if skipped:
        console.print(
            f"Reasons in {dst / 'skipped.csv'}; first: {skipped[0][0]}: {skipped[0][1]}", markup=False, soft_wrap=True
        )
    return {
        "out": str(dst),
        "written": done,
        "already_there": before,
        "skipped": len(skipped),
        "skipped_list": str(dst / "skipped.csv"),
    }
