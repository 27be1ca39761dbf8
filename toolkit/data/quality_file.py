"""Keep beside aligned crops what was measured of the photographs that they came from: ``quality.csv``."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.text import text_encoding
from pkd.toolkit.images.quality import MEASURES, FaceQuality

QUALITY_FILE = "quality.csv"
COLUMNS = ("crop", *(one.name for one in MEASURES))


def quality_row(name: str, quality: FaceQuality) -> list[str]:
    """Write the measures of one crop as a row; empty where there is none."""
    values = [getattr(quality, column) for column in COLUMNS[1:]]
    return [name, *("" if value is None else f"{value:g}" for value in values)]


def write_quality(folder: Path, measured: Mapping[str, FaceQuality]) -> None:
    """Write the whole file, its header alone where nothing was measured. Atomic."""
    part = folder / f".{QUALITY_FILE}.part"
    with part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(quality_row(name, measured[name]) for name in sorted(measured))
    part.replace(folder / QUALITY_FILE)


def read_quality(folder: Path) -> dict[str, FaceQuality]:
    """Read the measures by crop, relative to ``folder``; empty where there is no such file.

    A crop that stands there twice was made again: its last row counts. The last row of all may be cut off, where the
    run that wrote it was killed. Raises InputError for a file with other columns or a value that is no number.
    """
    path = folder / QUALITY_FILE
    if not path.is_file():
        return {}
    with path.open(newline="", encoding=text_encoding(path), errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise InputError(f"{path}: its columns are not {', '.join(COLUMNS)}. Delete it and run pkd-align again.")
    found: dict[str, FaceQuality] = {}
    for number, row in enumerate(rows[1:], 2):
        try:
            values = {
                name: float(value) if value else None
                for name, value in zip(COLUMNS, row, strict=True)
                if name != "crop"
            }
            if not all(value is None or math.isfinite(value) for value in values.values()):
                raise ValueError
            if values["sharpness"] is None or values["exposure"] is None:
                raise ValueError
        except ValueError:
            if number == len(rows):
                continue
            raise InputError(f"{path}, line {number}: no row of measures. Delete it and run pkd-align again.") from None
        found[row[0]] = FaceQuality(**values)  # type: ignore[arg-type]
    return found
