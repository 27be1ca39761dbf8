"""Define Record, the base of everything that is written to JSON and read back."""

from __future__ import annotations

import hashlib

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Hold fields that never change; refuse unknown ones and NaN; give a digest of the content alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def digest(self) -> str:
        """Return the SHA-256 (64 hex digits) of the record's canonical JSON."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
