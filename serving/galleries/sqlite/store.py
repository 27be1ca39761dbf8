"""SqliteStore keeps galleries in one SQLite file and searches them in memory. It is the default GalleryStore.

SQLite (write-ahead log, synchronous FULL) is the durable truth; every process has all templates in memory and follows
what the others commit (follower.py). Vectors are float16, encrypted; ids of galleries and subjects, attributes and
consent are stored as they are. Order is that of sequences, never of the clock, which only dates things and expires
templates: set back, nothing happens; set forward, ``expire`` deletes what that clock calls past its time, and nothing
else.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from pkd.serving.core.errors import (
    REFUSED_ENROLMENT,
    IdempotencyConflict,
    InvalidRequest,
    ServingError,
    StoreUnavailable,
)
from pkd.serving.core.gallery_schemas import MoveAnswer, ReceiptAnswer
from pkd.serving.galleries import audit
from pkd.serving.galleries.crypto import DecryptionError, GalleryKey, MasterKey
from pkd.serving.galleries.failures import BUSY_SECONDS, explained
from pkd.serving.galleries.index.memory_index import MemoryIndex
from pkd.serving.galleries.sqlite.database import SqliteFile
from pkd.serving.galleries.sqlite.follower import FOLLOW_SECONDS, ChangeFollower, IndexFactory
from pkd.serving.galleries.sqlite.inspection import inspect
from pkd.serving.galleries.sqlite.rows import (
    Enrolling,
    delete_subject,
    gallery_row,
    moving,
    read_gallery,
    read_mapping,
    read_subject,
    remove,
    replayed,
    subject_row,
    without,
)
from pkd.serving.galleries.store import (
    Attributes,
    EndedMigration,
    Enrolled,
    Enrolment,
    Gallery,
    GalleryStore,
    Inspection,
    MappingState,
    SearchResult,
    Space,
    Subject,
    Vectors,
)
from pkd.serving.galleries.templates import (
    cannot_begin,
    check_move,
    choose_templates,
    enrolments_again,
    left_behind,
    other_space,
    unknown_gallery,
)
from pkd.toolkit.core.errors import PkdError
from pkd.toolkit.core.progress import Progress, no_progress

HEARTBEAT = 64 << 10
"""Bytes that a check writes."""
logger = logging.getLogger("pkd.serving")


@dataclass(frozen=True)
class SqliteOptions:
    """Hold the times and sizes of a SqliteStore; times in seconds."""

    follow_seconds: float = FOLLOW_SECONDS
    """Time between looks at what other processes committed, where no search looks anyway."""
    busy_seconds: float = BUSY_SECONDS
    """Longest time that a write waits for those of other processes."""
    patience_seconds: float = 0.2
    """Longest time that a search waits for changes that another thread takes in; then it answers by what is known."""
    changes_kept_seconds: float = 3600
    """Time that a change is kept for processes to follow; one that was silent for longer reads everything anew."""
    expired_at_once: int = 1_000
    """Subjects whose templates are deleted in one transaction: other processes wait for it."""
    pause_seconds: float = 0.02
    """Time between two of them, for those who wait."""
    index: IndexFactory = MemoryIndex
    """Makes a gallery's index in memory."""


class SqliteStore(GalleryStore):
    """Keep galleries in one file and search them in memory.

    Blocking and thread-safe; one a process, any number of processes on one folder.
    """

    def __init__(
        self,
        folder: Path,
        master: MasterKey,
        options: SqliteOptions = SqliteOptions(),
        *,
        create: bool = True,
        load: bool = True,
    ) -> None:
        """Open or create the database in ``folder`` and, with ``load``, read every template into memory.

        Without ``load`` that happens at the first search or enrolment. Raises InputError (another master key, an
        unknown schema) or StoreUnavailable.
        """
        self._options = options
        self._file = SqliteFile(folder, master, create=create, busy_seconds=options.busy_seconds)
        self._wal_owed = False
        try:
            self._follower = ChangeFollower(self._file, options.follow_seconds, options.index)
            if load:
                self._follower.catch_up()
                self._wal_owed = not self._file.truncate()
                self._follower.watch()
        except BaseException:
            self._file.close()
            raise

    @property
    def unreadable(self) -> Sequence[str]:
        """Say why templates that do not decrypt take no part in searches, one line each."""
        return [why for loaded in self._follower.galleries() for why in loaded.unreadable.values()]

    @property
    def loaded(self) -> Mapping[str, int]:
        """Map the galleries in memory to their numbers of templates there."""
        return {gallery.name: len(gallery.index) for gallery in self._follower.galleries()}

    def create(self, name: str, space: Space, retention: float | None, actor: str) -> Gallery:
        with self._file.writing() as db:
            self._file.require_master(db)
            found = db.execute("SELECT space, dim FROM galleries WHERE name = ?", (name,)).fetchone()
            if found and found != (space.id, space.dim):
                raise other_space(name, found[0], space.id)
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
        """Describe one gallery; where the database cannot be read, by what is in memory."""
        loaded = self._follower.gallery(name)
        try:
            with self._file.reading() as db:
                gallery = read_gallery(db, name)
        except StoreUnavailable:
            if loaded is None:
                raise
            return loaded.remembered()
        if loaded:
            loaded.described = gallery
        return gallery

    def list(self) -> Sequence[Gallery]:
        with self._file.reading() as db:
            names = [name for (name,) in db.execute("SELECT name FROM galleries ORDER BY name")]
            return [read_gallery(db, name) for name in names]

    def delete(self, name: str, actor: str) -> ReceiptAnswer:
        with self._file.writing() as db:
            gallery = read_gallery(db, name)
            templates = sum(gallery.templates.values())
            (answers,) = db.execute(
                "SELECT count(*) FROM answers a JOIN galleries g ON g.id = a.gallery WHERE g.name = ?", (name,)
            ).fetchone()
            rows = 1 + len(gallery.templates) + gallery.subjects + templates + answers
            db.execute("DELETE FROM galleries WHERE name = ?", (name,))
            head = audit.append(db, actor, "delete-gallery", name, templates=templates, rows=rows)
        return head.receipt(name, None, templates, rows, self._erased("key"))

    def enrol(self, gallery: str, enrolments: Sequence[Enrolment], actor: str) -> Sequence[Enrolled | PkdError]:
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

    def replayed(self, gallery: str, enrolments: Sequence[Enrolment]) -> Sequence[Enrolled | PkdError | None]:
        found: list[Enrolled | PkdError | None] = []
        with self._file.reading() as db:
            (id, _) = gallery_row(db, gallery)
            for enrolment in enrolments:
                try:
                    found.append(replayed(db, id, enrolment))
                except IdempotencyConflict as refusal:
                    found.append(refusal)
        return found

    def subject(self, gallery: str, subject: str, *, vectors: bool = False) -> Subject:
        with self._file.reading() as db:
            key = self._key(db, gallery)
            row = subject_row(db, gallery, subject)
            return read_subject(db, key, row, vectors)

    def subjects(self, gallery: str, *, after: str = "", limit: int = 100) -> Sequence[str]:
        with self._file.reading() as db:
            gallery_row(db, gallery)
            rows = db.execute(
                "SELECT s.name FROM subjects s JOIN galleries g ON g.id = s.gallery "
                "WHERE g.name = ? AND s.name > ? ORDER BY s.name LIMIT ?",
                (gallery, after, limit),
            )
            return [name for (name,) in rows]

    def delete_subject(self, gallery: str, subject: str, actor: str) -> ReceiptAnswer:
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
        return head.receipt(gallery, subject, templates, rows, self._erased("key"))

    def remove_templates(
        self,
        gallery: str,
        subject: str,
        templates: Sequence[str],
        actor: str,
        *,
        action: audit.Action = "delete-templates",
    ) -> ReceiptAnswer:
        with self._file.writing() as db:
            removed, rows, head, last = remove(db, self._key(db, gallery), subject, templates, actor, action)
        covers = self._erased(*(("key",) if last else ()))
        return head.receipt(gallery, subject, removed, rows, covers)

    def move(
        self, gallery: str, subject: str, into: str, actor: str, *, templates: Sequence[str] = (), new: bool = False
    ) -> MoveAnswer:
        with self._file.writing() as db:
            key, (id, _) = self._key(db, gallery), gallery_row(db, gallery)
            there = bool(db.execute("SELECT 1 FROM subjects WHERE gallery = ? AND name = ?", (id, into)).fetchone())
            found = read_subject(db, key, subject_row(db, gallery, subject), True)
            check_move(gallery, subject, into, there=there, new=new)
            chosen = choose_templates(gallery, found, templates)
            enrolling = Enrolling(db, read_gallery(db, gallery), id, key, actor)
            arrived = [enrolling.enrol(one) for one in enrolments_again(into, chosen, "move-in")]
            ids = [one.id for one in chosen]
            removed, rows, head, last = remove(db, key, subject, ids, actor, "move-out")
        covers = self._erased(*(("key",) if last else ()))
        receipt = head.receipt(gallery, subject, removed, rows, covers)
        moved = [one for each in arrived for one in each.templates]
        return MoveAnswer(
            gallery=gallery, subject=subject, into=into, templates=moved, sequence=arrived[-1].sequence, receipt=receipt
        )

    def set_mapping(self, gallery: str, change: Callable[[MappingState], MappingState], actor: str) -> Gallery:
        with self._file.writing() as db:
            (id, _) = gallery_row(db, gallery)
            before = read_mapping(db, id)
            after = change(before)
            if after != before:
                db.execute("INSERT OR REPLACE INTO mappings VALUES (?, ?)", (id, after.model_dump_json()))
                audit.append(db, actor, "set-mapping", gallery)
        return self.get(gallery)

    def note(self, gallery: str, action: audit.Action, subject: str, actor: str) -> audit.Head:
        with self._file.writing() as db:
            return audit.append(db, actor, action, gallery, subject=self._key(db, gallery).pseudonym(subject))

    def search(
        self, gallery: str, encoder: str, queries: Vectors, top_k: int, where: Attributes | None = None
    ) -> Sequence[SearchResult]:
        """Find for each of the unit rows Q×D the nearest subjects among templates of ``encoder``, exactly.

        Where the database cannot be read, the answer is by what was read before.
        """
        if top_k < 1:
            raise InvalidRequest(f"top_k of {top_k}: give 1 or more.")
        self._follow(self._options.patience_seconds)
        loaded = self._follower.gallery(gallery)
        if loaded is None:
            raise unknown_gallery(gallery)
        return loaded.index.search(encoder, np.asarray(queries, np.float32), top_k, where)

    def begin_migration(self, gallery: str, space: Space, actor: str) -> Gallery:
        with self._file.writing() as db:
            now = read_gallery(db, gallery)
            if now.moving_to is None and now.space.id != space.id:
                db.execute(
                    "UPDATE galleries SET next_space = ?, next_dim = ? WHERE name = ?", (space.id, space.dim, gallery)
                )
                audit.append(db, actor, "begin-migration", gallery)
            elif now.moving_to != space:
                raise cannot_begin(gallery, now.moving_to)
        return self.get(gallery)

    def unmoved(self, gallery: str, *, after: str = "", limit: int = 100, back: bool = False) -> Sequence[str]:
        with self._file.reading() as db:
            now = moving(db, gallery)
            assert now.moving_to
            return without(db, gallery, (now.space if back else now.moving_to).id, after, limit)

    def end_migration(self, gallery: str, actor: str, *, abandon: bool = False) -> EndedMigration:
        with self._file.writing() as db:
            now = moving(db, gallery)
            assert now.moving_to
            kept, left = (now.space, now.moving_to) if abandon else (now.moving_to, now.space)
            behind = without(db, gallery, kept.id, "", 1)
            if behind:
                raise left_behind(gallery, behind[0], kept.id)
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
        receipt = head.receipt(gallery, None, templates, rows, self._erased())
        return EndedMigration(templates, receipt)

    def expire(self, now: float) -> int:
        total = 0
        while templates := self._expire_some(now):
            total += templates
            time.sleep(self._options.pause_seconds)
        with self._file.writing() as db:
            db.execute("DELETE FROM changes WHERE time < unixepoch() - ?", (self._options.changes_kept_seconds,))
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
                (now, self._options.expired_at_once),
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
        """Yield every subject with vectors, by id, as of one moment. Until it ends, deletions cannot cut the log."""
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

    def verify(self, noted: audit.Head | None = None, progress: Progress = no_progress) -> Inspection:
        follower = ChangeFollower(self._file)  # of its own, which nobody else lets catch up meanwhile
        try:
            return inspect(self._file, follower, noted, progress)
        finally:
            follower.close()

    def audit_records(self, before: int | None = None, limit: int = 100) -> Sequence[audit.Record]:
        with self._file.reading() as db:
            return audit.newest(db, before, limit)

    def verify_audit(self, noted: audit.Head | None = None) -> audit.Head:
        with self._file.reading() as db:
            return audit.verify(db, noted)

    def rekey(self, master: MasterKey) -> int:
        return self._file.rekey(master)

    def check(self) -> None:
        """Raise StoreUnavailable unless the store can read and write right now.

        Commits a heartbeat: a transaction that is undone would touch no disk and notice neither a full one nor one
        that has become read-only. It is as large as an enrolment, which may find no space where a byte still does.
        """
        with self._file.writing() as db:
            db.execute("UPDATE about SET value = hex(randomblob(?)) WHERE name = 'heartbeat'", (HEARTBEAT // 2,))
        self._follower.catch_up()

    def close(self) -> None:
        self._follower.close()
        self._file.close()

    def _key(self, db: sqlite3.Connection, gallery: str) -> GalleryKey:
        row = gallery_row(db, gallery)
        loaded = self._follower.gallery(gallery)
        if loaded and loaded.id == row[0]:
            return loaded.key
        self._file.require_master(db)
        return self._file.master.gallery(gallery, row[1])

    def _key_or_none(self, db: sqlite3.Connection, gallery: str) -> GalleryKey | None:
        """Return None where it does not decrypt: what has expired goes all the same, without a pseudonym in the log."""
        try:
            return self._key(db, gallery)
        except DecryptionError:
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
            self._follower.catch_up(patience)
        except (ServingError, MemoryError) as error:
            logger.warning("what is in memory may be behind: %s", str(error) or "out of memory")
            return False
        return True


def _exported(file: SqliteFile, db: sqlite3.Connection, key: GalleryKey, gallery: int) -> Iterator[Subject | None]:
    """Yield None first: a generator that has begun is ended in order, however early its reader loses interest."""
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
