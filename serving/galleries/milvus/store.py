"""MilvusStore: galleries in Milvus, for several server machines and for more templates than one memory holds.

Each gallery has its own collections, so that deleting it is dropping them; one collection more lists the galleries.
What may happen because Milvus has no transactions, and what it learns of the people in it: docs/milvus.md.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from pkd.serving.core.errors import GalleryConflict, ServingError, UnknownSubject
from pkd.serving.galleries.audit import Head
from pkd.serving.galleries.audit_file import AuditFile
from pkd.serving.galleries.crypto import MasterKey, Sealed
from pkd.serving.galleries.database import explained
from pkd.serving.galleries.milvus.catalogue import Catalogue
from pkd.serving.galleries.milvus.client import Freshness, NoTable, Tables
from pkd.serving.galleries.milvus.collection import SWEEP_SECONDS, MilvusGallery, records_of
from pkd.serving.galleries.milvus.enrolment import answered, finish, write
from pkd.serving.galleries.milvus.migration import begin, clear, end, interrupted, new_id, second
from pkd.serving.galleries.milvus.purge import purge
from pkd.serving.galleries.milvus.records import COMMIT, INDEXED, MOVED, RECORDS, SUBJECT, TEMPLATES, Entry
from pkd.serving.galleries.milvus.retention import expire, sweep, sweep_collections
from pkd.serving.galleries.milvus.search import search
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

BATCH = 256
"""Enrolments written in one step."""
PURGE_SECONDS, FIRST_PURGE_SECONDS = 6 * 3600.0, 600.0
"""How often, and how soon after the start, it is looked at whether deleted rows have left Milvus' files."""
EXPORTED = 200
"""Subjects read at a time by an export."""
ATTEMPTS = 5
COVERS = ("rows", "index")
"""What a receipt may claim: nothing answers by it any more. When files follow, the audit log says: milvus_purge.py."""
UNFINISHED = ("index",)
"""What it may claim where Milvus failed halfway: nobody is found, and a sweep deletes the rows."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


class MilvusStore:
    """A GalleryStore on Milvus 2.3 or newer. Blocking and thread-safe; one a process, any number of machines.

    ``log``: of what *this machine's* processes changed; Milvus cannot keep a chain. The store closes it.
    """

    def __init__(self, tables: Tables, log: AuditFile, master: MasterKey) -> None:
        self._tables, self._log, self._master = tables, log, master
        self._catalogue = Catalogue(tables)
        self._opened: dict[str, MilvusGallery] = {}
        self._next_purge = time.monotonic() + FIRST_PURGE_SECONDS

    def create(self, name: str, space: Space, retention: float | None, actor: str) -> Gallery:
        """Create, or return what is there if it has this very space; else a gallery-conflict."""
        for _ in range(ATTEMPTS):
            found = self._catalogue.find(name, "ALL")
            if found:
                if found.space != space:
                    raise GalleryConflict(
                        f"gallery {name} exists with space {found.space.id}. Use another name, or migrate it.",
                        details={"expected": found.space.id, "got": space.id},
                    )
                return self.get(name)
            _, wrapped = self._master.new_gallery(name)
            id, table = new_id(), new_id()
            entry = Entry(id, name, space, None, time.time(), retention, b64encode(wrapped).decode(), {})
            entry = replace(entry, tables={space.id: f"{self._tables.prefix}_{id}_{table}"})
            with ThreadPoolExecutor(2) as both:  # Milvus takes over a second to load a collection
                records = both.submit(self._tables.create, records_of(self._tables, id), RECORDS, 0, INDEXED)
                self._tables.create(entry.tables[space.id], TEMPLATES, space.dim)
                records.result()
            if self._catalogue.add(entry):
                self._log.append(actor, "create", name)
                return self.get(name)
            self._drop(entry.id)
            time.sleep(random.random())
        raise GalleryConflict(f"gallery {name} is being created by others at this moment. Try again.")

    def get(self, name: str) -> Gallery:
        """One gallery."""
        return self._with(name, self._describe)

    def list(self) -> Sequence[Gallery]:
        """All, by name."""
        described = []
        for entry in sorted(self._catalogue.entries("SEEN"), key=lambda entry: entry.name):
            with contextlib.suppress(NoTable), explained():  # deleted meanwhile
                described.append(self._describe(self._open(entry), entry))
        return described

    def delete(self, name: str, actor: str) -> Receipt:
        """Delete a gallery with all that is in it, and its key."""

        def delete(gallery: MilvusGallery, entry: Entry) -> Receipt:
            templates = sum(self._count(table, 'id > ""') for table in entry.tables.values())
            rows = 1 + templates + self._count(gallery.records, f"kind == {COMMIT}")
            self._catalogue.remove(entry)
            self._opened.pop(entry.id, None)
            head = self._log.append(actor, "delete-gallery", name, templates=templates, rows=rows)
            covers = _covers(lambda: self._drop(entry.id))
            return Receipt(name, None, templates, rows, covers, head.sequence, head.hash)

        return self._with(name, delete, "ALL")

    def enrol(self, gallery: str, enrolments: Sequence[Enrolment], actor: str) -> Sequence[Enrolled | PkdError]:
        """Enrol many subjects; an error in the place of each that was refused."""
        done: list[Enrolled | PkdError] = []
        for start in range(0, len(enrolments), BATCH):
            some = enrolments[start : start + BATCH]
            written = self._with(gallery, partial(write, enrolments=some))
            # They have taken place. Nothing that happens from here on may let the whole begin anew.
            finished = partial(finish, written=written)
            answers = self._with(gallery, finished, "ALL" if written.entry.moving_to else "SEEN")
            for one, answer in zip(some, answers, strict=True):
                if isinstance(answer, Enrolled) and not answer.replayed:
                    subject = bytes.fromhex(self._open(written.entry).seal.subject(one.subject))
                    self._log.append(actor, "enrol", gallery, subject=subject, templates=len(answer.templates))
            if written.withdrawn:
                self._log.append(actor, "expire", gallery, rows=written.withdrawn)  # so that a purge looks for them
            done += answers
        return done

    def answered(self, gallery: str, enrolments: Sequence[Enrolment]) -> Sequence[Enrolled | PkdError | None]:
        """What ``enrol`` would say to idempotency keys used before, None for others."""
        return self._with(gallery, partial(answered, enrolments=enrolments))

    def subject(self, gallery: str, subject: str, *, vectors: bool = False) -> Subject:
        """One subject, with their vectors where asked for."""

        def read(opened: MilvusGallery, entry: Entry) -> Subject:
            for found in opened.subjects(entry, [opened.seal.subject(subject)], vectors=vectors):
                return found
            raise UnknownSubject(f"Gallery {gallery} has no subject {subject}.")

        return self._with(gallery, read)

    def subjects(self, gallery: str, *, after: str = "", limit: int = 100) -> Sequence[str]:
        """Ids after ``after``, in the order of their pseudonyms: Milvus does not know them, so cannot sort them."""

        def page(opened: MilvusGallery, entry: Entry) -> Sequence[str]:
            found: list[str] = []
            start = opened.seal.subject(after) if after else ""
            while len(found) < limit:  # those who are deleted meanwhile do not make a page the last one
                pseudonyms = opened.page(start, limit)
                found += [subject.id for subject in opened.subjects(entry, pseudonyms, vectors=False)]
                if len(pseudonyms) < limit:
                    break
                start = pseudonyms[-1]
            return found[:limit]

        return self._with(gallery, page)

    def delete_subject(self, gallery: str, subject: str, actor: str) -> Receipt:
        """Delete a subject's templates, and all else that is kept of them, also where a record does not decrypt."""

        def delete(opened: MilvusGallery, entry: Entry) -> Receipt:
            pseudonym = opened.seal.subject(subject)
            commits = opened.commit_rows([pseudonym], "ALL")
            if not commits:
                raise UnknownSubject(f"Gallery {gallery} has no subject {subject}.")
            removal = opened.removal(entry, commits)
            journal = opened.remove_commits(removal)
            templates, rows = removal.count
            named = bytes.fromhex(pseudonym)
            head = self._log.append(actor, "delete-subject", gallery, subject=named, templates=templates, rows=rows)

            def rest(opened: MilvusGallery, now: Entry) -> None:
                if now.id == entry.id:
                    opened.remove_rest(now, removal, journal)

            covers = _covers(lambda: self._with(gallery, rest))
            return Receipt(gallery, subject, templates, rows, covers, head.sequence, head.hash)

        return self._with(gallery, delete)

    def search(
        self, gallery: str, encoder: str, queries: Vectors, top_k: int, where: Attributes | None = None
    ) -> Sequence[Found]:
        """For each of the unit rows Q×D the nearest subjects among templates of ``encoder``, exactly."""
        return self._with(gallery, lambda opened, entry: search(opened, entry, encoder, queries, top_k, where or {}))

    def begin_migration(self, gallery: str, space: Space, actor: str) -> Gallery:
        """Take templates of a second space, too. The same space again is no error: a migration is resumable."""

        def start(opened: MilvusGallery, entry: Entry) -> None:
            if begin(self._catalogue, opened, entry, space):
                self._log.append(actor, "begin-migration", gallery)

        self._with(gallery, start, "ALL")
        return self.get(gallery)

    def unmoved(self, gallery: str, *, after: str = "", limit: int = 100, back: bool = False) -> Sequence[str]:
        """Subjects without a template in the second space, or with ``back`` in the first: a page, as ``subjects``."""

        def page(opened: MilvusGallery, entry: Entry) -> Sequence[str]:
            start = opened.seal.subject(after) if after else ""
            there = second(entry)
            return opened.without(entry, (entry.space if back else there).id, start, limit, "SEEN")

        return self._with(gallery, page)

    def end_migration(self, gallery: str, actor: str, *, abandon: bool = False) -> Moved:
        """Keep the second space alone and delete the first one's templates; with ``abandon`` the other way round.

        A gallery-conflict while a subject would be left without a template.
        """
        return self._with(gallery, lambda opened, entry: self._end(opened, entry, abandon, actor), "ALL")

    def expire(self, now: float) -> int:
        """Delete what is past its time; returns how many templates. Sweeps what dead processes left, too."""
        total, sealed = 0, 0
        entries = self._catalogue.entries("ALL")
        for entry in entries:
            try:
                total += self._expire(entry, now)
            except NoTable:  # deleted meanwhile
                continue
            except Sealed:  # others are looked after all the same; no log names it
                sealed += 1
        if sealed:
            logger.error("Expiry: the keys of %d galleries do not decrypt. Run pkd-gallery verify.", sealed)
        for id in self._opened.keys() - {entry.id for entry in entries}:
            self._opened.pop(id, None)  # deleted by other processes: their keys go from memory, too
        sweep_collections(self._tables, self._catalogue)
        if time.monotonic() >= self._next_purge:
            self._next_purge = time.monotonic() + PURGE_SECONDS
            purge(self._tables, self._catalogue, self._log)
        return total

    def export(self, gallery: str) -> Iterator[Subject]:
        """Every subject with vectors, in the order of ``subjects``; each as of the moment it is read."""
        self._with(gallery, lambda opened, entry: None)
        return self._export(gallery)

    def check(self) -> None:
        """Raise StoreUnavailable unless the store can read and write right now."""
        self._catalogue.check()
        self._log.check()

    def close(self) -> None:
        """Let go of files and connections."""
        self._tables.close()
        self._log.close()

    def _with(self, name: str, do: Callable[[MilvusGallery, Entry], T], fresh: Freshness = "SEEN") -> T:
        """Do something with a gallery; once more from the start if a collection of it was dropped meanwhile."""
        for attempt in (fresh, "ALL"):
            entry = self._catalogue.entry(name, "ALL" if attempt == "ALL" else "SEEN")
            try:
                with explained():
                    return do(self._open(entry), entry)
            except NoTable:
                self._catalogue.forget(name)
        raise unknown_gallery(name)

    def _open(self, entry: Entry) -> MilvusGallery:
        opened = self._opened.get(entry.id)
        if opened is None:
            key = self._master.gallery(entry.name, b64decode(entry.wrapped))
            opened = self._opened.setdefault(entry.id, MilvusGallery(self._tables, entry.id, key))
        return opened

    def _describe(self, opened: MilvusGallery, entry: Entry) -> Gallery:
        templates = {}
        for encoder, space in sorted(opened.encoders(entry).items()):
            where = f'encoder == "{opened.seal.hashed("encoder", encoder)}"'
            count = self._tables.count(entry.tables[space], where, "SEEN")
            if count:
                templates[encoder] = count
        subjects = self._tables.count(opened.records, f"kind == {SUBJECT}", "SEEN")
        moved = self._tables.count(opened.records, f"kind == {MOVED}", "SEEN") if entry.moving_to else 0
        return entry.gallery(subjects, templates, moved)

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
            return self._tables.count(table, where, "ALL")
        except NoTable:  # somebody dropped it: what is left of the gallery can still be deleted
            return 0

    def _end(self, opened: MilvusGallery, entry: Entry, abandon: bool, actor: str) -> Moved:
        def log(templates: int, rows: int) -> Head:
            return self._log.append(actor, "end-migration", entry.name, templates=templates, rows=rows)

        ended = end(self._catalogue, opened, entry, abandon, log)
        covers = _covers(lambda: clear(opened, ended))
        sequence, hash = ended.head.sequence, ended.head.hash
        return Moved(ended.templates, Receipt(entry.name, None, ended.templates, ended.rows, covers, sequence, hash))

    def _expire(self, entry: Entry, now: float) -> int:
        opened, total = self._open(entry), 0
        for removal in expire(opened, entry, now):
            templates, rows = removal.count
            self._log.append("retention", "expire", entry.name, templates=templates, rows=rows)
            total += templates
        if rows := sweep(opened, entry, time.time() - SWEEP_SECONDS):
            self._log.append("retention", "expire", entry.name, rows=rows)  # so that a purge looks for them
        if entry.ending and interrupted(entry):
            with contextlib.suppress(ServingError):
                self._end(opened, entry, entry.ending.abandon, "retention")
        return total

    def _drop(self, entry_id: str) -> None:
        for name in self._tables.names():
            if name.startswith(f"{self._tables.prefix}_{entry_id}_"):
                self._tables.drop(name)


def _page(opened: MilvusGallery, entry: Entry, after: str) -> tuple[Sequence[str], Sequence[Subject]]:
    pseudonyms = opened.page(after, EXPORTED)
    return pseudonyms, list(opened.subjects(entry, pseudonyms, vectors=True))


def _covers(finish: Callable[[], object]) -> tuple[str, ...]:
    """Do the rest of a deletion that is decided and on record; what the receipt may claim."""
    try:
        finish()
    except (ServingError, NoTable) as error:
        logger.warning("Milvus: the rest of a deletion is left to the next sweep (%s).", type(error).__name__)
        return UNFINISHED
    return COVERS
