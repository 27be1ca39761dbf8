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


def read_json(data: bytes, where: str | Path) -> Any:
    """Parse JSON and refuse an object with two equal keys, for readers differ in which of them they take.

    ``where`` is what errors name. Raises BundleError for equal keys; ValueError or RecursionError for what is no JSON.
    """
    return json.loads(data, object_pairs_hook=partial(_once, where))


def fault_of(error: ValidationError) -> str:
    """Say in a few words what is wrong first: ``points.0.fmr: must be less than or equal to 1``."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    said = {"extra_forbidden": "is no field that this pkd knows", "missing": "is missing"}.get(
        first["type"], first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    )
    return f"{field}: {said}" if field else said


def _once(where: str | Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise BundleError(f"{where}: has {name[:100]!r} twice in one object. Do not trust it.")
    return found
