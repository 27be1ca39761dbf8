"""Define Record, the base of everything that is written to JSON and read back."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pkd.toolkit.core.errors import BundleError


class Record(BaseModel):
    """Hold fields that never change; refuse unknown ones and NaN; give a digest of the content alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def digest(self) -> str:
        """Return the SHA-256 (64 hex digits) of the record's canonical JSON."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


MOST = 2**63
"""Integers lie below this: larger ones are no number to most programs that read JSON, nor can they be written again."""


def read_json(data: bytes | str, where: str | Path) -> Any:
    """Parse JSON and refuse an object with two equal keys, for readers differ in which of them they take.

    ``where`` is what errors name. Raises BundleError for equal keys and for integers of more than 64 bits; ValueError
    or RecursionError for what is no JSON.
    """
    return json.loads(data, object_pairs_hook=partial(_checked, where))


def fault_of(error: ValidationError) -> str:
    """Say in a few words what is wrong first: ``points.0.fmr: must be less than or equal to 1``."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    said = {"extra_forbidden": "is no field that this pkd knows", "missing": "is missing"}.get(
        first["type"], first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    )
    return f"{field}: {said}" if field else said


def _checked(where: str | Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise BundleError(
            f"{where}: has {name[:100]!r} twice in one object, and programs differ in which they take. Give it once."
        )
    for name, value in pairs:
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int) and not -MOST <= one < MOST:
                raise BundleError(f"{where}: {name[:100]}: a number of more than 64 bits. Do not trust it.")
    return found
