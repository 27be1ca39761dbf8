"""Whether galleries in Milvus are whole: audit chain, keys, every record, every template, and that searches find them.

Milvus has no moment of which all could be read. So a subject who does not fit is looked at again a little later, and
something is wrong only if it stays so while no journal says that somebody is changing them.
"""

from __future__ import annotations

import time
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import TypeVar

import numpy as np

from pkd.serving.galleries.audit import Head
from pkd.serving.galleries.audit_file import AuditFile
from pkd.serving.galleries.crypto import MasterKey, Sealed
from pkd.serving.galleries.inspection import Inspection
from pkd.serving.galleries.milvus.catalogue import Catalogue
from pkd.serving.galleries.milvus.client import NoTable, Row, Tables
from pkd.serving.galleries.milvus.collection import MilvusGallery
from pkd.serving.galleries.milvus.records import COMMIT, JOURNAL, PSEUDONYM, Commit, Entry, among, current, fingerprint
from pkd.toolkit.core.errors import NotTrusted

SUBJECTS = 1_000
"""Looked at together."""
AGAIN_SECONDS = 2.0
"""After which what did not fit is looked at again."""
COLUMNS = ["id", "subject", "key", "expires", "data"]
FOUND = 1 - 1e-4
"""The least score of a template by its own vector."""

T = TypeVar("T")


def count_templates(tables: Tables) -> int:
    """How many there are to look at."""
    entries = Catalogue(tables).entries("ALL")
    return sum(tables.count(table, 'id > ""', "SEEN") for entry in entries for table in entry.tables.values())


def inspect(
    tables: Tables,
    log: AuditFile,
    master: MasterKey,
    noted: Head | None = None,
    step: Callable[[int], None] = lambda done: None,
) -> Inspection:
    """Look at everything. ``noted``: a head of the audit log that was kept outside."""
    found = Inspection(log.head())
    try:
        log.verify(noted)
    except NotTrusted as error:
        found.wrong.append(str(error))
    for entry in sorted(Catalogue(tables).entries("ALL"), key=lambda entry: entry.name):
        found.galleries += 1
        try:
            key = master.gallery(entry.name, b64decode(entry.wrapped))
            gallery = _Gallery(MilvusGallery(tables, entry.id, key), entry)
            found.wrong += [f"gallery {entry.name}{line}" for line in gallery.look(step)]
        except Sealed as error:
            found.wrong.append(str(error))
            continue
        except NoTable as error:
            found.wrong.append(f"gallery {entry.name}: collection {error} is not there.")
            continue
        found.subjects, found.templates = found.subjects + gallery.subjects, found.templates + gallery.templates
    return found


class _Gallery:
    """One gallery, and what was counted of it."""

    def __init__(self, gallery: MilvusGallery, entry: Entry) -> None:
        self._gallery, self._entry, self._tables = gallery, entry, gallery.tables
        self.subjects = self.templates = 0

    def look(self, step: Callable[[int], None]) -> list[str]:
        """At every record and template; what is wrong, to be read after the gallery's name."""
        doubtful: list[str] = []
        for some in _batches(self._by_subject(), SUBJECTS):
            before = self.templates
            doubtful += self._judge(dict(some))
            step(self.templates - before)
        for table in self._entry.tables.values():
            for rows in _batches(self._tables.pages(table, 'id > ""', ["id", "subject"], "ALL"), SUBJECTS):
                pseudonyms = {row["subject"] for row in rows}
                where = f"kind == {COMMIT} and {among('subject', pseudonyms)}"
                known = self._tables.pages(self._gallery.records, where, ["id", "subject"], "ALL")
                doubtful += pseudonyms - {row["subject"] for row in known}
        return self._again(sorted(set(doubtful))) if doubtful else []

    def _by_subject(self) -> Iterator[tuple[str, list[Row]]]:
        """Pseudonym and commits. By the key, which a commit is sealed with; the column of subjects could be changed."""
        rows = self._tables.pages(self._gallery.records, f"kind == {COMMIT}", COLUMNS, "ALL")
        for pseudonym, of_subject in groupby(rows, lambda row: str(row["id"])[:PSEUDONYM]):
            self.subjects += 1
            yield pseudonym, list(of_subject)

    def _again(self, doubtful: Sequence[str]) -> list[str]:
        """What is still wrong of them a little later, and not being changed."""
        time.sleep(AGAIN_SECONDS)
        counted = self.subjects, self.templates
        changing: set[str] = set()
        lines: list[str] = []
        for row in self._tables.pages(self._gallery.records, f"kind == {JOURNAL}", ["id", "data"], "ALL"):
            changing.update(self._gallery.seal.open(row)[0])
        for some in _batches((pseudonym for pseudonym in doubtful if pseudonym not in changing), SUBJECTS):
            rows = {
                pseudonym: self._tables.query(
                    self._gallery.records,
                    f'kind == {COMMIT} and id > "{pseudonym}" and id < "{pseudonym}~"',
                    COLUMNS,
                    "ALL",
                )
                for pseudonym in some
            }
            lines += [line for found in self._judge(rows).values() for line in found]
        self.subjects, self.templates = counted
        return lines

    def _judge(self, rows: Mapping[str, Sequence[Row]]) -> dict[str, list[str]]:
        """Pseudonym → what is wrong, of those where something is."""
        stored: dict[str, dict[str, Row]] = {pseudonym: {} for pseudonym in rows}
        for id, row in self._gallery.stored(self._entry, rows, "encoder", "tags", "vector", fresh="ALL").items():
            stored[row["subject"]][id] = row
        self.templates += sum(len(of_subject) for of_subject in stored.values())
        # Who has moved is noted until a migration has ended to the end.
        whats = ("subject",) if self._entry.ending else ("subject", "moved")
        notes = [f"~{what}/{pseudonym}" for what in whats for pseudonym in rows]
        noted = {row["id"] for row in self._tables.query(self._gallery.records, among("id", notes), ["id"], "ALL")}
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
        seal, commits = self._gallery.seal, []
        for row in rows:
            try:
                commit = Commit(**seal.open(row))
            except Sealed:
                said.append(f", enrolment {row['id'][PSEUDONYM:]}: its record does not decrypt: changed, or moved.")
                continue
            commits.append(commit)
            written = seal.commit(commit)
            for column in ("subject", "key", "expires"):
                if row[column] != written[column]:
                    said.append(f", subject {commit.subject}: the {column} beside a record is not the one within.")
        if len(commits) < len(rows):  # what it says of templates is not known
            return said
        name = f", subject {commits[0].subject}" if commits else f", pseudonym {pseudonym}"
        tags = seal.tags(current(commits)[0])
        left = dict(stored)
        there: set[str] = set()
        for commit in commits:
            for number, id in enumerate(commit.template_ids):
                encoder, space = commit.templates[number]
                if space not in self._entry.tables:  # a migration has ended
                    continue
                kept = left.pop(id, None)
                if kept is None:
                    if commit.expires is None or commit.expires > time.time():
                        said.append(f"{name}: template {id} is missing.")
                    continue
                there.add(f"~subject/{pseudonym}")
                if self._entry.moving_to and space == self._entry.moving_to.id:
                    there.add(f"~moved/{pseudonym}")
                if kept["space"] != space or kept["encoder"] != seal.hashed("encoder", encoder):
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
        (hits,) = self._tables.search(
            self._entry.tables[row["space"]], vector[None], f'encoder == "{row["encoder"]}"', ["subject"], 1
        )
        if not hits or hits[0]["score"] < FOUND * float(vector @ vector):
            yield f": a search does not find template {row['id']} by its own vector."


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(items)
    while some := list(islice(left, size)):
        yield some
