"""Make subject ids of what people's folders are called, and keep which is whose in a table on this machine.

An id stands in addresses, logs of proxies and URLs: letters, digits and ``._@+-``, at most 128. Folders are called
``Zoë Müller`` or ``王伟``. The server is not told that name: galleries hold none.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pkd.serving.core.schemas import Name
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.text import text_encoding
from pkd.toolkit.data.tree import printable

COLUMNS = ["subject", "name"]
READABLE = 60
"""Most characters of a name that are kept in an id, before the digest."""
_NAME = TypeAdapter[str](Name)


def subject_id(folder: str) -> str:
    """Return the id of the person whose folder is called ``folder``: that name, where it can be an id.

    Any other becomes what of it is ASCII, and eight hex digits of the name's SHA-256, so that two names never share an
    id by losing their accents: ``Zoë Müller`` → ``Zoe-Muller-d6e575a6``. The same name in composed and decomposed
    characters, as Linux and macOS write it, has one id.
    """
    try:
        return _NAME.validate_python(folder)
    except ValidationError:
        name = unicodedata.normalize("NFC", printable(folder))
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    readable = re.sub(r"[^A-Za-z0-9]+", "-", plain)[:READABLE].strip("-") or "subject"
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def keep_names(path: Path, names: Mapping[str, str]) -> None:
    """Add ids and the names that they were made of to a table, readable by its owner alone. Replaced as a whole.

    Raises InputError for a file that is another table.
    """
    known: dict[str, str] = {}
    if path.is_file():
        try:
            with path.open(newline="", encoding=text_encoding(path)) as file:
                rows = list(csv.reader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"--names {path}: cannot be read ({error}). Choose another file.") from None
        if rows and rows[0] != COLUMNS:
            raise InputError(f"--names {path}: its columns are not {', '.join(COLUMNS)}. Choose another file.")
        known = {row[0]: row[1] for row in rows[1:] if len(row) == len(COLUMNS)}
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        with os.fdopen(
            os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", newline="", encoding="utf-8"
        ) as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(sorted({**known, **names}.items()))
        part.replace(path)
    except OSError as error:
        raise InputError(f"--names {path}: {error.strerror}. Choose a place you can write to.") from None
