"""Whether a database of galleries is whole: audit chain, keys, every row, and the index made from it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from pkd.serving.core.errors import StoreUnavailable
from pkd.serving.galleries import audit
from pkd.serving.galleries.audit import Head
from pkd.serving.galleries.crypto import GalleryKey, Sealed
from pkd.serving.galleries.database import SqliteFile, explained
from pkd.serving.galleries.index.exact_index import checksum
from pkd.serving.galleries.index.memory_index import template_id
from pkd.serving.galleries.inspection import Inspection
from pkd.serving.galleries.sqlite.follower import Tail
from pkd.serving.galleries.templates import STORED, unit_rows
from pkd.toolkit.core.errors import NotTrusted

TRIES = 10
"""How often reading and index are brought to the same moment, should a server be writing meanwhile."""


def count_templates(file: SqliteFile) -> int:
    """How many there are to look at."""
    with file.reading() as db:
        (count,) = db.execute("SELECT count(*) FROM templates").fetchone()
        return int(count)


def inspect(file: SqliteFile, noted: Head | None = None, step: Callable[[int], None] = lambda done: None) -> Inspection:
    """Look at everything, as of one moment. ``noted``: a head of the audit log that was kept outside."""
    tail = Tail(file)
    try:
        with _one_moment(file, tail) as db:
            found = Inspection(audit.head(db))
            found.wrong += [f"SQLite: {line}" for (line,) in db.execute("PRAGMA integrity_check") if line != "ok"]
            found.wrong += [f"{row[0]}: row {row[1]} refers to a {row[2]} that is not there." for row in _orphans(db)]
            try:
                audit.verify(db, noted)
            except NotTrusted as error:
                found.wrong.append(str(error))
            for id, name, wrapped in db.execute("SELECT id, name, key FROM galleries ORDER BY name").fetchall():
                found.galleries += 1
                try:
                    key = file.master.gallery(name, wrapped)
                except Sealed as error:
                    found.wrong.append(str(error))
                    continue
                rows = _gallery(db, id, key, found, step)
                followed = tail.gallery(name)
                index = followed.index.contents() if followed else {}
                found.wrong += [
                    f"gallery {name}, {encoder}: {index.get(encoder, (0, 0))[0]:,} templates in memory are not the "
                    f"{rows.get(encoder, (0, 0))[0]:,} in the database."
                    for encoder in sorted({*rows, *index})
                    if rows.get(encoder) != index.get(encoder)
                ]
            return found
    finally:
        tail.close()


def _gallery(
    db: sqlite3.Connection, id: int, key: GalleryKey, found: Inspection, step: Callable[[int], None]
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
        except Sealed as error:
            found.wrong.append(str(error))
            continue
        for number, encoder, sealed, dim in templates:
            found.templates += 1
            step(1)
            try:
                stored = subject_key.open(sealed, template_id(number), encoder)
            except Sealed as error:
                found.wrong.append(str(error))
                continue
            vector = np.frombuffer(stored, STORED).astype(np.float32)
            if len(vector) != dim or not abs(float(np.linalg.norm(vector)) - 1) < 0.01:
                found.wrong.append(f"template {template_id(number)}: is not a unit vector of its space.")
            count, total = sums.get(encoder, (0, 0))
            total = (total + checksum(np.array([number], np.int64), unit_rows(stored, 1))) % 2**64
            sums[encoder] = count + 1, total
    counters = "SELECT name, templates FROM encoders e WHERE gallery = ? AND templates <> " + (
        "(SELECT count(*) FROM templates t WHERE t.encoder = e.id)"
    )
    for name, count in db.execute(counters, (id,)):
        found.wrong.append(f"gallery {key.gallery}, {name}: counts {count:,} templates, which is not so.")
    return sums


def _orphans(db: sqlite3.Connection) -> list[tuple[str, int, str]]:
    return db.execute("PRAGMA foreign_key_check").fetchall()


@contextmanager
def _one_moment(file: SqliteFile, tail: Tail) -> Iterator[sqlite3.Connection]:
    """A reading connection at the very moment up to which ``tail`` has caught up."""
    for _ in range(TRIES):
        with file.reading() as db, explained():
            moment = audit.head(db)
            tail.catch_up()
            with file.reading() as later:
                same = audit.head(later) == moment
            if same:
                yield db
                return
    raise StoreUnavailable(f"Galleries: {file.path} is being written to without pause. Try again later.")
