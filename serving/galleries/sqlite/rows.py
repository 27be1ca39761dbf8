"""The rows of a database: galleries, subjects and templates are read and changed in a caller's transaction."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from pkd.serving.galleries import audit
from pkd.serving.galleries.crypto import GalleryKey, SubjectKey
from pkd.serving.galleries.index.memory_index import template_id
from pkd.serving.galleries.store import (
    NOTHING_MAPPED,
    Consent,
    Enrolled,
    Enrolment,
    Gallery,
    MappingState,
    NewTemplate,
    Space,
    Subject,
    Template,
)
from pkd.serving.galleries.templates import (
    STORED,
    check_enrolment,
    choose_templates,
    not_migrating,
    unknown_gallery,
    unknown_subject,
    used_key,
)

SubjectRow = tuple[int, str, bytes, str, str | None]
"""Number, id, wrapped key, attributes and consent as JSON."""


def gallery_row(db: sqlite3.Connection, name: str) -> tuple[int, bytes]:
    """Read a gallery's number and wrapped key."""
    row: tuple[int, bytes] | None = db.execute("SELECT id, key FROM galleries WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise unknown_gallery(name)
    return row


def read_gallery(db: sqlite3.Connection, name: str) -> Gallery:
    """Describe a gallery with its counts."""
    (id, _) = gallery_row(db, name)
    space, dim, next_space, next_dim, created, retention, subjects = db.execute(
        "SELECT space, dim, next_space, next_dim, created, retention, subjects FROM galleries WHERE id = ?", (id,)
    ).fetchone()
    templates = db.execute(
        "SELECT name, templates FROM encoders WHERE gallery = ? AND templates > 0 ORDER BY name", (id,)
    )
    moved = 0
    if next_space:
        (moved,) = db.execute(
            "SELECT count(DISTINCT t.subject) FROM templates t JOIN encoders e ON e.id = t.encoder "
            "WHERE e.gallery = ? AND e.space = ?",
            (id, next_space),
        ).fetchone()
    moving_to = Space(next_space, next_dim) if next_space else None
    counts = dict(templates.fetchall())
    mapping = read_mapping(db, id)
    return Gallery(name, Space(space, dim), moving_to, created, retention, subjects, counts, moved, mapping)


def read_mapping(db: sqlite3.Connection, gallery: int) -> MappingState:
    """Read what the gallery with this number remembers of mapped templates."""
    found = db.execute("SELECT state FROM mappings WHERE gallery = ?", (gallery,)).fetchone()
    return MappingState.model_validate_json(found[0]) if found else NOTHING_MAPPED


def moving(db: sqlite3.Connection, name: str) -> Gallery:
    """Describe a gallery that is being migrated; raises GalleryConflict for another."""
    gallery = read_gallery(db, name)
    if gallery.moving_to is None:
        raise not_migrating(name)
    return gallery


def without(db: sqlite3.Connection, gallery: str, space: str, after: str, limit: int) -> list[str]:
    """List subjects that have no template in a space: a page."""
    rows = db.execute(
        "SELECT s.name FROM subjects s JOIN galleries g ON g.id = s.gallery WHERE g.name = ? AND s.name > ? "
        "AND NOT EXISTS (SELECT 1 FROM templates t JOIN encoders e ON e.id = t.encoder "
        "WHERE t.subject = s.id AND e.space = ?) ORDER BY s.name LIMIT ?",
        (gallery, after, space, limit),
    )
    return [name for (name,) in rows]


def subject_row(db: sqlite3.Connection, gallery: str, subject: str) -> SubjectRow:
    """Read one subject, without templates."""
    row: SubjectRow | None = db.execute(
        "SELECT s.id, s.name, s.key, s.attributes, s.consent FROM subjects s JOIN galleries g ON g.id = s.gallery "
        "WHERE g.name = ? AND s.name = ?",
        (gallery, subject),
    ).fetchone()
    if row is None:
        raise unknown_subject(gallery, subject)
    return row


def read_subject(db: sqlite3.Connection, gallery: GalleryKey, row: SubjectRow, vectors: bool) -> Subject:
    """Describe a subject with templates, decrypted where ``vectors`` are asked for."""
    id, name, wrapped, attributes, consent = row
    key = gallery.subject(name, wrapped) if vectors else None
    templates = []
    for number, encoder, space, created, expires, ciphertext in db.execute(
        "SELECT t.id, e.name, e.space, t.created, t.expires, t.sealed FROM templates t "
        "JOIN encoders e ON e.id = t.encoder WHERE t.subject = ? ORDER BY t.id",
        (id,),
    ):
        vector = None
        if key:
            plain = key.decrypt(ciphertext, template_id(number), encoder)
            vector = np.frombuffer(plain, STORED).astype(np.float32)
        templates.append(Template(template_id(number), encoder, space, created, expires, vector))
    return Subject(name, tuple(templates), json.loads(attributes), Consent(**json.loads(consent)) if consent else None)


def delete_subject(db: sqlite3.Connection, id: int) -> tuple[int, int]:
    """Delete all of a subject; returns how many templates, and how many rows."""
    templates = db.execute("DELETE FROM templates WHERE subject = ?", (id,)).rowcount
    answers = db.execute("DELETE FROM answers WHERE subject = ?", (id,)).rowcount
    db.execute("DELETE FROM subjects WHERE id = ?", (id,))
    return templates, templates + answers + 1


def remove(
    db: sqlite3.Connection,
    key: GalleryKey,
    subject: str,
    templates: Sequence[str],
    actor: str,
    action: audit.Action,
) -> tuple[int, int, audit.Head, bool]:
    """Delete templates of a subject, all for none; returns how many, how many rows, the record, and whether all."""
    row = subject_row(db, key.gallery, subject)
    found = read_subject(db, key, row, False)
    chosen = choose_templates(key.gallery, found, templates)
    last = len(chosen) == len(found.templates)
    if last:
        removed, rows = delete_subject(db, row[0])
    else:
        db.executemany("DELETE FROM templates WHERE id = ?", [(int(one.id, 16),) for one in chosen])
        removed = rows = len(chosen)
    pseudonym = key.pseudonym(subject)
    head = audit.append(db, actor, action, key.gallery, subject=pseudonym, templates=removed, rows=rows)
    return removed, rows, head, last


class Enrolling:
    """Enrol for one request, in its transaction, and remember what was looked up already."""

    def __init__(self, db: sqlite3.Connection, gallery: Gallery, id: int, key: GalleryKey, actor: str) -> None:
        """Begin. ``id``: number of the gallery's row."""
        self._db, self._gallery, self._id, self._key, self._actor = db, gallery, id, key, actor
        rows = db.execute("SELECT name, space FROM encoders WHERE gallery = ? AND templates > 0", (id,))
        self._spaces: dict[str, str] = dict(rows.fetchall())
        self._encoders: dict[str, int] = {}
        newest = db.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'templates'")
        self._newest = int(newest.fetchone()[0])

    def enrol(self, enrolment: Enrolment) -> Enrolled:
        """Enrol all templates of one enrolment, or raise before anything is written."""
        before = replayed(self._db, self._id, enrolment)
        if before:
            return before
        self._spaces = check_enrolment(self._gallery, enrolment, self._spaces)
        now = time.time()
        subject, key = _subject(self._db, self._id, self._key, enrolment)
        created = now if enrolment.created is None else enrolment.created
        expires = enrolment.expires
        if expires is None and self._gallery.retention is not None:
            expires = created + self._gallery.retention
        made = tuple(
            template_id(self._insert(subject, key, template, created, expires)) for template in enrolment.templates
        )
        pseudonym = self._key.pseudonym(enrolment.subject)
        name, count = self._gallery.name, len(made)
        head = audit.append(self._db, self._actor, enrolment.action, name, subject=pseudonym, templates=count)
        if enrolment.key is not None:
            self._db.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)",  # of one whose templates are gone
                (self._id, enrolment.key, subject, enrolment.digest, json.dumps(made), head.sequence, now),
            )
        return Enrolled(enrolment.subject, made, head.sequence, False)

    def _insert(self, subject: int, key: SubjectKey, template: NewTemplate, now: float, expires: float | None) -> int:
        """Write one template; returns its number, which the ciphertext is bound to."""
        self._newest += 1
        ciphertext = key.encrypt(
            np.asarray(template.vector, STORED).tobytes(), template_id(self._newest), template.encoder
        )
        self._db.execute(
            "INSERT INTO templates VALUES (?, ?, ?, ?, ?, ?)",
            (self._newest, subject, self._encoder(template), now, expires, ciphertext),
        )
        return self._newest

    def _encoder(self, template: NewTemplate) -> int:
        """Return the number of the encoder's row; one without templates takes the space it is used with now."""
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


def replayed(db: sqlite3.Connection, gallery: int, enrolment: Enrolment) -> Enrolled | None:
    """Repeat what was answered under an idempotency key; raises IdempotencyConflict if another request was.

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
        raise used_key(enrolment.key)
    return Enrolled(subject, tuple(templates), sequence, True)


def _subject(db: sqlite3.Connection, gallery: int, key: GalleryKey, enrolment: Enrolment) -> tuple[int, SubjectKey]:
    """Return the subject's number and key; their row is made or described anew as the enrolment says."""
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
