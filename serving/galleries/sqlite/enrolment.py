"""Enrolling one subject in SQLite: checks, then rows, within the transaction of the whole request."""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import asdict

import numpy as np

from pkd.serving.core.errors import IdempotencyConflict, InvalidRequest
from pkd.serving.galleries import audit
from pkd.serving.galleries.crypto import GalleryKey, SubjectKey
from pkd.serving.galleries.index.memory_index import template_id
from pkd.serving.galleries.store import Enrolled, Enrolment, Gallery, NewTemplate
from pkd.serving.galleries.templates import STORED, check


class Enrolling:
    """The enrolments of one request, in its transaction. Knows what it has looked up already."""

    def __init__(self, db: sqlite3.Connection, gallery: Gallery, id: int, key: GalleryKey, actor: str) -> None:
        """``id``: the gallery's row."""
        self._db, self._gallery, self._id, self._key, self._actor = db, gallery, id, key, actor
        rows = db.execute("SELECT name, space FROM encoders WHERE gallery = ? AND templates > 0", (id,))
        self._spaces: dict[str, str] = dict(rows.fetchall())
        self._encoders: dict[str, int] = {}
        newest = db.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'templates'")
        self._newest = int(newest.fetchone()[0])

    def enrol(self, enrolment: Enrolment) -> Enrolled:
        """All templates of one enrolment, or an error before anything is written."""
        before = answered(self._db, self._id, enrolment)
        if before:
            return before
        if not enrolment.templates:
            raise InvalidRequest(f"subject {enrolment.subject}: no template was given. Send at least one.")
        spaces = dict(self._spaces)
        for template in enrolment.templates:
            check(self._gallery, template, spaces)
            spaces[template.encoder] = template.space
        self._spaces = spaces
        now = time.time()
        subject, key = _subject(self._db, self._id, self._key, enrolment)
        expires = enrolment.expires
        if expires is None and self._gallery.retention is not None:
            expires = now + self._gallery.retention
        made = tuple(
            template_id(self._insert(subject, key, template, now, expires)) for template in enrolment.templates
        )
        pseudonym = self._key.pseudonym(enrolment.subject)
        head = audit.append(self._db, self._actor, "enrol", self._gallery.name, subject=pseudonym, templates=len(made))
        if enrolment.key is not None:
            self._db.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)",  # of one whose templates are gone
                (self._id, enrolment.key, subject, enrolment.digest, json.dumps(made), head.sequence, now),
            )
        return Enrolled(enrolment.subject, made, head.sequence, False)

    def _insert(self, subject: int, key: SubjectKey, template: NewTemplate, now: float, expires: float | None) -> int:
        """Write one template; returns its number, which the ciphertext is bound to."""
        self._newest += 1
        sealed = key.seal(np.asarray(template.vector, STORED).tobytes(), template_id(self._newest), template.encoder)
        self._db.execute(
            "INSERT INTO templates VALUES (?, ?, ?, ?, ?, ?)",
            (self._newest, subject, self._encoder(template), now, expires, sealed),
        )
        return self._newest

    def _encoder(self, template: NewTemplate) -> int:
        """The encoder's row; one without templates takes the space it is used with now."""
        if template.encoder not in self._encoders:
            self._db.execute(
                "INSERT INTO encoders (gallery, name, space) VALUES (?, ?, ?) "
                "ON CONFLICT (gallery, name) DO UPDATE SET space = excluded.space WHERE templates = 0",
                (self._id, template.encoder, template.space),
            )
            (self._encoders[template.encoder],) = self._db.execute(
                "SELECT id FROM encoders WHERE gallery = ? AND name = ?", (self._id, template.encoder)
            ).fetchone()
        return self._encoders[template.encoder]


def answered(db: sqlite3.Connection, gallery: int, enrolment: Enrolment) -> Enrolled | None:
    """What was answered under its idempotency key; raises an idempotency-conflict if another request was.

    None once no template of that answer is left: moved out of, expired. Then the request is a new one.
    """
    if enrolment.key is None:
        return None
    found = db.execute(
        "SELECT s.name, a.digest, a.templates, a.sequence FROM answers a JOIN subjects s ON s.id = a.subject "
        "WHERE a.gallery = ? AND a.key = ?",
        (gallery, enrolment.key),
    ).fetchone()
    if found is None:
        return None
    subject, digest, text, sequence = found
    templates: list[str] = json.loads(text)
    marks = ", ".join("?" * len(templates))
    numbers = [int(template, 16) for template in templates]
    if not db.execute(f"SELECT 1 FROM templates WHERE id IN ({marks}) LIMIT 1", numbers).fetchone():
        return None
    if (subject, digest) != (enrolment.subject, enrolment.digest):
        raise IdempotencyConflict(
            f"idempotency key {enrolment.key} was used for another request. Use a new key for a new request."
        )
    return Enrolled(subject, tuple(templates), sequence, True)


def _subject(db: sqlite3.Connection, gallery: int, key: GalleryKey, enrolment: Enrolment) -> tuple[int, SubjectKey]:
    """The subject's row, made or described anew as the enrolment says, and their key."""
    attributes = json.dumps(dict(enrolment.attributes), sort_keys=True, ensure_ascii=False)
    consent = json.dumps(asdict(enrolment.consent), ensure_ascii=False) if enrolment.consent else None
    found = db.execute(
        "SELECT id, key, attributes FROM subjects WHERE gallery = ? AND name = ?", (gallery, enrolment.subject)
    ).fetchone()
    if found is None:
        subject_key, wrapped = key.new_subject(enrolment.subject)
        made = db.execute(
            "INSERT INTO subjects (gallery, name, key, attributes, consent) VALUES (?, ?, ?, ?, ?)",
            (gallery, enrolment.subject, wrapped, attributes, consent),
        )
        assert made.lastrowid
        return made.lastrowid, subject_key
    id, wrapped, described = found
    if enrolment.attributes and attributes != described:
        db.execute("UPDATE subjects SET attributes = ? WHERE id = ?", (attributes, id))
    if consent:
        db.execute("UPDATE subjects SET consent = ? WHERE id = ?", (consent, id))
    return id, key.subject(enrolment.subject, wrapped)
