"""What a gallery keeps in Milvus: two kinds of collections, their rows, and how these are sealed.

``…_records`` holds plain rows, told apart by ``kind``; every other collection holds the rotated templates of one space.
Subjects appear as keyed pseudonyms, encoders and attributes as keyed hashes, and all else is in ``data``, encrypted
with a key derived from the gallery's. So a filter is made of hexadecimal digits alone, whatever a client sends.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pkd.serving.galleries.crypto import GalleryKey, Sealed, SubjectKey
from pkd.serving.galleries.milvus.client import NOTHING, Row
from pkd.serving.galleries.store import Attributes, Consent, Enrolment, Gallery, Space

JOURNAL, COMMIT, SUBJECT, MOVED, ENCODER = range(5)
"""Kinds of records: a change under way · an enrolment that took place · a subject is there · and has a template in the
second space · an encoder's name and space."""

MOST_DATA, SPARE = 60_000, 2_000
"""Characters of the data of a record, and how many of them an estimate leaves."""
RECORDS = {"id": 128, "kind": 0, "subject": 64, "key": 64, "created": 0, "expires": 0, "data": MOST_DATA}
TEMPLATES = {"id": 64, "subject": 64, "encoder": 64, "tags": -1}
INDEXED = ("subject", "key")
NEVER = 2**62
PSEUDONYM = 64
"""Digits of one. A commit's key begins with its subject's."""


@dataclass(frozen=True)
class Ending:
    """A migration that is being ended: the gallery takes one space alone, and both still have their collections."""

    since: float
    left: Space
    abandon: bool


@dataclass(frozen=True)
class Entry:
    """A gallery's own row: all but its counts."""

    id: str
    """Of its collections; begins with when it was made, in µs, 16 hex digits."""
    name: str
    space: Space
    moving_to: Space | None
    created: float
    retention: float | None
    wrapped: str
    """The gallery's key under the master key, base64."""
    tables: Mapping[str, str]
    """Space → collection of its templates."""
    ending: Ending | None = None

    def row(self) -> Row:
        """As it is stored."""
        return {"id": self.id, "name": hashed(self.name), "data": json.dumps(asdict(self)), "vector": NOTHING}

    @classmethod
    def of(cls, row: Row) -> Entry:
        """From what ``row`` gave."""
        known = json.loads(row["data"])
        for name in ("space", "moving_to"):
            known[name] = Space(**known[name]) if known[name] else None
        if ending := known["ending"]:
            known["ending"] = Ending(**{**ending, "left": Space(**ending["left"])})
        return cls(**known)

    def gallery(self, subjects: int = 0, templates: Mapping[str, int] | None = None, moved: int = 0) -> Gallery:
        """As an operator sees it."""
        return Gallery(
            self.name, self.space, self.moving_to, self.created, self.retention, subjects, templates or {}, moved
        )


@dataclass(frozen=True)
class Commit:
    """One enrolment that took place. Templates that no commit names were never enrolled."""

    id: str
    """Random, 32 hex digits; its templates are ``id.0``, ``id.1`` …"""
    subject: str
    sequence: int
    """µs since 1970, but always above the subject's last one."""
    created: float
    expires: float | None
    templates: Sequence[Sequence[str]]
    """Encoder and space of each."""
    fingerprints: Sequence[str]
    """Of the vector of each, as Milvus has it: who writes to Milvus can change vectors, but not unnoticed."""
    attributes: Attributes
    consent: Mapping[str, str] | None
    key: str | None
    digest: str

    @classmethod
    def new(cls, enrolment: Enrolment, retention: float | None, earlier: Sequence[Commit]) -> Commit:
        """What this enrolment is to become, after those that the subject has. Its fingerprints are not known yet."""
        now = time.time()
        expires = enrolment.expires
        if expires is None and retention is not None:
            expires = now + retention
        return cls(
            id=os.urandom(16).hex(),
            subject=enrolment.subject,
            sequence=max([int(now * 1e6), *(commit.sequence + 1 for commit in earlier)]),
            created=now,
            expires=expires,
            templates=[(template.encoder, template.space) for template in enrolment.templates],
            fingerprints=(),
            attributes=dict(enrolment.attributes),
            consent=asdict(enrolment.consent) if enrolment.consent else None,
            key=enrolment.key,
            digest=enrolment.digest,
        )

    @property
    def template_ids(self) -> tuple[str, ...]:
        """Of all its templates, in the order they were given."""
        return tuple(f"{self.id}.{number}" for number in range(len(self.templates)))


class Seal:
    """What one gallery's key makes of names and data."""

    def __init__(self, key: GalleryKey) -> None:
        self._gallery = key
        self._names = key.derive("milvus names")
        self._data = SubjectKey(key.gallery, "", key.derive("milvus records"))  # one key for all records

    def subject(self, name: str) -> str:
        """A subject's pseudonym, 64 hex digits: also their place in every listing."""
        return self._gallery.pseudonym(name).hex()

    def hashed(self, what: str, name: str) -> str:
        """32 hex digits that stand for an encoder, an attribute or an idempotency key."""
        return hmac.digest(self._names, f"{what}\0{name}".encode(), "sha256")[:16].hex()

    def key(self, key: str) -> str:
        """Stands for an idempotency key."""
        return self.hashed("idempotency", key)

    def tags(self, attributes: Attributes) -> dict[str, int]:
        """Attributes as they are stored beside a template, to be filtered by."""
        return {self.hashed("attribute", f"{len(name)}\0{name}{value}"): 1 for name, value in attributes.items()}

    def record(self, kind: int, id: str, data: Any = None, **columns: object) -> Row:
        """A row of the records; ``data`` is encrypted and bound to its id."""
        # Compressed: a commit repeats the same encoder and space for each of its templates.
        text = zlib.compress(json.dumps(data, ensure_ascii=False).encode())
        sealed = base64.b64encode(self._data.seal(text, id, "")).decode()
        plain = {"subject": "", "key": "", "created": int(time.time() * 1e6), "expires": NEVER}
        return {"id": id, "kind": kind, **plain, **columns, "data": sealed, "vector": NOTHING}

    def commit(self, commit: Commit) -> Row:
        """A commit's row; in the order of pseudonyms, so that a page of subjects is a page of rows."""
        subject = self.subject(commit.subject)
        expires = NEVER if commit.expires is None else int(commit.expires * 1e6)
        key = "" if commit.key is None else self.key(commit.key)
        return self.record(COMMIT, subject + commit.id, asdict(commit), subject=subject, key=key, expires=expires)

    def fits(self, commit: Commit) -> bool:
        """Whether a commit whose fingerprints are not known yet will have a row that Milvus takes."""
        likely = [os.urandom(16).hex() for _ in commit.templates]
        return len(self.commit(replace(commit, fingerprints=likely))["data"]) <= MOST_DATA - SPARE

    def open(self, row: Row) -> Any:
        """The data of a record; raises Sealed."""
        return json.loads(zlib.decompress(self._data.open(base64.b64decode(row["data"]), row["id"], "")))

    def opened(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Any]]:
        """Those that open, with their data. The others count for nothing here; pkd-gallery verify names them."""
        for row in rows:
            try:
                data = self.open(row)
            except Sealed:
                continue
            yield row, data

    def encoder_row(self, encoder: str, space: str) -> Row:
        """Says which space an encoder's templates are in."""
        return self.record(ENCODER, self.encoder_id(encoder), [encoder, space])

    def encoder_id(self, encoder: str) -> str:
        """The key of that row."""
        return f"~encoder/{self.hashed('encoder', encoder)}"


def current(commits: Iterable[Commit]) -> tuple[Attributes, Consent | None]:
    """A subject's attributes and consent: the newest that are stated."""
    attributes: Attributes = {}
    consent: Mapping[str, str] | None = None
    for commit in sorted(commits, key=lambda commit: (commit.sequence, commit.id)):
        attributes = commit.attributes or attributes
        consent = commit.consent or consent
    return attributes, Consent(**consent) if consent else None


def fingerprint(hidden: NDArray[np.float32]) -> str:
    """Of a rotated vector: 32 hex digits, which tell nothing of it to who does not have it."""
    return hashlib.sha256(hidden.astype("<f4").tobytes()).hexdigest()[:32]


def hashed(name: str) -> str:
    """Stands for a gallery's name in filters, whatever characters that has."""
    return hashlib.sha256(name.encode()).hexdigest()


def among(column: str, values: Iterable[str]) -> str:
    """A filter: the column is one of these words of ours, which need no quoting."""
    quoted = ", ".join(f'"{value}"' for value in sorted(values))
    return f"{column} in [{quoted}]"
