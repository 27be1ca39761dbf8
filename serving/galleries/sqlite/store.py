"""SqliteStore: galleries in one SQLite file, searched in memory. The default GalleryStore.

SQLite (write-ahead log, synchronous FULL) is the durable truth; every process has all templates in memory and follows
what the others commit (tail.py). Vectors are float16, encrypted; ids of galleries and subjects, attributes and consent
are stored as they are. Order is that of sequences, never of the clock, which only dates things and expires templates:
set back, nothing happens; set forward, ``expire`` deletes what that clock calls past its time, and nothing else.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from pkd.serving.core.errors import (
    REFUSED_ENROLMENT,
    GalleryConflict,
    IdempotencyConflict,
    InvalidRequest,
    ServingError,
)
from pkd.serving.galleries import audit
from pkd.serving.galleries.crypto import GalleryKey, MasterKey, Sealed
from pkd.serving.galleries.database import SqliteFile, explained
from pkd.serving.galleries.sqlite.enrolment import Enrolling, answered
from pkd.serving.galleries.sqlite.follower import Tail
from pkd.serving.galleries.sqlite.queries import (
    delete_subject,
    gallery_row,
    moving,
    read_gallery,
    read_subject,
    subject_row,
    without,
)
from pkd.serving.galleries.store import (
    Attributes,
    Enrolled,
    Enrolment,
    Found,
    Gallery,
    Moved,
    Receipt,
    Space,
    Subject,
    Vectors,
)
from pkd.serving.galleries.templates import unknown_gallery
from pkd.toolkit.core.errors import PkdError

PATIENCE = 0.2
"""Seconds a search waits for changes that another thread is taking in; then it answers by what is known."""
CHANGES_KEPT = 3600
"""Seconds a change is kept for processes to follow; one that was silent for longer reads everything anew."""
EXPIRED = 1_000
"""Subjects whose templates are deleted in one transaction: other processes wait for it."""
PAUSE = 0.02
"""Seconds between two of them, for those who wait."""

logger = logging.getLogger("pkd.serving")


class SqliteStore:
    """A GalleryStore. Blocking and thread-safe; one a process, any number of processes on one folder."""

    def __init__(self, folder: Path, master: MasterKey, *, create: bool = True) -> None:
        """Open or create the database in ``folder`` and read every template into memory.

        Raises InputError (another master key, an unknown schema) or StoreUnavailable.
        """
        self._file = SqliteFile(folder, master, create=create)
        try:
            self._tail = Tail(self._file)
            self._tail.catch_up()
            self._wal_owed = not self._file.truncate()
            self._tail.watch()
        except BaseException:
            self._file.close()
            raise

    @property
    def unreadable(self) -> Sequence[str]:
        """Why templates that do not decrypt take no part in searches, one line each."""
        return [why for followed in self._tail.galleries() for why in followed.unreadable.values()]

    def create(self, name: str, space: Space, retention: float | None, actor: str) -> Gallery:
        """Create, or return what is there if it has this very space; else a gallery-conflict."""
        with self._file.writing() as db:
            self._file.require_master(db)
            found = db.execute("SELECT space, dim FROM galleries WHERE name = ?", (name,)).fetchone()
            if found and found != (space.id, space.dim):
                raise GalleryConflict(
                    f"gallery {name} exists with space {found[0]}. Use another name, or migrate it.",
                    details={"expected": found[0], "got": space.id},
                )
            if not found:
                _, wrapped = self._file.master.new_gallery(name)
                db.execute(
                    "INSERT INTO galleries (name, key, space, dim, created, retention) VALUES (?, ?, ?, ?, ?, ?)",
                    (name, wrapped, space.id, space.dim, time.time(), retention),
                )
                audit.append(db, actor, "create", name)
        self._follow()
        return self.get(name)

    def get(self, name: str) -> Gallery:
        """One gallery."""
        with self._file.reading() as db:
            return read_gallery(db, name)

    def list(self) -> Sequence[Gallery]:
        """All, by name."""
        with self._file.reading() as db:
            names = [name for (name,) in db.execute("SELECT name FROM galleries ORDER BY name")]
            return [read_gallery(db, name) for name in names]

    def delete(self, name: str, actor: str) -> Receipt:
        """Delete a gallery with all that is in it, and its key."""
        with self._file.writing() as db:
            gallery = read_gallery(db, name)
            templates = sum(gallery.templates.values())
            (answers,) = db.execute(
                "SELECT count(*) FROM answers a JOIN galleries g ON g.id = a.gallery WHERE g.name = ?", (name,)
            ).fetchone()
            rows = 1 + len(gallery.templates) + gallery.subjects + templates + answers
            db.execute("DELETE FROM galleries WHERE name = ?", (name,))
            head = audit.append(db, actor, "delete-gallery", name, templates=templates, rows=rows)
        return Receipt(name, None, templates, rows, self._erased("key"), head.sequence, head.hash)

    def enrol(self, gallery: str, enrolments: Sequence[Enrolment], actor: str) -> Sequence[Enrolled | PkdError]:
        """Enrol many subjects in one durable step; an error in the place of each that was refused."""
        done: list[Enrolled | PkdError] = []
        with self._file.writing() as db:
            now = read_gallery(db, gallery)
            (id, _) = gallery_row(db, gallery)
            enrolling = Enrolling(db, now, id, self._key(db, gallery), actor)
            for enrolment in enrolments:
                try:
                    done.append(enrolling.enrol(enrolment))
                except REFUSED_ENROLMENT as refusal:
                    done.append(refusal)
        self._follow()
        return done

    def answered(self, gallery: str, enrolments: Sequence[Enrolment]) -> Sequence[Enrolled | PkdError | None]:
        """What ``enrol`` would say to idempotency keys used before, None for others."""
        found: list[Enrolled | PkdError | None] = []
        with self._file.reading() as db:
            (id, _) = gallery_row(db, gallery)
            for enrolment in enrolments:
                try:
                    found.append(answered(db, id, enrolment))
                except IdempotencyConflict as refusal:
                    found.append(refusal)
        return found

    def subject(self, gallery: str, subject: str, *, vectors: bool = False) -> Subject:
        """One subject, with their vectors where asked for."""
        with self._file.reading() as db:
            key = self._key(db, gallery)
            row = subject_row(db, gallery, subject)
            return read_subject(db, key, row, vectors)

    def subjects(self, gallery: str, *, after: str = "", limit: int = 100) -> Sequence[str]:
        """Ids in ascending order after ``after``: a page."""
        with self._file.reading() as db:
            gallery_row(db, gallery)
            rows = db.execute(
                "SELECT s.name FROM subjects s JOIN galleries g ON g.id = s.gallery "
                "WHERE g.name = ? AND s.name > ? ORDER BY s.name LIMIT ?",
                (gallery, after, limit),
            )
            return [name for (name,) in rows]

    def delete_subject(self, gallery: str, subject: str, actor: str) -> Receipt:
        """Delete a subject's templates and key."""
        with self._file.writing() as db:
            key = self._key(db, gallery)
            row = subject_row(db, gallery, subject)
            templates, rows = delete_subject(db, row[0])
            head = audit.append(
                db,
                actor,
                "delete-subject",
                gallery,
                subject=key.pseudonym(subject),
                templates=templates,
                rows=rows,
            )
        return Receipt(gallery, subject, templates, rows, self._erased("key"), head.sequence, head.hash)

    def search(
        self, gallery: str, encoder: str, queries: Vectors, top_k: int, where: Attributes | None = None
    ) -> Sequence[Found]:
        """For each of the unit rows Q×D the nearest subjects among templates of ``encoder``, exactly.

        Where the database cannot be read, the answer is by what was read before.
        """
        if top_k < 1:
            raise InvalidRequest(f"top_k of {top_k}: give 1 or more.")
        self._follow(PATIENCE)
        followed = self._tail.gallery(gallery)
        if followed is None:
            raise unknown_gallery(gallery)
        return followed.index.search(encoder, np.asarray(queries, np.float32), top_k, where)

    def begin_migration(self, gallery: str, space: Space, actor: str) -> Gallery:
        """Take templates of a second space, too. The same space again is no error: a migration is resumable."""
        with self._file.writing() as db:
            now = read_gallery(db, gallery)
            if now.moving_to is None and now.space.id != space.id:
                db.execute(
                    "UPDATE galleries SET next_space = ?, next_dim = ? WHERE name = ?", (space.id, space.dim, gallery)
                )
                audit.append(db, actor, "begin-migration", gallery)
            elif now.moving_to != space:
                state = f"moves to {now.moving_to.id} already" if now.moving_to else "has this space already"
                raise GalleryConflict(f"gallery {gallery} {state}. End that first, or choose another.")
        return self.get(gallery)

    def unmoved(self, gallery: str, *, after: str = "", limit: int = 100, back: bool = False) -> Sequence[str]:
        """Subjects without a template in the second space, or with ``back`` in the first: a page, as ``subjects``."""
        with self._file.reading() as db:
            now = moving(db, gallery)
            assert now.moving_to
            return without(db, gallery, (now.space if back else now.moving_to).id, after, limit)

    def end_migration(self, gallery: str, actor: str, *, abandon: bool = False) -> Moved:
        """Keep the second space alone and delete the first one's templates; with ``abandon`` the other way round.

        A gallery-conflict while a subject would be left without a template.
        """
        with self._file.writing() as db:
            now = moving(db, gallery)
            assert now.moving_to
            kept, left = (now.space, now.moving_to) if abandon else (now.moving_to, now.space)
            behind = without(db, gallery, kept.id, "", 1)
            if behind:
                raise GalleryConflict(
                    f"gallery {gallery}: subjects would be left without a template, {behind[0]} first. "
                    f"Enrol them in space {kept.id}, or delete them."
                )
            (id, *_) = gallery_row(db, gallery)
            encoders = "(SELECT id FROM encoders WHERE gallery = ? AND space = ?)"
            templates = db.execute(f"DELETE FROM templates WHERE encoder IN {encoders}", (id, left.id)).rowcount
            rows = (
                templates + db.execute("DELETE FROM encoders WHERE gallery = ? AND space = ?", (id, left.id)).rowcount
            )
            db.execute(
                "UPDATE galleries SET space = ?, dim = ?, next_space = NULL, next_dim = NULL WHERE id = ?",
                (kept.id, kept.dim, id),
            )
            head = audit.append(db, actor, "end-migration", gallery, templates=templates, rows=rows)
        return Moved(templates, Receipt(gallery, None, templates, rows, self._erased(), head.sequence, head.hash))

    def expire(self, now: float) -> int:
        """Delete what is past its time; returns how many templates. Called again and again by the server."""
        total = 0
        while templates := self._expire_some(now):
            total += templates
            time.sleep(PAUSE)
        with self._file.writing() as db:
            db.execute("DELETE FROM changes WHERE time < unixepoch() - ?", (CHANGES_KEPT,))
        if total:
            self._erased()
        elif self._wal_owed:
            self._wal_owed = not self._file.truncate()
        return total

    def _expire_some(self, now: float) -> int:
        with self._file.writing() as db:
            rows = db.execute(
                "SELECT s.id, s.name, g.name, count(*) FROM templates t JOIN subjects s ON s.id = t.subject "
                "JOIN galleries g ON g.id = s.gallery WHERE t.expires <= ? GROUP BY s.id LIMIT ?",
                (now, EXPIRED),
            ).fetchall()
            keys = {gallery: self._key_or_none(db, gallery) for gallery in {row[2] for row in rows}}
            for id, name, gallery, templates in rows:
                gone = db.execute("DELETE FROM templates WHERE subject = ? AND expires <= ?", (id, now)).rowcount
                if not db.execute("SELECT 1 FROM templates WHERE subject = ? LIMIT 1", (id,)).fetchone():
                    gone += delete_subject(db, id)[1]
                key = keys[gallery]
                pseudonym = key.pseudonym(name) if key else None
                audit.append(db, "retention", "expire", gallery, subject=pseudonym, templates=templates, rows=gone)
        return sum(row[3] for row in rows)

    def export(self, gallery: str) -> Iterator[Subject]:
        """Every subject with vectors, by id, as of one moment. Until it is through, deletions cannot cut the log."""
        with explained():
            db = self._file.connect()
            db.execute("BEGIN")
            try:
                key = self._key(db, gallery)
                (id, *_) = gallery_row(db, gallery)
            except BaseException:
                self._file.disconnect(db)
                raise
        subjects = _exported(self._file, db, key, id)
        next(subjects)
        return cast("Iterator[Subject]", subjects)

    def check(self) -> None:
        """Raise StoreUnavailable unless the store can read and write right now.

        Commits a heartbeat: a transaction that is undone would touch no disk and notice neither a full one nor one
        that has become read-only.
        """
        with self._file.writing() as db:
            db.execute("UPDATE about SET value = value + 1 WHERE name = 'heartbeat'")
        self._tail.catch_up()

    def close(self) -> None:
        """Let go of files and connections."""
        self._tail.close()
        self._file.close()

    def _key(self, db: sqlite3.Connection, gallery: str) -> GalleryKey:
        row = gallery_row(db, gallery)
        followed = self._tail.gallery(gallery)
        if followed and followed.id == row[0]:
            return followed.key
        self._file.require_master(db)
        return self._file.master.gallery(gallery, row[1])

    def _key_or_none(self, db: sqlite3.Connection, gallery: str) -> GalleryKey | None:
        """None where it does not decrypt: what is past its time goes all the same, without a pseudonym in the log."""
        try:
            return self._key(db, gallery)
        except Sealed:
            return None

    def _erased(self, *also: str) -> tuple[str, ...]:
        """Follow a deletion into memory and the write-ahead log; returns what the receipt may claim."""
        index = ("index",) if self._follow() else ()
        # Whoever reads for long (an export) is waited for once; until the sweep gets through, nobody waits again.
        cut = self._file.truncate(0.0 if self._wal_owed else 1.0)
        self._wal_owed = not cut
        return ("rows", *also, *index, *(("wal",) if cut else ()))

    def _follow(self, patience: float = -1) -> bool:
        """Take in what was committed; False where it cannot be read: the next search tries again."""
        try:
            self._tail.catch_up(patience)
        except (ServingError, MemoryError) as error:
            logger.warning("what is in memory may be behind: %s", str(error) or "out of memory")
            return False
        return True


def _exported(file: SqliteFile, db: sqlite3.Connection, key: GalleryKey, gallery: int) -> Iterator[Subject | None]:
    """None first: a generator that has begun is ended in order, however early its reader loses interest."""
    try:
        yield None
        with explained():
            rows = db.execute(
                "SELECT id, name, key, attributes, consent FROM subjects WHERE gallery = ? ORDER BY name", (gallery,)
            )
            for row in rows:
                yield read_subject(db, key, row, True)
    finally:
        file.disconnect(db)
