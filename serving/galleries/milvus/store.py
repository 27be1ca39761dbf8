"""MilvusStore: galleries in Milvus, for several server machines and for more templates than one memory holds.

Each gallery has its own collections, so that deleting it is dropping them; one collection more lists the galleries.
How subjects change without transactions: commit.py. What Milvus learns of the people in it: docs/milvus.md.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from pkd.serving.core.errors import GalleryConflict, ServingError, UnknownSubject
from pkd.serving.core.gallery_schemas import MoveAnswer, ReceiptAnswer
from pkd.serving.galleries.audit import Action, AuditFile, Head, Record
from pkd.serving.galleries.crypto import DecryptionError, MasterKey
from pkd.serving.galleries.failures import explained
from pkd.serving.galleries.milvus import inspection
from pkd.serving.galleries.milvus.catalogue import (
    ROW_SECONDS,
    Catalogue,
    begin_migration,
    end_migration,
    new_id,
    second_space,
)
from pkd.serving.galleries.milvus.client import Consistency, MilvusConnection, NoCollection
from pkd.serving.galleries.milvus.commit import SWEEP_SECONDS, Reassignment, finish_removal, plan_removal, remove
from pkd.serving.galleries.milvus.enrolment import finish, replayed, write
from pkd.serving.galleries.milvus.gallery import MilvusGallery, records_of, search
from pkd.serving.galleries.milvus.records import (
    COMMIT,
    INDEXED_FIELDS,
    MOVED,
    RECORD_FIELDS,
    SUBJECT,
    TEMPLATE_FIELDS,
    GalleryRow,
)
from pkd.serving.galleries.milvus.retention import expire, purge, sweep, sweep_collections
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
    check_move,
    choose_templates,
    move_enrolments,
    other_space,
    unknown_gallery,
    unknown_subject,
)
from pkd.toolkit.core.errors import PkdError
from pkd.toolkit.core.progress import Progress, no_progress

BATCH = 256
"""Enrolments written in one step."""
EXPORTED = 200
"""Subjects read at a time by an export."""
ATTEMPTS = 5
COVERS = ("rows", "index")
"""Claims of a receipt: nothing answers by it any more. When files follow, the audit log says: retention.py."""
UNFINISHED = ("index",)
"""Claims of one where Milvus failed halfway: nobody is found, and a sweep deletes the rows."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MilvusOptions:
    """Hold the times of a MilvusStore, in seconds."""

    sweep_seconds: float = SWEEP_SECONDS
    """Age from which what a process left is taken for a dead one's, and swept."""
    purge_seconds: float = 6 * 3600.0
    """Time between two looks at whether deleted rows have left Milvus' files."""
    first_purge_seconds: float = 600.0
    """Time from the start to the first look."""
    stopped_seconds: float = 60.0
    """Age of a journal that most likely only a sweep will clear; a purge waits for that."""
    row_seconds: float = ROW_SECONDS
    """Time that a gallery's row is believed before it is read again, seconds."""
    recheck_seconds: float = 2.0
    """Time after which ``verify`` looks again at what did not fit."""


class MilvusStore(GalleryStore):
    """Keep galleries on Milvus 2.3 or newer. Blocking and thread-safe; one a process, any number of machines.

    ``log``: of what *this machine's* processes changed; Milvus cannot keep a chain. The store closes it.
    """

    def __init__(
        self,
        connection: MilvusConnection,
        log: AuditFile,
        master: MasterKey,
        options: MilvusOptions = MilvusOptions(),
    ) -> None:
        self._connection, self._log, self._master, self._options = connection, log, master, options
        self._catalogue = Catalogue(connection, options.row_seconds)
        self._opened: dict[str, MilvusGallery] = {}
        self._next_purge = time.monotonic() + options.first_purge_seconds

    def create(self, name: str, space: Space, retention: float | None, actor: str) -> Gallery:
        for _ in range(ATTEMPTS):
            found = self._catalogue.find(name, "strong")
            if found:
                if found.space != space:
                    raise other_space(name, found.space.id, space.id)
                return self._with(name, self._describe, "strong")  # a moment ago another row may have been there
            _, wrapped = self._master.new_gallery(name)
            id, table = new_id(), new_id()
            row = GalleryRow(id, name, space, None, time.time(), retention, b64encode(wrapped).decode(), {})
            row = replace(row, tables={space.id: f"{self._connection.prefix}_{id}_{table}"})
            with ThreadPoolExecutor(2) as both:  # Milvus takes over a second to load a collection
                name_of_records = records_of(self._connection, id)
                records = both.submit(self._connection.create, name_of_records, RECORD_FIELDS, 0, INDEXED_FIELDS)
                self._connection.create(row.tables[space.id], TEMPLATE_FIELDS, space.dim)
                records.result()
            if self._catalogue.add(row):
                self._log.append(actor, "create", name)
                return self._describe(self._open(row), row)  # by name, one that is being withdrawn might be read
            self._drop(row.id)
            time.sleep(random.random())
        raise GalleryConflict(f"gallery {name} is being created by others at this moment. Try again.")

    def get(self, name: str) -> Gallery:
        return self._with(name, self._describe)

    def list(self) -> Sequence[Gallery]:
        described = []
        for row in sorted(self._catalogue.rows("bounded"), key=lambda row: row.name):
            with contextlib.suppress(NoCollection), explained():  # deleted meanwhile
                described.append(self._describe(self._open(row), row))
        return described

    def delete(self, name: str, actor: str) -> ReceiptAnswer:
        def delete(gallery: MilvusGallery, row: GalleryRow) -> ReceiptAnswer:
            templates = sum(self._count(table, 'id > ""') for table in row.tables.values())
            rows = 1 + templates + self._count(gallery.records, f"kind == {COMMIT}")
            self._catalogue.remove(row)
            self._opened.pop(row.id, None)
            head = self._log.append(actor, "delete-gallery", name, templates=templates, rows=rows)
            covers = _covers(lambda: self._drop(row.id))
            return head.receipt(name, None, templates, rows, covers)

        return self._with(name, delete, "strong")

    def enrol(self, gallery: str, enrolments: Sequence[Enrolment], actor: str) -> Sequence[Enrolled | PkdError]:
        done: list[Enrolled | PkdError] = []
        for start in range(0, len(enrolments), BATCH):
            some = enrolments[start : start + BATCH]
            written = self._with(gallery, partial(write, enrolments=some))
            # They have taken place. Nothing that happens from here on may let the whole begin anew.
            finished = partial(finish, written=written)
            answers = self._with(gallery, finished, "strong" if written.row.moving_to else "bounded")
            for one, answer in zip(some, answers, strict=True):
                if isinstance(answer, Enrolled) and not answer.replayed:
                    subject = bytes.fromhex(self._open(written.row).cipher.subject(one.subject))
                    self._log.append(actor, one.action, gallery, subject=subject, templates=len(answer.templates))
            if written.withdrawn:
                self._log.append(actor, "expire", gallery, rows=written.withdrawn)  # so that a purge looks for them
            done += answers
        return done

    def replayed(self, gallery: str, enrolments: Sequence[Enrolment]) -> Sequence[Enrolled | PkdError | None]:
        return self._with(gallery, partial(replayed, enrolments=enrolments))

    def subject(self, gallery: str, subject: str, *, vectors: bool = False) -> Subject:
        def read(opened: MilvusGallery, row: GalleryRow) -> Subject:
            for found in opened.subjects(row, [opened.cipher.subject(subject)], vectors=vectors):
                return found
            raise unknown_subject(gallery, subject)

        return self._with(gallery, read)

    def subjects(self, gallery: str, *, after: str = "", limit: int = 100) -> Sequence[str]:
        """List ids after ``after``, in the order of their pseudonyms: Milvus knows no ids, so cannot sort them."""

        def page(opened: MilvusGallery, row: GalleryRow) -> Sequence[str]:
            found: list[str] = []
            start = opened.cipher.subject(after) if after else ""
            while len(found) < limit:  # those who are deleted meanwhile do not make a page the last one
                pseudonyms = opened.page(start, limit)
                found += [subject.id for subject in opened.subjects(row, pseudonyms, vectors=False)]
                if len(pseudonyms) < limit:
                    break
                start = pseudonyms[-1]
            return found[:limit]

        return self._with(gallery, page)

    def delete_subject(
        self, gallery: str, subject: str, actor: str, *, action: Action = "delete-subject"
    ) -> ReceiptAnswer:
        """Delete a subject's templates, and all else that is kept of them, also where a record does not decrypt."""

        def delete(opened: MilvusGallery, row: GalleryRow) -> ReceiptAnswer:
            pseudonym = opened.cipher.subject(subject)
            commits = opened.commit_keys([pseudonym], "strong")
            if not commits:
                raise unknown_subject(gallery, subject)
            removal = plan_removal(opened, row, commits)
            journal = remove(opened, removal)
            templates, rows = removal.count
            named = bytes.fromhex(pseudonym)
            head = self._log.append(actor, action, gallery, subject=named, templates=templates, rows=rows)

            def rest(opened: MilvusGallery, now: GalleryRow) -> None:
                if now.id == row.id:
                    finish_removal(opened, now, removal, journal)

            covers = _covers(lambda: self._with(gallery, rest))
            return head.receipt(gallery, subject, templates, rows, covers)

        return self._with(gallery, delete)

    def remove_templates(
        self, gallery: str, subject: str, templates: Sequence[str], actor: str, *, action: Action = "delete-templates"
    ) -> ReceiptAnswer:
        """Delete some templates of a subject, and the subject with the last of them.

        Those that were enrolled together with a deleted one get new ids, for a commit is never rewritten.
        """
        plan = self._with(gallery, partial(Reassignment.plan, subject=subject, templates=templates), "strong")
        if plan.last:
            return self.delete_subject(gallery, subject, actor, action=action)
        for one in self.enrol(gallery, plan.again, actor):
            if isinstance(one, PkdError):
                raise one
        commits = plan.commits

        def delete(opened: MilvusGallery, row: GalleryRow) -> ReceiptAnswer:
            removal = plan_removal(opened, row, commits)
            journal = remove(opened, removal)
            named, (_, rows) = bytes.fromhex(opened.cipher.subject(subject)), removal.count
            head = self._log.append(actor, action, gallery, subject=named, templates=plan.removed, rows=rows)
            covers = _covers(lambda: finish_removal(opened, row, removal, journal))
            return head.receipt(gallery, subject, plan.removed, rows, covers)

        return self._with(gallery, delete, "strong")

    def move(
        self, gallery: str, subject: str, into: str, actor: str, *, templates: Sequence[str] = (), new: bool = False
    ) -> MoveAnswer:
        found, there = self.subject(gallery, subject, vectors=True), True
        try:
            self.subject(gallery, into)
        except UnknownSubject:
            there = False
        chosen = choose_templates(gallery, found, templates)
        coming = move_enrolments(subject, into, chosen)
        begun = any(isinstance(one, Enrolled) for one in self.replayed(gallery, coming))
        check_move(gallery, subject, into, there=there, new=new and not begun)
        arrived: list[Enrolled] = []
        for one in self.enrol(gallery, coming, actor):
            if isinstance(one, PkdError):
                raise one
            arrived.append(one)
        receipt = self.remove_templates(gallery, subject, [one.id for one in chosen], actor, action="move-out")
        moved = [one for each in arrived for one in each.templates]
        return MoveAnswer(
            gallery=gallery, subject=subject, into=into, templates=moved, sequence=arrived[-1].sequence, receipt=receipt
        )

    def set_mapping(self, gallery: str, change: Callable[[MappingState], MappingState], actor: str) -> Gallery:
        """Change what a gallery remembers of its mapped templates, in one step.

        Raises GalleryConflict where somebody else does at this moment.
        """

        def set_row(opened: MilvusGallery, row: GalleryRow) -> None:
            after = change(row.mapping)
            if after != row.mapping:
                self._catalogue.require(row)
                self._catalogue.change(replace(row, mapping=after))
                self._log.append(actor, "set-mapping", gallery)

        self._with(gallery, set_row, "strong")
        return self.get(gallery)

    def note(self, gallery: str, action: Action, subject: str, actor: str) -> Head:
        return self._with(
            gallery,
            lambda opened, row: self._log.append(
                actor, action, gallery, subject=bytes.fromhex(opened.cipher.subject(subject))
            ),
        )

    def search(
        self, gallery: str, encoder: str, queries: Vectors, top_k: int, where: Attributes | None = None
    ) -> Sequence[SearchResult]:
        return self._with(gallery, lambda opened, row: search(opened, row, encoder, queries, top_k, where or {}))

    def begin_migration(self, gallery: str, space: Space, actor: str) -> Gallery:
        def begin(opened: MilvusGallery, row: GalleryRow) -> None:
            if begin_migration(self._catalogue, opened, row, space):
                self._log.append(actor, "begin-migration", gallery)

        self._with(gallery, begin, "strong")
        return self.get(gallery)

    def unmoved(self, gallery: str, *, after: str = "", limit: int = 100, back: bool = False) -> Sequence[str]:
        def page(opened: MilvusGallery, row: GalleryRow) -> Sequence[str]:
            start = opened.cipher.subject(after) if after else ""
            second = second_space(row)
            return opened.without(row, (row.space if back else second).id, start, limit, "bounded")

        return self._with(gallery, page)

    def end_migration(self, gallery: str, actor: str, *, abandon: bool = False) -> EndedMigration:
        return self._with(gallery, lambda opened, row: self._end_migration(opened, row, abandon, actor), "strong")

    def expire(self, now: float) -> int:
        """Delete what is past its time; returns how many templates. Sweeps what dead processes left, too."""
        total, encrypted = 0, 0
        before = time.time() - self._options.sweep_seconds
        rows = self._catalogue.rows("strong")
        for row in rows:
            try:
                total += self._expire(row, now, before)
            except NoCollection:  # deleted meanwhile
                continue
            except DecryptionError:  # others are looked after all the same; no log names it
                encrypted += 1
        if encrypted:
            logger.error("Expiry: the keys of %d galleries do not decrypt. Run pkd-gallery verify.", encrypted)
        for id in self._opened.keys() - {row.id for row in rows}:
            self._opened.pop(id, None)  # deleted by other processes: their keys go from memory, too
        sweep_collections(self._connection, self._catalogue, before)
        if time.monotonic() >= self._next_purge:
            self._next_purge = time.monotonic() + self._options.purge_seconds
            purge(self._connection, self._catalogue, self._log, self._options.stopped_seconds)
        return total

    def export(self, gallery: str) -> Iterator[Subject]:
        """Yield every subject with vectors, in the order of ``subjects``; each as of the moment it is read."""
        self._with(gallery, lambda opened, row: None)
        return self._export(gallery)

    def verify(self, noted: Head | None = None, progress: Progress = no_progress) -> Inspection:
        again = self._options.recheck_seconds
        return inspection.inspect(self._connection, self._catalogue, self._log, self._master, noted, progress, again)

    def audit_records(self, before: int | None = None, limit: int = 100) -> Sequence[Record]:
        """List records of this machine's audit log before that sequence, newest first."""
        return self._log.newest(before, limit)

    def verify_audit(self, noted: Head | None = None) -> Head:
        return self._log.verify(noted)

    def rekey(self, master: MasterKey) -> int:
        """Wrap every gallery's key with another master key; returns how many were. May be run again.

        Raises DecryptionError for a key that neither of the two decrypts.
        """
        count = self._catalogue.rekey(self._master, master)
        self._log.append("pkd-gallery", "rekey", "", rows=count)
        self._master = master
        return count

    def check(self) -> None:
        self._catalogue.check()
        self._log.check()

    def close(self) -> None:
        self._connection.close()
        self._log.close()

    def _with(self, name: str, do: Callable[[MilvusGallery, GalleryRow], T], consistency: Consistency = "bounded") -> T:
        """Do something with a gallery; once more from the start if a collection of it was dropped meanwhile."""
        levels: tuple[Consistency, ...] = (consistency, "strong")
        for level in levels:
            row = self._catalogue.row(name, level)
            try:
                with explained():
                    return do(self._open(row), row)
            except NoCollection:
                self._catalogue.forget(name)
        raise unknown_gallery(name)

    def _open(self, row: GalleryRow) -> MilvusGallery:
        opened = self._opened.get(row.id)
        if opened is None:
            key = self._master.gallery(row.name, row.wrapped_key)
            opened = self._opened.setdefault(row.id, MilvusGallery(self._connection, row.id, key))
        return opened

    def _describe(self, opened: MilvusGallery, row: GalleryRow) -> Gallery:
        templates, count = {}, self._connection.count
        for encoder, space in sorted(opened.encoders(row).items()):
            where = f'encoder == "{opened.cipher.hashed("encoder", encoder)}"'
            made = count(row.tables[space], where, "bounded")
            if made:
                templates[encoder] = made
        subjects = count(opened.records, f"kind == {SUBJECT}", "bounded")
        moved = count(opened.records, f"kind == {MOVED}", "bounded") if row.moving_to else 0
        return row.gallery(subjects, templates, moved)

    def _export(self, gallery: str) -> Iterator[Subject]:
        after = ""
        while True:
            pseudonyms, subjects = self._with(gallery, partial(_page, after=after))
            yield from subjects
            if len(pseudonyms) < EXPORTED:
                return
            after = pseudonyms[-1]

    def _count(self, table: str, where: str) -> int:
        try:
            return self._connection.count(table, where, "strong")
        except NoCollection:  # somebody dropped it: what is left of the gallery can still be deleted
            return 0

    def _end_migration(self, opened: MilvusGallery, row: GalleryRow, abandon: bool, actor: str) -> EndedMigration:
        def record(templates: int, rows: int) -> Head:
            return self._log.append(actor, "end-migration", row.name, templates=templates, rows=rows)

        remains = end_migration(self._catalogue, opened, row, abandon, record)
        covers = _covers(lambda: remains.clear(opened))
        head, templates, rows = remains.head, remains.templates, remains.rows
        return EndedMigration(templates, head.receipt(row.name, None, templates, rows, covers))

    def _expire(self, row: GalleryRow, now: float, before: float) -> int:
        opened, total = self._open(row), 0
        for removal in expire(opened, row, now):
            templates, rows = removal.count
            self._log.append("retention", "expire", row.name, templates=templates, rows=rows)
            total += templates
        if swept := sweep(opened, row, before):
            self._log.append("retention", "expire", row.name, rows=swept)  # so that a purge looks for them
        if row.ending and row.ending.since < before:  # whoever was ending it has died, as far as time tells
            with contextlib.suppress(ServingError):
                self._end_migration(opened, row, row.ending.abandon, "retention")
        return total

    def _drop(self, id: str) -> None:
        for name in self._connection.names():
            if name.startswith(f"{self._connection.prefix}_{id}_"):
                self._connection.drop(name)


def _page(opened: MilvusGallery, row: GalleryRow, after: str) -> tuple[Sequence[str], Sequence[Subject]]:
    pseudonyms = opened.page(after, EXPORTED)
    return pseudonyms, list(opened.subjects(row, pseudonyms, vectors=True))


def _covers(finish: Callable[[], object]) -> tuple[str, ...]:
    """Do the rest of a deletion that is decided and on record; return what the receipt may claim."""
    try:
        finish()
    except (ServingError, NoCollection) as error:
        logger.warning("Milvus: the rest of a deletion is left to the next sweep (%s).", type(error).__name__)
        return UNFINISHED
    return COVERS
