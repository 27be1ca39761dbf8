"""Read label maps, which say whose class each row of a head is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pkd.toolkit.core.errors import BadHead
from pkd.toolkit.core.text import read_text

NUMBERS = ("08d", "d")
"""Formats of class numbers: as the readers of packed images name them, and plain."""


def read_label_map(path: str | Path) -> tuple[str, ...]:
    """Read identities in order of the class rows: one a line, a JSON list, or a JSON object identity → row.

    Raises BadHead for any other file, an identity on two rows, and a row without one.
    """
    path = Path(path)
    try:
        text = read_text(path)
    except OSError as error:
        raise BadHead(f"{path}: {error.strerror}. --head-labels takes a text file with one identity a line.") from None
    except UnicodeDecodeError:
        raise BadHead(f"{path}: not a text file. --head-labels takes one identity a line, or JSON.") from None
    names = _from_json(path, text) if text.lstrip()[:1] in {"[", "{"} else _from_lines(path, text)
    if not names:
        raise BadHead(f"{path}: names no identity. It needs one a line, in order of the head's rows.")
    if duplicate := next((name for name, count in Counter(names).items() if count > 1), None):
        first, second = [i for i, name in enumerate(names) if name == duplicate][:2]
        raise BadHead(
            f"{path}: {duplicate} stands at row {first} and row {second}. A class has one row: correct the map."
        )
    return names


def class_names(
    given: tuple[str, ...] | None, identities: Sequence[str], classes: int, source: str, labels: str | None
) -> tuple[str, ...]:
    """Name a head's rows: ``given`` if there is a map, else numbers if the identities are, else the identities' order.

    Identities that are class numbers come from RecordIO and tar shards, where the label is the row. Raises BadHead
    for a map of another length, and for identities of the images that have no row.
    """
    number = next((form for form in NUMBERS if identities and all(_is_number(i, form) for i in identities)), None)
    if given is not None:
        if len(given) != classes:
            raise BadHead(
                f"{labels or source}: names {len(given):,} identities, {source} has {classes:,} class rows. Give the "
                "map and all shards of the same training."
            )
        names = given
    elif number:
        names = tuple(format(row, number) for row in range(classes))
    elif len(identities) == classes:
        names = tuple(identities)
    else:
        raise BadHead(
            f"{source}: {classes:,} centres, but the images show {len(identities):,} identities. "
            f"{_whole(classes, len(identities))}"
        )
    if missing := sorted(set(identities) - set(names)):
        raise BadHead(
            f"{source}: has no centre for {len(missing):,} of {len(identities):,} identities (first: {missing[0]}). "
            f"{_whole(classes, len(identities))}"
        )
    return names


def _is_number(identity: str, form: str) -> bool:
    return identity.isascii() and identity.isdecimal() and format(int(identity), form) == identity


def _whole(classes: int, identities: int) -> str:
    if classes < identities:
        return "Name all shards of the head, remove those images, or pass --head means."
    return "Say which row is whose with --head-labels FILE, or pass --head means."


def _from_lines(path: Path, text: str) -> tuple[str, ...]:
    lines = [line.strip() for line in text.splitlines()]
    if "" in lines:
        raise BadHead(f"{path}: line {lines.index('') + 1} is empty. Every class row needs its identity.")
    return tuple(lines)


def _from_json(path: Path, text: str) -> tuple[str, ...]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise BadHead(f"{path}: not JSON: {error}. Give one identity a line, a list, or an object.") from None
    if isinstance(content, list) and all(isinstance(name, str | int) for name in content):
        return tuple(map(str, content))
    if isinstance(content, dict) and all(type(row) is int for row in content.values()):
        rows = {row: name for name, row in content.items()}
        if len(rows) < len(content):
            duplicate = next(row for row, count in Counter(content.values()).items() if count > 1)
            raise BadHead(f"{path}: row {duplicate} stands for more than one identity. Correct the map.")
        if gap := next((str(row) for row in range(len(rows)) if row not in rows), ""):
            raise BadHead(f"{path}: row {gap} has no identity. Rows count from 0 without gaps: complete the map.")
        return tuple(rows[row] for row in range(len(rows)))
    raise BadHead(f"{path}: neither a list of identities nor an object identity → row. Give one of them.")
