"""Hold what a gallery remembers of mapped templates: their encoders, and which of them no search sees yet."""

from __future__ import annotations

from pydantic import Field

from pkd.toolkit.core.models import Record


class MapOrigin(Record):
    """Say where the templates of a mapped encoder come from."""

    old: str
    """Encoder that made them."""
    new: str
    """Teacher whose space they were mapped into; its own templates replace them."""


class MappingState(Record):
    """Hold what a gallery remembers of its mapped templates."""

    maps: dict[str, MapOrigin] = Field(default_factory=dict)
    """Mapped encoder → its origin."""
    staged: tuple[str, ...] = ()
    """Mapped encoders whose templates are not all there yet: no search sees them."""


NOTHING_MAPPED = MappingState()
