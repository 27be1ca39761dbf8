"""Read a tree of people: one rule for every command about what below a folder is an image, and whose.

The person is the first folder below the root, however deep the image lies (a folder per video or session is no person).
Symbolic links are followed, each folder once on the way down. Hidden files and folders, and what macOS and Synology
add, are no data. An image that cannot be read for what it is, a broken link or a container within the tree is left out,
and said: nobody should find out from an error rate that half of the people were missing.
"""

from __future__ import annotations

import logging
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pkd.toolkit.images.codec import SUFFIXES

LOG = logging.getLogger("pkd")
"""Logger of warnings; without a handler, as in commands and notebooks, Python prints them as plain lines on stderr."""
OTHER_IMAGES = frozenset(
    {".arw", ".cr2", ".cr3", ".dng", ".gif", ".jfif", ".jp2", ".jpe", ".jxl", ".nef"}
    | {".pbm", ".pgm", ".ppm", ".raw", ".svg", ".tif", ".tiff"}
)
"""Suffixes of images that pkd does not read."""
CONTAINERS = frozenset({".rec", ".tar", ".zip", ".tgz", ".gz"})
NOT_DATA = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})


class LeftOut(NamedTuple):
    """Name one file or folder that was not read, and why."""

    name: str
    """Path below the root, with forward slashes."""
    reason: str


LeaveOut = Callable[[LeftOut], None]


def person_of(name: str) -> str:
    """Return the first folder of a path with forward slashes; empty where the image lies in none."""
    first, slash, _ = name.removeprefix("./").partition("/")
    return first if slash else ""


def is_hidden(name: str) -> bool:
    """Tell whether one part of a path is no data: hidden, or what an operating system adds."""
    return name.startswith(".") or name in NOT_DATA


def walk_images(root: Path, leave_out: LeaveOut, *, every_file: bool = False) -> Iterator[str]:
    """Yield the images below ``root`` by path, with forward slashes, in the order of the paths' parts.

    ``leave_out`` is told of each image that is not read; with ``every_file`` of every other file, too. Raises OSError
    for a folder that cannot be read.
    """
    yield from _walk(root, "", leave_out, every_file, (os.path.realpath(root),))


def _walk(root: Path, below: str, leave_out: LeaveOut, every_file: bool, above: tuple[str, ...]) -> Iterator[str]:
    with os.scandir(root / below) as entries:
        here = sorted(entries, key=lambda entry: entry.name)
    for entry in here:
        name = f"{below}/{entry.name}" if below else entry.name
        suffix = posixpath.splitext(entry.name)[1].lower()
        if is_hidden(entry.name):
            # ._1.png holds what macOS knows of 1.png
            if (suffix in SUFFIXES and not entry.name.startswith("._")) or (
                entry.name not in NOT_DATA and _is_folder(entry)
            ):
                leave_out(LeftOut(name, "hidden"))
        elif _is_folder(entry):
            real = os.path.realpath(entry.path)
            if entry.is_symlink() and any(each == real or each.startswith(real + os.sep) for each in above):
                leave_out(LeftOut(name, "a link to a folder that holds it"))
            elif entry.is_symlink() and real.startswith(above[0] + os.sep):
                leave_out(LeftOut(name, "a link to a folder that is read by its own name"))
            else:
                yield from _walk(root, name, leave_out, every_file, (*above, real))
        elif not _is_file(entry):
            leave_out(LeftOut(name, "a broken link" if entry.is_symlink() else "no plain file"))
        elif suffix in SUFFIXES:
            yield name
        elif every_file or suffix in OTHER_IMAGES:
            leave_out(LeftOut(name, f"not one of {', '.join(sorted(SUFFIXES))}; convert it first"))
        elif suffix in CONTAINERS:
            leave_out(LeftOut(name, "a container within a tree of images; give it by itself"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def report_left_out(source: Path, left_out: Sequence[LeftOut]) -> None:
    """Log one line about what was not read: how many, and of each reason the number and the first."""
    if not left_out:
        return
    first: dict[str, str] = {}
    for each in left_out:
        first.setdefault(each.reason, each.name)
    counts = Counter(each.reason for each in left_out)
    reasons = "; ".join(f"{count:,} {reason} (first: {printable(first[reason])})" for reason, count in counts.items())
    LOG.warning("%s: %s not read: %s", source, f"{len(left_out):,}", reasons)


def printable(name: str) -> str:
    """Return a file name as text that can be written anywhere: bytes that are not UTF-8 are written out in hex."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
