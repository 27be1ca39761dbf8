"""Galleries and subjects as they lie in the tables of sqlite_file.py, within a transaction of the caller's."""

from __future__ import annotations

import json
import sqlite3

import numpy as np

from pkd.serving.core.errors import GalleryConflict, UnknownSubject
from pkd.serving.galleries.crypto import GalleryKey
from pkd.serving.galleries.index.memory_index import template_id
from pkd.serving.galleries.store import Consent, Gallery, Space, Subject, Template
from pkd.serving.galleries.templates import STORED, unknown_gallery


def gallery_row(db: sqlite3.Connection, name: str) -> tuple[int, bytes]:
    """Its number and wrapped key."""
    row: tuple[int, bytes] | None = db.execute("SELECT id, key FROM galleries WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise unknown_gallery(name)
    return row


def read_gallery(db: sqlite3.Connection, name: str) -> Gallery:
    """A gallery with its counts."""
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
    return Gallery(name, Space(space, dim), moving_to, created, retention, subjects, dict(templates.fetchall()), moved)


def moving(db: sqlite3.Connection, name: str) -> Gallery:
    """A gallery that is being migrated, else a gallery-conflict."""
    gallery = read_gallery(db, name)
    if gallery.moving_to is None:
        raise GalleryConflict(f"gallery {name} is not being migrated. Begin a migration first.")
    return gallery


def without(db: sqlite3.Connection, gallery: str, space: str, after: str, limit: int) -> list[str]:
    """Subjects that have no template in a space."""
    rows = db.execute(
        "SELECT s.name FROM subjects s JOIN galleries g ON g.id = s.gallery WHERE g.name = ? AND s.name > ? "
        "AND NOT EXISTS (SELECT 1 FROM templates t JOIN encoders e ON e.id = t.encoder "
        "WHERE t.subject = s.id AND e.space = ?) ORDER BY s.name LIMIT ?",
        (gallery, after, space, limit),
    )
    return [name for (name,) in rows]


SubjectRow = tuple[int, str, bytes, str, str | None]
"""Number, id, wrapped key, attributes and consent as JSON."""


def subject_row(db: sqlite3.Connection, gallery: str, subject: str) -> SubjectRow:
    """One subject, without templates."""
    row: SubjectRow | None = db.execute(
        "SELECT s.id, s.name, s.key, s.attributes, s.consent FROM subjects s JOIN galleries g ON g.id = s.gallery "
        "WHERE g.name = ? AND s.name = ?",
        (gallery, subject),
    ).fetchone()
    if row is None:
        raise UnknownSubject(f"Gallery {gallery} has no subject {subject}.")
    return row


def read_subject(db: sqlite3.Connection, gallery: GalleryKey, row: SubjectRow, vectors: bool) -> Subject:
    """A subject with templates, decrypted where ``vectors`` are asked for."""
    id, name, wrapped, attributes, consent = row
    key = gallery.subject(name, wrapped) if vectors else None
    templates = []
    for number, encoder, space, created, expires, sealed in db.execute(
        "SELECT t.id, e.name, e.space, t.created, t.expires, t.sealed FROM templates t "
        "JOIN encoders e ON e.id = t.encoder WHERE t.subject = ? ORDER BY t.id",
        (id,),
    ):
        vector = None
        if key:
            plain = key.open(sealed, template_id(number), encoder)
            vector = np.frombuffer(plain, STORED).astype(np.float32)
        templates.append(Template(template_id(number), encoder, space, created, expires, vector))
    return Subject(name, tuple(templates), json.loads(attributes), Consent(**json.loads(consent)) if consent else None)


def delete_subject(db: sqlite3.Connection, id: int) -> tuple[int, int]:
    """Delete all of a subject: how many templates, and how many rows."""
    templates = db.execute("DELETE FROM templates WHERE subject = ?", (id,)).rowcount
    answers = db.execute("DELETE FROM answers WHERE subject = ?", (id,)).rowcount
    db.execute("DELETE FROM subjects WHERE id = ?", (id,))
    return templates, templates + answers + 1
