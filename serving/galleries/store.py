"""A store of galleries: what it keeps, and what it promises.

A gallery holds templates of one space, each stamped with the encoder that made it. A template is searched only beside
others of its own encoder: thresholds belong to an ordered pair of encoders, so the scores of two encoders have no
common scale. That is why ``search`` is asked for one encoder at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pkd.serving.core.gallery_schemas import MoveAnswer, ReceiptAnswer
from pkd.serving.galleries.audit import Action, Head, Record
from pkd.serving.galleries.crypto import MasterKey
from pkd.toolkit.core import models
from pkd.toolkit.core.errors import PkdError
from pkd.toolkit.core.progress import Progress, no_progress


class MapOrigin(models.Record):
    """Say where the templates of a mapped encoder come from."""

    old: str
    """Encoder that made them."""
    new: str
    """Teacher whose space they were mapped into; its own templates replace them."""


class MappingState(models.Record):
    """Hold what a gallery remembers of its mapped templates."""

    maps: dict[str, MapOrigin] = Field(default_factory=dict)
    """Mapped encoder → its origin."""
    staged: tuple[str, ...] = ()
    """Mapped encoders whose templates are not all there yet: no search sees them."""


NOTHING_MAPPED = MappingState()


Vectors = NDArray[np.float32]
"""Unit rows N×D."""
Attributes = Mapping[str, str]
"""Properties that an operator may filter on: a site, a role. No names: attributes are stored as they are."""


@dataclass(frozen=True)
class Space:
    """Name the part of an EmbeddingSpace that a store needs."""

    id: str
    dim: int

    @property
    def metric(self) -> str:
        """Return the only one there is."""
        return "cosine"


@dataclass(frozen=True)
class Consent:
    """State on what ground a subject is enrolled. It is recorded and given back, not judged."""

    basis: str
    """Legal basis, for example ``consent`` or ``contract``."""
    reference: str = ""
    """Place where the paper lies."""
    given: str = ""
    """ISO 8601."""


@dataclass(frozen=True)
class Gallery:
    """Describe one gallery as it is now."""

    name: str
    space: Space
    moving_to: Space | None
    """The second space while a migration is under way: both answer."""
    created: float
    """Seconds since 1970, as every time here."""
    retention: float | None
    """Seconds after which a template that states nothing else is deleted; None: kept."""
    subjects: int
    templates: Mapping[str, int]
    """Encoder id → how many templates it made."""
    moved: int = 0
    """Subjects that have a template in ``moving_to``."""
    mapping: MappingState = NOTHING_MAPPED

    @property
    def spaces(self) -> tuple[Space, ...]:
        """List the spaces whose vectors it takes."""
        return (self.space, self.moving_to) if self.moving_to else (self.space,)


@dataclass(frozen=True)
class NewTemplate:
    """Hold what is to be enrolled. Stores keep its direction in float16, and search it at unit length."""

    encoder: str
    space: str
    vector: NDArray[np.float32]
    """Unit, D."""


@dataclass(frozen=True)
class Enrolment:
    """Ask for templates of one subject, all or none of them."""

    subject: str
    templates: Sequence[NewTemplate]
    attributes: Attributes = field(default_factory=dict)
    """Replaces those of a subject that is there already, unless empty."""
    consent: Consent | None = None
    expires: float | None = None
    """When these templates are deleted; None: as the gallery's retention says."""
    key: str | None = None
    """Idempotency key: the same key with the same ``digest`` is answered as before and enrols nothing."""
    digest: str = ""
    """SHA-256 (hex) of what was asked; another one under the same key is a conflict."""
    created: float | None = None
    """When the templates were made; None: now. Mapped and moved templates keep their date."""
    action: Action = "enrol"
    """Name of the change in the audit log."""


@dataclass(frozen=True)
class Enrolled:
    """Acknowledge an enrolment that is durable: a process that dies after this was returned has not lost it."""

    subject: str
    templates: tuple[str, ...]
    """Ids, in the order they were given."""
    sequence: int
    """Number of the change; a later one is larger."""
    replayed: bool
    """True: the idempotency key had been used, nothing was done."""


@dataclass(frozen=True)
class Template:
    """Describe a template as an operator sees it; its vector only where it was asked for."""

    id: str
    encoder: str
    space: str
    created: float
    expires: float | None
    vector: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Subject:
    """Describe a subject and their templates."""

    id: str
    templates: tuple[Template, ...]
    attributes: Attributes
    consent: Consent | None


@dataclass(frozen=True)
class Hit:
    """Name one subject near a query, by the best of their templates."""

    subject: str
    template: str
    score: float
    """Cosine similarity."""


@dataclass(frozen=True)
class SearchResult:
    """Answer one query."""

    hits: tuple[Hit, ...]
    """Best first, every subject once; equal scores in the order of the subjects' ids."""
    searched: int
    """Templates that the query was compared with, after the filter."""


@dataclass(frozen=True)
class EndedMigration:
    """State the outcome of ending a migration."""

    templates: int
    """Templates of the old space that were deleted."""
    receipt: ReceiptAnswer


@dataclass
class Inspection:
    """State what a verification looked at, and what it found wrong: one line each."""

    head: Head
    """The audit log's."""
    galleries: int = 0
    subjects: int = 0
    templates: int = 0
    wrong: list[str] = field(default_factory=list)


class GalleryStore(Protocol):
    """Keep galleries. Blocking and safe to call from several threads; every process has one.

    Raises UnknownGallery, UnknownSubject, GalleryConflict, SpaceMismatch, IdempotencyConflict and StoreUnavailable
    (disk full or read-only, database gone). ``actor``: who is answerable, the name of the API key, for the audit log.
    What one process has acknowledged, every other answers by within a second.
    """

    def create(self, name: str, space: Space, retention: float | None, actor: str) -> Gallery:
        """Create a gallery, or return what is there if it has this very space; else GalleryConflict."""

    def get(self, name: str) -> Gallery:
        """Describe one gallery."""

    def list(self) -> Sequence[Gallery]:
        """Describe all galleries, by name."""

    def delete(self, name: str, actor: str) -> ReceiptAnswer:
        """Delete a gallery with all that is in it, and its key."""

    def enrol(self, gallery: str, enrolments: Sequence[Enrolment], actor: str) -> Sequence[Enrolled | PkdError]:
        """Enrol many subjects in one durable step; an error in the place of each that was refused."""

    def replayed(self, gallery: str, enrolments: Sequence[Enrolment]) -> Sequence[Enrolled | PkdError | None]:
        """Return what ``enrol`` would say to idempotency keys used before, None for others. Looks at no template."""

    def subject(self, gallery: str, subject: str, *, vectors: bool = False) -> Subject:
        """Describe one subject, with their vectors where asked for."""

    def subjects(self, gallery: str, *, after: str = "", limit: int = 100) -> Sequence[str]:
        """List ids after ``after``: a page, always in one order, ascending but in Milvus, which must not learn ids."""

    def delete_subject(self, gallery: str, subject: str, actor: str) -> ReceiptAnswer:
        """Delete a subject's templates and key."""

    def remove_templates(
        self, gallery: str, subject: str, templates: Sequence[str], actor: str, *, action: Action = "delete-templates"
    ) -> ReceiptAnswer:
        """Delete some templates of a subject, and the subject with the last of them. Raises UnknownTemplate."""

    def move(
        self, gallery: str, subject: str, into: str, actor: str, *, templates: Sequence[str] = (), new: bool = False
    ) -> MoveAnswer:
        """Move templates, by default all, to another subject, who must be there, or with ``new`` must not.

        Attributes and consent stay with whom they were given for; dates stay with the templates. In SQLite it is one
        step; in Milvus two, after the first of which both have them: the same move again ends it. Raises
        InvalidRequest, UnknownSubject, UnknownTemplate and GalleryConflict.
        """

    def set_mapping(self, gallery: str, change: Callable[[MappingState], MappingState], actor: str) -> Gallery:
        """Change what a gallery remembers of its mapped templates, in one step."""

    def note(self, gallery: str, action: Action, subject: str, actor: str) -> Head:
        """Record in the audit log what changed nothing, such as a refusal."""

    def search(
        self, gallery: str, encoder: str, queries: Vectors, top_k: int, where: Attributes | None = None
    ) -> Sequence[SearchResult]:
        """Find for each of the unit rows Q×D the nearest subjects among templates of ``encoder``, exactly.

        ``where``: only subjects that have all these attributes. An encoder without templates gives empty answers.
        """

    def begin_migration(self, gallery: str, space: Space, actor: str) -> Gallery:
        """Take templates of a second space, too. The same space again is no error: a migration is resumable."""

    def unmoved(self, gallery: str, *, after: str = "", limit: int = 100, back: bool = False) -> Sequence[str]:
        """List subjects without a template in the second space, with ``back`` in the first: a page, as ``subjects``."""

    def end_migration(self, gallery: str, actor: str, *, abandon: bool = False) -> EndedMigration:
        """Keep the second space alone and delete the first one's templates; with ``abandon`` the other way round.

        Raises GalleryConflict while a subject would be left without a template.
        """

    def expire(self, now: float) -> int:
        """Delete what is past its time; returns how many templates. Called again and again by the server."""

    def export(self, gallery: str) -> Iterator[Subject]:
        """Yield every subject with vectors, in the order of ``subjects``; in SQLite as of one moment."""

    def verify(self, noted: Head | None = None, progress: Progress = no_progress) -> Inspection:
        """Look at everything that is kept, and at the audit log; say what is wrong. May run beside servers.

        ``noted``: a head of the audit log that was kept outside.
        """

    def audit_records(self, before: int | None = None, limit: int = 100) -> Sequence[Record]:
        """List records of the audit log before that sequence, newest first."""

    def verify_audit(self, noted: Head | None = None) -> Head:
        """Walk the chain of the audit log alone and return its head. Raises NotTrusted, as ``audit.verify`` does."""

    def rekey(self, master: MasterKey) -> int:
        """Wrap every gallery's key with another master key; returns how many were. No server may run meanwhile."""

    def check(self) -> None:
        """Raise StoreUnavailable unless the store can read and write right now."""

    def close(self) -> None:
        """Let go of files and connections."""
