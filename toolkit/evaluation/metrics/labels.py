"""Read labels of identities, for rates per group, from a CSV file with a header.

The first column is ``identity``: a name as in the set, or its last part (the folder's own name). Every other column is
an attribute (``sex``, ``age_band``). An empty field means that the value is not known.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.text import decode_text

KEY = "identity"
MAX_GROUPS = 200
"""Most values of one attribute; more are measurements, not groups."""
_FORM = f"Give lines of {KEY},<attribute>[,<attribute>…] under a header that says so."


@dataclass(frozen=True)
class Labels:
    """Hold one value per identity and attribute; None where it is not known."""

    name: str
    """File name."""
    sha256: str
    """SHA-256 over the file's bytes, hex."""
    attributes: tuple[str, ...]
    values: dict[str, tuple[str | None, ...]]
    """Identity → a value per attribute."""

    def of(self, attribute: str, identities: Sequence[str]) -> list[str | None]:
        """Return the value of each of ``identities``, None where none is stated."""
        column = self.attributes.index(attribute)
        unknown = (None,) * len(self.attributes)
        return [self.values.get(identity, unknown)[column] for identity in identities]

    def matched(self, identities: Sequence[str]) -> Labels:
        """Rename the labels to the names of ``identities``: a full one, or its last part where one alone has that.

        Raises InputError where the file is about others, about one of them twice, or has no use as groups.
        """
        parts = Counter(identity.rpartition("/")[2] for identity in identities)
        full = {identity.rpartition("/")[2]: identity for identity in identities}
        names = {identity: identity for identity in identities}
        names = {part: full[part] for part, many in parts.items() if many == 1} | names
        unknown = sorted(set(self.values) - set(names))
        if unknown:
            raise InputError(
                f"{self.name}: {len(unknown):,} of its {len(self.values):,} identities are not in the set, or "
                f"several are called so (first: {unknown[0]!r}). Use names like {min(identities)!r}; drop others."
            )
        values = {names[name]: row for name, row in self.values.items()}
        if len(values) < len(self.values):
            twice = Counter(names[name] for name in self.values).most_common(1)[0][0]
            raise InputError(
                f"{self.name}: {twice!r} occurs twice, once by its last part. Give every identity one line."
            )
        matched = replace(self, values=values)
        for attribute in self.attributes:
            matched._check(attribute, identities)
        return matched

    def _check(self, attribute: str, identities: Sequence[str]) -> None:
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
        text = decode_text(data)
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
