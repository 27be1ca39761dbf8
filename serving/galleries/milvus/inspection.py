"""Verification in Milvus: it reads audit chain, keys, every record and template, and tries that searches find them.

Milvus has no moment of which all could be read. So a subject who does not fit is looked at again a little later, and
something is wrong only if it stays so while no journal says that somebody is changing them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import TypeVar

import numpy as np

from pkd.serving.galleries.audit import AuditFile, Head
from pkd.serving.galleries.crypto import DecryptionError, MasterKey
from pkd.serving.galleries.milvus.catalogue import Catalogue
from pkd.serving.galleries.milvus.client import MilvusConnection, NoCollection, Row
from pkd.serving.galleries.milvus.gallery import MilvusGallery
from pkd.serving.galleries.milvus.records import (
    COMMIT,
    JOURNAL,
    PSEUDONYM,
    Commit,
    GalleryRow,
    among,
    current,
    fingerprint,
)
from pkd.serving.galleries.store import Inspection
from pkd.toolkit.core.errors import NotTrusted
from pkd.toolkit.core.progress import Progress

SUBJECTS = 1_000
"""Subjects that are looked at together."""
FIELDS = ["id", "subject", "key", "expires", "data"]
FOUND = 1 - 1e-4
"""The least score of a template by its own vector."""

T = TypeVar("T")


def inspect(
    connection: MilvusConnection,
    catalogue: Catalogue,
    log: AuditFile,
    master: MasterKey,
    noted: Head | None,
    progress: Progress,
    recheck_seconds: float,
) -> Inspection:
    """Look at everything, as GalleryStore.verify; what does not fit, again after ``recheck_seconds``."""
    found = Inspection(log.head())
    try:
        log.verify(noted)
    except NotTrusted as error:
        found.wrong.append(str(error))
    rows = sorted(catalogue.rows("strong"), key=lambda row: row.name)
    with progress("looking", _count(connection, rows)) as advance:
        for row in rows:
            found.galleries += 1
            try:
                key = master.gallery(row.name, row.wrapped_key)
                gallery = _Gallery(MilvusGallery(connection, row.id, key), row, recheck_seconds)
                found.wrong += [f"gallery {row.name}{line}" for line in gallery.look(advance)]
            except DecryptionError as error:
                found.wrong.append(str(error))
                continue
            except NoCollection as error:
                found.wrong.append(f"gallery {row.name}: collection {error} is not there.")
                continue
            found.subjects, found.templates = found.subjects + gallery.subjects, found.templates + gallery.templates
    return found


def _count(connection: MilvusConnection, rows: Iterable[GalleryRow]) -> int | None:
    """Count the templates that there are to look at; None where a collection is gone, which is named later."""
    try:
        return sum(connection.count(table, 'id > ""', "bounded") for row in rows for table in row.tables.values())
    except NoCollection:
        return None


class _Gallery:
    """Look at one gallery, and count what is there."""

    def __init__(self, gallery: MilvusGallery, row: GalleryRow, recheck_seconds: float) -> None:
        self._gallery, self._row, self._connection = gallery, row, gallery.connection
        self._recheck_seconds = recheck_seconds
        self.subjects = self.templates = 0

    def look(self, advance: Callable[[int], None]) -> list[str]:
        """Look at every record and template; return what is wrong, to be read after the gallery's name."""
        doubtful: list[str] = []
        for some in _batches(self._by_subject(), SUBJECTS):
            before = self.templates
            doubtful += self._judge(dict(some))
            advance(self.templates - before)
        for table in self._row.tables.values():
            for rows in _batches(self._connection.pages(table, 'id > ""', ["id", "subject"], "strong"), SUBJECTS):
                pseudonyms = {row["subject"] for row in rows}
                where = f"kind == {COMMIT} and {among('subject', pseudonyms)}"
                known = self._connection.pages(self._gallery.records, where, ["id", "subject"], "strong")
                doubtful += pseudonyms - {row["subject"] for row in known}
        return self._again(sorted(set(doubtful))) if doubtful else []

    def _by_subject(self) -> Iterator[tuple[str, list[Row]]]:
        """Yield pseudonyms with their commits, by the key that a commit is bound to; columns could be changed."""
        rows = self._connection.pages(self._gallery.records, f"kind == {COMMIT}", FIELDS, "strong")
        for pseudonym, of_subject in groupby(rows, lambda row: str(row["id"])[:PSEUDONYM]):
            self.subjects += 1
            yield pseudonym, list(of_subject)

    def _again(self, doubtful: Sequence[str]) -> list[str]:
        """Return what is still wrong with them a little later, and not being changed."""
        time.sleep(self._recheck_seconds)
        counted = self.subjects, self.templates
        changing: set[str] = set()
        lines: list[str] = []
        for row in self._connection.pages(self._gallery.records, f"kind == {JOURNAL}", ["id", "data"], "strong"):
            changing.update(self._gallery.cipher.decrypt(row)[0])
        for some in _batches((pseudonym for pseudonym in doubtful if pseudonym not in changing), SUBJECTS):
            rows = {
                pseudonym: self._connection.query(
                    self._gallery.records,
                    f'kind == {COMMIT} and id > "{pseudonym}" and id < "{pseudonym}~"',
                    FIELDS,
                    "strong",
                )
                for pseudonym in some
            }
            lines += [line for found in self._judge(rows).values() for line in found]
        self.subjects, self.templates = counted
        return lines

    def _judge(self, rows: Mapping[str, Sequence[Row]]) -> dict[str, list[str]]:
        """Map pseudonyms to what is wrong with them, where something is."""
        stored: dict[str, dict[str, Row]] = {pseudonym: {} for pseudonym in rows}
        for id, row in self._gallery.stored(self._row, rows, "encoder", "tags", "vector", consistency="strong").items():
            stored[row["subject"]][id] = row
        self.templates += sum(len(of_subject) for of_subject in stored.values())
        # Who has moved is noted until a migration has ended to the end.
        whats = ("subject",) if self._row.ending else ("subject", "moved")
        notes = [f"~{what}/{pseudonym}" for what in whats for pseudonym in rows]
        noted = {
            row["id"] for row in self._connection.query(self._gallery.records, among("id", notes), ["id"], "strong")
        }
        wrong = {
            pseudonym: self._subject(pseudonym, commits, stored[pseudonym], noted)
            for pseudonym, commits in rows.items()
        }
        for pseudonym, of_subject in stored.items():
            if of_subject:  # one of this lot stands for what Milvus has loaded
                wrong[pseudonym] += self._search(next(iter(of_subject.values())))
                break
        return {pseudonym: lines for pseudonym, lines in wrong.items() if lines}

    def _subject(self, pseudonym: str, rows: Sequence[Row], stored: Mapping[str, Row], noted: set[str]) -> list[str]:
        said: list[str] = []
        cipher, commits = self._gallery.cipher, []
        for row in rows:
            try:
                commit = Commit(**cipher.decrypt(row))
            except DecryptionError:
                said.append(f", enrolment {row['id'][PSEUDONYM:]}: its record does not decrypt: changed, or moved.")
                continue
            commits.append(commit)
            written = cipher.commit(commit)
            for column in ("subject", "key", "expires"):
                if row[column] != written[column]:
                    said.append(f", subject {commit.subject}: the {column} beside a record is not the one within.")
        if len(commits) < len(rows):  # what it says of templates is not known
            return said
        name = f", subject {commits[0].subject}" if commits else f", pseudonym {pseudonym}"
        tags = cipher.tags(current(commits)[0])
        left = dict(stored)
        there: set[str] = set()
        for commit in commits:
            for number, id in enumerate(commit.template_ids):
                encoder, space = commit.templates[number]
                if space not in self._row.tables:  # a migration has ended
                    continue
                kept = left.pop(id, None)
                if kept is None:
                    if commit.expires is None or commit.expires > time.time():
                        said.append(f"{name}: template {id} is missing.")
                    continue
                there.add(f"~subject/{pseudonym}")
                if self._row.moving_to and space == self._row.moving_to.id:
                    there.add(f"~moved/{pseudonym}")
                if kept["space"] != space or kept["encoder"] != cipher.hashed("encoder", encoder):
                    said.append(f"{name}: template {id} is not beside the encoder that it was enrolled with.")
                if kept["tags"] != tags:
                    said.append(f"{name}: template {id} is not found by the subject's attributes.")
                if fingerprint(np.asarray(kept["vector"], np.float32)) != commit.fingerprints[number]:
                    said.append(f"{name}: template {id} has another vector than was enrolled.")
        for id in left:
            said.append(f"{name}: template {id} belongs to no enrolment.")
        if not said and there != {id for id in noted if id.endswith(pseudonym)}:
            said.append(f"{name}: is counted wrongly among the subjects, or among those who have moved.")
        return said

    def _search(self, row: Row) -> Iterator[str]:
        vector = np.asarray(row["vector"], np.float32)
        (hits,) = self._connection.search(
            self._row.tables[row["space"]], vector[None], f'encoder == "{row["encoder"]}"', ["subject"], 1
        )
        if not hits or hits[0]["score"] < FOUND * float(vector @ vector):
            yield f": a search does not find template {row['id']} by its own vector."


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(items)
    while some := list(islice(left, size)):
        yield some
