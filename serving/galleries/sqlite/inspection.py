"""Verifying a database of galleries: audit chain, keys, every row, and the index made from it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from pkd.serving.core.errors import StoreUnavailable
from pkd.serving.galleries import audit
from pkd.serving.galleries.audit import Head
from pkd.serving.galleries.crypto import DecryptionError, GalleryKey
from pkd.serving.galleries.failures import explained
from pkd.serving.galleries.index.exact_index import checksum
from pkd.serving.galleries.index.memory_index import template_id
from pkd.serving.galleries.sqlite.database import SqliteFile
from pkd.serving.galleries.sqlite.follower import ChangeFollower
from pkd.serving.galleries.store import Inspection
from pkd.serving.galleries.templates import STORED, TOLERANCE, unit_rows
from pkd.toolkit.core.errors import NotTrusted
from pkd.toolkit.core.progress import Progress

TRIES = 10
"""Largest number of attempts to bring reading and index to the same moment, while a server is writing."""


def inspect(file: SqliteFile, follower: ChangeFollower, noted: Head | None, progress: Progress) -> Inspection:
    """Look at everything, as of one moment, as GalleryStore.verify. ``follower``: whose index is compared."""
    with _one_moment(file, follower) as db:
        (count,) = db.execute("SELECT count(*) FROM templates").fetchone()
        with progress("decrypting", count) as advance:
            found = Inspection(audit.head(db))
            found.wrong += [f"SQLite: {line}" for (line,) in db.execute("PRAGMA integrity_check") if line != "ok"]
            orphans = db.execute("PRAGMA foreign_key_check").fetchall()
            found.wrong += [f"{row[0]}: row {row[1]} refers to a {row[2]} that is not there." for row in orphans]
            try:
                audit.verify(db, noted)
            except NotTrusted as error:
                found.wrong.append(str(error))
            for id, name, wrapped in db.execute("SELECT id, name, key FROM galleries ORDER BY name").fetchall():
                found.galleries += 1
                try:
                    key = file.master.gallery(name, wrapped)
                except DecryptionError as error:
                    found.wrong.append(str(error))
                    continue
                rows = _gallery(db, id, key, found, advance)
                followed = follower.gallery(name)
                index = followed.index.contents() if followed else {}
                found.wrong += [
                    f"gallery {name}, {encoder}: {index.get(encoder, (0, 0))[0]:,} templates in memory are not the "
                    f"{rows.get(encoder, (0, 0))[0]:,} in the database."
                    for encoder in sorted({*rows, *index})
                    if rows.get(encoder) != index.get(encoder)
                ]
            return found


def _gallery(
    db: sqlite3.Connection, id: int, key: GalleryKey, found: Inspection, advance: Callable[[int], None]
) -> dict[str, tuple[int, int]]:
    """Decrypt every template; returns encoder → how many, and their checksum."""
    sums: dict[str, tuple[int, int]] = {}
    for subject, name, wrapped in db.execute("SELECT id, name, key FROM subjects WHERE gallery = ?", (id,)).fetchall():
        found.subjects += 1
        templates = db.execute(
            "SELECT t.id, e.name, t.sealed, CASE e.space WHEN g.space THEN g.dim WHEN g.next_space THEN g.next_dim END "
            "FROM templates t JOIN encoders e ON e.id = t.encoder JOIN galleries g ON g.id = e.gallery "
            "WHERE t.subject = ?",
            (subject,),
        ).fetchall()
        if not templates:
            found.wrong.append(f"gallery {key.gallery}, subject {name}: has no template.")
        try:
            subject_key = key.subject(name, wrapped)
        except DecryptionError as error:
            found.wrong.append(str(error))
            continue
        for number, encoder, ciphertext, dim in templates:
            found.templates += 1
            advance(1)
            try:
                stored = subject_key.decrypt(ciphertext, template_id(number), encoder)
            except DecryptionError as error:
                found.wrong.append(str(error))
                continue
            vector = np.frombuffer(stored, STORED).astype(np.float32)
            if len(vector) != dim or not abs(float(np.linalg.norm(vector)) - 1) < TOLERANCE:
                found.wrong.append(f"template {template_id(number)}: is not a unit vector of its space.")
            count, total = sums.get(encoder, (0, 0))
            total = (total + checksum(np.array([number], np.int64), unit_rows(stored, 1))) % 2**64
            sums[encoder] = count + 1, total
    miscounted = db.execute(
        "SELECT name, templates FROM encoders e WHERE gallery = ? AND templates <> "
        "(SELECT count(*) FROM templates t WHERE t.encoder = e.id)",
        (id,),
    )
    for name, count in miscounted:
        found.wrong.append(f"gallery {key.gallery}, {name}: counts {count:,} templates, which is not so.")
    return sums


@contextmanager
def _one_moment(file: SqliteFile, follower: ChangeFollower) -> Iterator[sqlite3.Connection]:
    """Give a reading connection at the very moment up to which ``follower`` has caught up."""
    for _ in range(TRIES):
        with file.reading() as db, explained():
            moment = audit.head(db)
            follower.catch_up()
            with file.reading() as later:
                same = audit.head(later) == moment
            if same:
                yield db
                return
    raise StoreUnavailable(f"Galleries: {file.path} is being written to without pause. Try again later.")
