"""Record: the base of everything that is written to JSON and read back."""

from __future__ import annotations

import hashlib

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Immutable, refuses unknown fields and NaN, and has a digest that depends on its content alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def digest(self) -> str:
        """SHA-256 (64 hex digits) of the record's canonical JSON."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
