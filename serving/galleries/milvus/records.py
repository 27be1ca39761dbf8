"""The rows that a gallery keeps in Milvus, and how names, data and vectors are hidden in them.

A gallery's ``…_records`` collection holds plain rows, told apart by ``kind``; every other collection of it holds the
rotated templates of one space. Subjects appear as keyed pseudonyms, encoders and attributes as keyed hashes, and all
else is in ``data``, encrypted with a key derived from the gallery's. So a filter consists of hexadecimal digits alone,
whatever a client sends.
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
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from pkd.serving.galleries.crypto import DecryptionError, GalleryKey, SubjectKey
from pkd.serving.galleries.milvus.client import NO_VECTOR, Row
from pkd.serving.galleries.store import (
    NOTHING_MAPPED,
    Attributes,
    Consent,
    Enrolment,
    Gallery,
    MappingState,
    Space,
    Vectors,
)

JOURNAL, COMMIT, SUBJECT, MOVED, ENCODER = range(5)
"""Kinds of records: a change under way · an enrolment that took place · a subject is there · and has a template in the
second space · an encoder's name and space."""

MAX_DATA, SPARE = 60_000, 2_000
"""Largest number of characters in a record's data, and how many of them an estimate leaves free."""
RECORD_FIELDS = {"id": 128, "kind": 0, "subject": 64, "key": 64, "created": 0, "expires": 0, "data": MAX_DATA}
TEMPLATE_FIELDS = {"id": 64, "subject": 64, "encoder": 64, "tags": -1}
INDEXED_FIELDS = ("subject", "key")
NEVER = 2**62
"""The ``expires`` of a record that does not expire."""
PSEUDONYM = 64
"""Digits of a pseudonym, with which a commit's key begins."""


@dataclass(frozen=True)
class Ending:
    """Describe a migration that is being ended: one space is taken, and both still have their collections."""

    since: float
    left: Space
    abandon: bool


@dataclass(frozen=True)
class GalleryRow:
    """Hold all that is known of a gallery but its counts: its row in the catalogue."""

    id: str
    """Part of its collections' names; begins with the time it was made, in µs, 16 hex digits."""
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
    mapping: MappingState = NOTHING_MAPPED

    @property
    def wrapped_key(self) -> bytes:
        """Return the gallery's key under the master key."""
        return base64.b64decode(self.wrapped)

    def row(self) -> Row:
        """Return the row as Milvus stores it."""
        known = asdict(replace(self, mapping=NOTHING_MAPPED))
        del known["mapping"]
        if self.mapping != NOTHING_MAPPED:  # what has none is read by older versions of pkd, too
            known["mapping"] = self.mapping.model_dump(mode="json")
        return {"id": self.id, "name": hash_name(self.name), "data": json.dumps(known), "vector": NO_VECTOR}

    @classmethod
    def read(cls, row: Row) -> GalleryRow:
        """Read what ``row`` returned."""
        known = json.loads(row["data"])
        for name in ("space", "moving_to"):
            known[name] = Space(**known[name]) if known[name] else None
        if ending := known["ending"]:
            known["ending"] = Ending(**{**ending, "left": Space(**ending["left"])})
        known["mapping"] = MappingState.model_validate(known.get("mapping", {}))
        return cls(**known)

    def gallery(self, subjects: int = 0, templates: Mapping[str, int] | None = None, moved: int = 0) -> Gallery:
        """Return the gallery as an operator sees it, with these counts."""
        return Gallery(
            self.name,
            self.space,
            self.moving_to,
            self.created,
            self.retention,
            subjects,
            templates or {},
            moved,
            self.mapping,
        )


@dataclass(frozen=True)
class Commit:
    """Record one enrolment that took place. Templates that no commit names were never enrolled."""

    id: str
    """32 random hex digits; its templates are ``id.0``, ``id.1`` …"""
    subject: str
    sequence: int
    """µs since 1970, but always above the subject's last one."""
    created: float
    expires: float | None
    templates: Sequence[Sequence[str]]
    """Encoder and space of each."""
    fingerprints: Sequence[str]
    """One for each vector as Milvus has it: who writes to Milvus can change vectors, but not unnoticed."""
    attributes: Attributes
    consent: Mapping[str, str] | None
    key: str | None
    digest: str

    @classmethod
    def new(cls, enrolment: Enrolment, retention: float | None, earlier: Sequence[Commit]) -> Commit:
        """Make the commit of an enrolment, after the subject's ``earlier`` ones; its fingerprints come later."""
        now = time.time()
        expires = enrolment.expires
        if expires is None and retention is not None:
            expires = (now if enrolment.created is None else enrolment.created) + retention
        return cls(
            id=os.urandom(16).hex(),
            subject=enrolment.subject,
            sequence=max([int(now * 1e6), *(commit.sequence + 1 for commit in earlier)]),
            created=now if enrolment.created is None else enrolment.created,
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
        """List the ids of its templates, in the order they were given."""
        return tuple(f"{self.id}.{number}" for number in range(len(self.templates)))


class RowCipher:
    """Hide names, data and vectors of one gallery under secrets derived from its key."""

    def __init__(self, key: GalleryKey) -> None:
        self._gallery = key
        self._names = key.derive("milvus names")
        self._data = SubjectKey(key.gallery, "", key.derive("milvus records"))  # one key for all records
        self._rotations: dict[tuple[str, int], Rotation] = {}

    def rotation(self, space: str, dim: int) -> Rotation:
        """Return the rotation of a space's vectors, drawn when it is first needed."""
        if (space, dim) not in self._rotations:
            self._rotations[space, dim] = Rotation(self._gallery.derive(f"milvus rotation {space}"), dim)
        return self._rotations[space, dim]

    def subject(self, name: str) -> str:
        """Return a subject's pseudonym, 64 hex digits, which is also their place in every listing."""
        return self._gallery.pseudonym(name).hex()

    def hashed(self, kind: str, name: str) -> str:
        """Return 32 hex digits that stand for an encoder, an attribute or an idempotency key."""
        return hmac.digest(self._names, f"{kind}\0{name}".encode(), "sha256")[:16].hex()

    def key(self, key: str) -> str:
        """Return what stands for an idempotency key."""
        return self.hashed("idempotency", key)

    def tags(self, attributes: Attributes) -> dict[str, int]:
        """Return attributes as they are stored beside a template, to be filtered by."""
        return {self.hashed("attribute", f"{len(name)}\0{name}{value}"): 1 for name, value in attributes.items()}

    def record(self, kind: int, id: str, data: Any = None, **columns: object) -> Row:
        """Make a row of the records; ``data`` is encrypted and bound to its id."""
        # Compressed: a commit repeats the same encoder and space for each of its templates.
        text = zlib.compress(json.dumps(data, ensure_ascii=False).encode())
        encrypted = base64.b64encode(self._data.encrypt(text, id, "")).decode()
        plain = {"subject": "", "key": "", "created": int(time.time() * 1e6), "expires": NEVER}
        return {"id": id, "kind": kind, **plain, **columns, "data": encrypted, "vector": NO_VECTOR}

    def commit(self, commit: Commit) -> Row:
        """Make a commit's row; keys are in the order of pseudonyms, so that a page of rows is a page of subjects."""
        expires = NEVER if commit.expires is None else int(commit.expires * 1e6)
        key = "" if commit.key is None else self.key(commit.key)
        subject = self.subject(commit.subject)
        return self.record(COMMIT, self.commit_key(commit), asdict(commit), subject=subject, key=key, expires=expires)

    def commit_key(self, commit: Commit) -> str:
        """Return the key of a commit's row."""
        return self.subject(commit.subject) + commit.id

    def fits(self, commit: Commit) -> bool:
        """Tell whether a commit without fingerprints will have a row that Milvus takes."""
        likely = [os.urandom(16).hex() for _ in commit.templates]
        return len(self.commit(replace(commit, fingerprints=likely))["data"]) <= MAX_DATA - SPARE

    def decrypt(self, row: Row) -> Any:
        """Return the data of a record; raises DecryptionError."""
        return json.loads(zlib.decompress(self._data.decrypt(base64.b64decode(row["data"]), row["id"], "")))

    def decrypted(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Any]]:
        """Yield the rows that decrypt, with their data. The others count for nothing; pkd-gallery verify names them."""
        for row in rows:
            try:
                data = self.decrypt(row)
            except DecryptionError:
                continue
            yield row, data

    def encoder_row(self, encoder: str, space: str) -> Row:
        """Make the row that says which space an encoder's templates are in."""
        return self.record(ENCODER, self.encoder_key(encoder), [encoder, space])

    def encoder_key(self, encoder: str) -> str:
        """Return the key of that row."""
        return f"~encoder/{self.hashed('encoder', encoder)}"


class Rotation:
    """Hide vectors by a secret orthogonal matrix, drawn uniformly by a seed of 32 bytes.

    A vector database compares plain numbers. A rotation keeps every length and angle, hence every search, and hides
    the coordinates that a face can be reconstructed from. It is no encryption: angles between templates stay in the
    open, and who knows ``dim`` independent vectors before and after (their own enrolments, say) solves for the matrix.
    """

    def __init__(self, seed: bytes, dim: int) -> None:
        # QR of normal numbers, signs fixed by R's diagonal: Mezzadri 2007, arXiv math-ph/0609050.
        orthogonal, upper = np.linalg.qr(normals(seed, dim * dim).reshape(dim, dim))
        self._matrix = orthogonal * np.sign(np.diag(upper))  # float64: what is revealed differs by one rounding alone

    def hide(self, vectors: Vectors) -> Vectors:
        """Rotate rows N×D for storage or a search. Cosines change by rounding alone, below 1e-6."""
        hidden: Vectors = (vectors @ self._matrix).astype(np.float32)
        return hidden

    def reveal(self, hidden: Vectors) -> Vectors:
        """Return the rows that ``hide`` was given, to rounding."""
        vectors: Vectors = (hidden @ self._matrix.T).astype(np.float32)
        return vectors


def normals(seed: bytes, count: int) -> NDArray[np.float64]:
    """Draw standard normal numbers from AES-256-CTR: numpy's own generators may differ in its next release."""
    pairs = -(-count // 2)
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(16 * pairs))
    # In (0, 1), 53 bits each; Box–Muller makes two normal numbers of two uniform ones.
    uniform = ((np.frombuffer(stream, "<u8") >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def current(commits: Iterable[Commit]) -> tuple[Attributes, Consent | None]:
    """Return a subject's attributes and consent: the newest that their commits state."""
    attributes: Attributes = {}
    consent: Mapping[str, str] | None = None
    for commit in sorted(commits, key=lambda commit: (commit.sequence, commit.id)):
        attributes = commit.attributes or attributes
        consent = commit.consent or consent
    return attributes, Consent(**consent) if consent else None


def fingerprint(hidden: NDArray[np.float32]) -> str:
    """Hash a rotated vector to 32 hex digits, which tell nothing of it to who does not have it."""
    return hashlib.sha256(hidden.astype("<f4").tobytes()).hexdigest()[:32]


def hash_name(name: str) -> str:
    """Return what stands for a gallery's name in filters, whatever characters that has."""
    return hashlib.sha256(name.encode()).hexdigest()


def among(column: str, values: Iterable[str]) -> str:
    """Make a filter: the column is one of these words of ours, which need no quoting."""
    quoted = ", ".join(f'"{value}"' for value in sorted(values))
    return f"{column} in [{quoted}]"
