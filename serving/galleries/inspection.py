"""Inspection: what was looked at in a store of galleries, and what was found wrong there."""

from __future__ import annotations

from dataclasses import dataclass, field

from pkd.serving.galleries.audit import Head


@dataclass
class Inspection:
    """What was looked at, and what was found wrong: one line each."""

    head: Head
    """Of the audit log."""
    galleries: int = 0
    subjects: int = 0
    templates: int = 0
    wrong: list[str] = field(default_factory=list)
