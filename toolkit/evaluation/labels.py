"""Labels: what is stated about the identities of a set, for rates per group. A CSV file with a header.

The first column is ``identity``, as the folders of the set are named; every other column is an attribute (``sex``,
``age_band``). An empty field means that the value is not known.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pkd.toolkit.errors import InputError

KEY = "identity"
MAX_GROUPS = 200
"""Most values of one attribute; more are measurements, not groups."""
_FORM = f"Give lines of {KEY},<attribute>[,<attribute>…] under a header that says so."


@dataclass(frozen=True)
class Labels:
    """One value per identity and attribute; None where it is not known."""

    name: str
    """File name."""
    sha256: str
    """Of the file, hex."""
    attributes: tuple[str, ...]
    values: dict[str, tuple[str | None, ...]]
    """Identity → a value per attribute."""

    def of(self, attribute: str, identities: Sequence[str]) -> list[str | None]:
        """The value of each of ``identities``, None where none is stated."""
        column = self.attributes.index(attribute)
        unknown = (None,) * len(self.attributes)
        return [self.values.get(identity, unknown)[column] for identity in identities]

    def check(self, identities: Sequence[str]) -> None:
        """Raise InputError where the file is about others than ``identities``, or about none of them."""
        strangers = sorted(set(self.values) - set(identities))
        if strangers:
            raise InputError(
                f"{self.name}: {len(strangers):,} of its {len(self.values):,} identities are not in the set (first: "
                f"{strangers[0]!r}). Name the identities as the set's folders are named, and leave others out."
            )
        for attribute in self.attributes:
            groups = {value for value in self.of(attribute, identities) if value is not None}
            if not groups:
                raise InputError(f"{self.name}: {attribute} has no value for any identity. Leave the column out.")
            if len(groups) > MAX_GROUPS:
                raise InputError(
                    f"{self.name}: {attribute} has {len(groups):,} different values, more than {MAX_GROUPS}. "
                    "Give bands, such as 20-29."
                )


def read_labels(path: Path) -> Labels:
    """Read a CSV file of labels. Raises InputError naming the line."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")  # spreadsheets put a byte order mark in front
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. {_FORM}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text. Save it as CSV in UTF-8.") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, [field.strip() for field in row]) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not CSV: {error}. {_FORM}") from None
    if not rows:
        raise InputError(f"{path}: holds no line. {_FORM}")
    header = rows[0][1]
    attributes = tuple(header[1:])
    if header[0] != KEY or not attributes or not all(attributes):
        raise InputError(f"{path}: its first line is {','.join(header)[:80]!r}, not a header. {_FORM}")
    if len(set(header)) < len(header):
        raise InputError(f"{path}: its header names a column twice: {','.join(header)[:80]}. Name every column once.")
    if len(rows) == 1:
        raise InputError(f"{path}: holds a header and no identity. {_FORM}")
    values: dict[str, tuple[str | None, ...]] = {}
    for line, row in rows[1:]:
        if len(row) != len(header) or not row[0]:
            what = f"has {len(row)} fields, the header {len(header)}" if row[0] else "names no identity"
            raise InputError(f"{path}:{line}: {what}. {_FORM}")
        if row[0] in values:
            raise InputError(f"{path}:{line}: {row[0]!r} occurs a second time. Give every identity one line.")
        values[row[0]] = tuple(field or None for field in row[1:])
    return Labels(path.name, hashlib.sha256(data).hexdigest(), attributes, values)
