"""MilvusGallery: the subjects of one gallery in Milvus, and how they change without transactions.

Milvus writes one row at a time. So one row decides: templates go first and count for nothing until their *commit* row
is there; a deletion takes the commit first. Each change notes itself in a *journal* row before its first step and
crosses that out after its last: what a process that died left behind is found by its journal and swept. Commits are
never rewritten, so two processes that change the same subject cannot undo each other. After its last step a change
looks at its subjects once more and puts right what is derived from their commits (``settle``); of two changes at the
same time at least the later one sees both.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pkd.serving.core.errors import StoreUnavailable
from pkd.serving.galleries.crypto import GalleryKey
from pkd.serving.galleries.milvus.client import PAGE, Freshness, Row, Tables
from pkd.serving.galleries.milvus.records import (
    COMMIT,
    ENCODER,
    JOURNAL,
    MOVED,
    PSEUDONYM,
    SUBJECT,
    Commit,
    Entry,
    Seal,
    among,
    current,
    fingerprint,
)
from pkd.serving.galleries.milvus.rotation import Rotation
from pkd.serving.galleries.store import Enrolment, Subject, Template
from pkd.serving.galleries.templates import unit_rows

SWEEP_SECONDS = 3600.0
"""How old a journal must be to be swept: its process is taken for dead."""
MOST_SECONDS = SWEEP_SECONDS / 2
"""How long an enrolment may take until its commit; it is given up after that, before anyone sweeps it."""

FRESHER: tuple[Freshness, ...] = ("SEEN", "ALL")

Commits = dict[str, list[Commit]]
"""Pseudonym of a subject → their commits."""


@dataclass(frozen=True)
class Removal:
    """What is to be deleted."""

    pseudonyms: Sequence[str]
    commits: Sequence[str]
    """Their rows' keys."""
    templates: Mapping[str, Sequence[str]]
    """Collection → ids."""
    derived: int
    """Rows that go beside these."""

    @property
    def count(self) -> tuple[int, int]:
        """How many templates, how many rows in all."""
        templates = sum(len(ids) for ids in self.templates.values())
        return templates, templates + len(self.commits) + self.derived


class MilvusGallery:
    """One gallery's collections, key and rotations. Safe to use from several threads."""

    def __init__(self, tables: Tables, id: str, key: GalleryKey) -> None:
        self.tables, self.seal, self._key = tables, Seal(key), key
        self.records = records_of(tables, id)
        self._rotations: dict[tuple[str, int], Rotation] = {}
        self._encoders: dict[str, str] = {}

    def rotation(self, space: str, dim: int) -> Rotation:
        """Of one space's vectors, made when first needed."""
        if (space, dim) not in self._rotations:
            self._rotations[space, dim] = Rotation(self._key.derive(f"milvus rotation {space}"), dim)
        return self._rotations[space, dim]

    def encoders(self, entry: Entry, known: str = "") -> dict[str, str]:
        """Encoder → space, of all that this gallery's spaces ever had. Read anew unless ``known`` is among them.

        Raises Sealed only where the record of ``known`` does not open: others can still be searched.
        """
        if self._encoders.get(known) not in entry.tables:
            rows = list(self.tables.pages(self.records, f"kind == {ENCODER}", ["id", "data"], "SEEN"))
            self._encoders = dict(data for _, data in self.seal.opened(rows))
            if known and known not in self._encoders:
                for row in rows:
                    self.seal.open(row) if row["id"] == self.seal.encoder_id(known) else None
        return {encoder: space for encoder, space in self._encoders.items() if space in entry.tables}

    def register(self, encoders: dict[str, str]) -> None:
        """Note whose templates are about to come."""
        new = [pair for pair in encoders.items() if self._encoders.get(pair[0]) != pair[1]]
        self.tables.upsert(self.records, [self.seal.encoder_row(*pair) for pair in new])
        self._encoders.update(new)

    def commits(self, pseudonyms: Iterable[str], fresh: Freshness = "SEEN") -> Commits:
        """Every commit of these subjects that opens."""
        found: Commits = defaultdict(list)
        for some in chunks(pseudonyms):
            where = f"kind == {COMMIT} and {among('subject', some)}"
            rows = self.tables.pages(self.records, where, ["id", "subject", "data"], fresh)
            for row, data in self.seal.opened(rows):
                found[row["subject"]].append(Commit(**data))
        return found

    def commit_rows(self, pseudonyms: Iterable[str], fresh: Freshness = "SEEN") -> list[str]:
        """The keys of all commits of these subjects, also of those that do not open."""
        found: list[str] = []
        for some in chunks(pseudonyms):
            where = f"kind == {COMMIT} and {among('subject', some)}"
            found += [row["id"] for row in self.tables.pages(self.records, where, ["id"], fresh)]
        return found

    def by_key(self, entry: Entry, keys: Iterable[str]) -> Commits:
        """Commits with these idempotency keys (hashed) that still have a template: the others are forgotten."""
        found: Commits = defaultdict(list)
        for some in chunks(keys):
            where = f"kind == {COMMIT} and {among('key', some)}"
            rows = self.tables.pages(self.records, where, ["id", "key", "data"], "SEEN")
            for row, data in self.seal.opened(rows):
                found[row["key"]].append(Commit(**data))
        unseen = [commit for commits in found.values() for commit in commits]
        left: set[str] = set()
        for fresh in FRESHER:  # nothing is taken for gone that was only not seen yet
            stored = self.stored(entry, {self.seal.subject(commit.subject) for commit in unseen}, fresh=fresh)
            left.update(commit.id for commit in unseen if stored.keys() & set(commit.template_ids))
            unseen = [commit for commit in unseen if commit.id not in left]
        for key, commits in found.items():
            found[key] = [commit for commit in commits if commit.id in left]
        return found

    def stored(self, entry: Entry, pseudonyms: Iterable[str], *more: str, fresh: Freshness = "SEEN") -> dict[str, Row]:
        """Template id → its row, with its space and the fields ``more``; whether committed or not."""
        rows: dict[str, Row] = {}
        for space, table in entry.tables.items():
            for some in chunks(pseudonyms):
                for row in self.tables.pages(table, among("subject", some), ["id", "subject", *more], fresh):
                    rows[row["id"]] = {**row, "space": space}
        return rows

    def insert(self, entry: Entry, planned: Sequence[tuple[Commit, Enrolment]], earlier: Commits) -> str:
        """Enrol: templates, then commits. When this returns, all are durable, and ``settle`` is to follow.

        Returns the journal's id, to be crossed out after that. A NoTable means that nobody was enrolled.
        """
        started = time.monotonic()
        pseudonyms = {self.seal.subject(commit.subject) for commit, _ in planned}
        journal = self.note(pseudonyms, [commit.id for commit, _ in planned])
        self._tag_ahead(entry, planned, earlier)
        rows: dict[str, list[Row]] = defaultdict(list)
        commits = []
        for commit, enrolment in planned:
            fingerprints = []
            subject, tags = self.seal.subject(commit.subject), self.seal.tags(commit.attributes)
            if not commit.attributes:
                tags = self.seal.tags(current(earlier.get(subject, []))[0])
            for id, template in zip(commit.template_ids, enrolment.templates, strict=True):
                encoder = self.seal.hashed("encoder", template.encoder)
                # Rounded as every store of galleries does, so that all give the same scores and the same exports.
                kept = unit_rows(np.asarray(template.vector, "<f2").tobytes(), 1)[0]
                hidden = self.rotation(template.space, len(kept)).hide(kept)
                row = {"id": id, "subject": subject, "encoder": encoder, "tags": tags, "vector": hidden}
                rows[template.space].append(row)
                fingerprints.append(fingerprint(hidden))
            commits.append(replace(commit, fingerprints=fingerprints))
        for space, some in rows.items():
            self.tables.insert(entry.tables[space], some)
        if time.monotonic() - started > MOST_SECONDS:
            raise StoreUnavailable("Milvus was too slow: the enrolment was given up. Send it again.")
        self.tables.insert(self.records, [self.seal.commit(commit) for commit in commits])
        return journal

    def removal(self, entry: Entry, commits: Sequence[str], *, keep: Sequence[str] = ()) -> Removal:
        """What goes with these commits (their rows' keys), also with ones that do not open; of ``keep`` the templates.

        Whatever else names these subjects is counted, too: right unless somebody enrols them at this moment.
        """
        pseudonyms = {row[:PSEUDONYM] for row in (*commits, *keep)}
        ids = {row[PSEUDONYM:] for row in (*commits, *keep)}
        templates: dict[str, list[str]] = defaultdict(list)
        for id, row in self.stored(entry, pseudonyms, fresh="ALL").items():
            if id.split(".")[0] in ids:
                templates[entry.tables[row["space"]]].append(id)
        staying = {row[:PSEUDONYM] for row in set(self.commit_rows(pseudonyms)).difference(commits)}
        derived = self._noted(pseudonyms - staying)
        return Removal(sorted(pseudonyms), list(commits), templates, len(derived))

    def remove_commits(self, removal: Removal) -> str:
        """The step that decides: from now on nothing of it is given, and ``remove_rest`` is to follow.

        Returns the journal's id.
        """
        journal = self.note(removal.pseudonyms, [])
        self.tables.delete(self.records, removal.commits)
        return journal

    def remove_rest(self, entry: Entry, removal: Removal, journal: str) -> None:
        """All the rest. May be done again."""
        for table, ids in removal.templates.items():
            if table in entry.tables.values():  # or a migration has ended, and dropped it
                self.tables.delete(table, ids)
        self.settle(entry, removal.pseudonyms)
        self.cross_out(journal)

    def remove(self, entry: Entry, removal: Removal) -> None:
        """All of it."""
        self.remove_rest(entry, removal, self.remove_commits(removal))

    def page(self, after: str, limit: int, fresh: Freshness = "SEEN") -> list[str]:
        """Pseudonyms of subjects after that one, in order."""
        found: list[str] = []
        while len(found) < limit:
            start = f"{after}~" if after else ""  # ~ sorts after every hexadecimal digit
            where = f'kind == {COMMIT} and id > "{start}"'
            rows = self.tables.query(self.records, where, ["id", "subject"], fresh, min(limit, PAGE))
            found += dict.fromkeys(row["subject"] for row in rows)
            if len(rows) < min(limit, PAGE):
                break
            after = found[-1]
        return found[:limit]

    def subjects(self, entry: Entry, pseudonyms: Sequence[str], *, vectors: bool) -> Iterator[Subject]:
        """These subjects, in this order, without those who have no template."""
        commits = self.commits(pseudonyms)
        stored = self.stored(entry, pseudonyms, *(["vector"] if vectors else []))
        for pseudonym in pseudonyms:
            templates = []
            for commit in sorted(commits.get(pseudonym, []), key=lambda commit: commit.sequence):
                for id, (encoder, space) in zip(commit.template_ids, commit.templates, strict=True):
                    if id in stored:
                        row = stored[id]
                        vector = None
                        if vectors:
                            hidden = np.asarray(row["vector"], np.float32)
                            vector = self.rotation(space, len(hidden)).reveal(hidden)
                            vector = vector.astype(np.float16).astype(np.float32)
                        templates.append(Template(id, encoder, space, commit.created, commit.expires, vector))
            if templates:
                attributes, consent = current(commits[pseudonym])
                yield Subject(commits[pseudonym][0].subject, tuple(templates), attributes, consent)

    def without(self, entry: Entry, space: str, after: str, limit: int, fresh: Freshness) -> list[str]:
        """Ids of up to ``limit`` subjects without a template in this space, though in another: a page."""
        found: list[str] = []
        while len(found) < limit:
            pseudonyms = self.page(after, PAGE, fresh)
            commits, stored = self.commits(pseudonyms, fresh), self.stored(entry, pseudonyms, fresh=fresh)
            for pseudonym in pseudonyms:
                spaces = {
                    stored[id]["space"] for commit in commits[pseudonym] for id in commit.template_ids if id in stored
                }
                if spaces and space not in spaces:
                    found.append(commits[pseudonym][0].subject)
            if len(pseudonyms) < PAGE:
                break
            after = pseudonyms[-1]
        return found[:limit]

    def row(self, commit: Commit) -> str:
        """The key of a commit's row."""
        return self.seal.subject(commit.subject) + commit.id

    def note(self, pseudonyms: Iterable[str], enrolments: Sequence[str]) -> str:
        """Write a journal: these subjects are about to change, by these enrolments. Returns its id."""
        id = f"~journal/{time.time_ns():x}/{os.urandom(8).hex()}"
        self.tables.insert(self.records, [self.seal.record(JOURNAL, id, [sorted(pseudonyms), list(enrolments)])])
        return id

    def cross_out(self, journal: str) -> None:
        """The change is complete."""
        self.tables.delete(self.records, [journal])

    def settle(self, entry: Entry, pseudonyms: Iterable[str]) -> None:
        """Make what is derived from commits as they say: who is there, who has moved, what templates are found by."""
        pseudonyms = set(pseudonyms)
        stored, commits = self.stored(entry, pseudonyms, "tags"), self.commits(pseudonyms)
        untrue: dict[str, dict[str, int]] = {}
        for found in commits.values():
            tags = self.seal.tags(current(found)[0])
            ids = [id for commit in found for id in commit.template_ids if id in stored]
            untrue.update({id: tags for id in ids if stored[id]["tags"] != tags})
        self._tag(entry, {id: stored[id] for id in untrue}, untrue)
        there, noted = self._there(entry, commits, stored), self._noted(pseudonyms)
        self._write_notes(there - noted)
        gone = sorted(noted - there)
        self.tables.delete(self.records, gone)
        # Who enrolled meanwhile may have found these notes still there, and written none.
        pseudonyms = {note[-PSEUDONYM:] for note in gone}
        if commits := self.commits(pseudonyms, "ALL"):
            self._write_notes(self._there(entry, commits, self.stored(entry, pseudonyms, fresh="ALL")))

    def _there(self, entry: Entry, commits: Commits, stored: Mapping[str, Row]) -> set[str]:
        """Keys of the notes that there should be."""
        notes: set[str] = set()
        for pseudonym, found in commits.items():
            spaces = {stored[id]["space"] for commit in found for id in commit.template_ids if id in stored}
            if spaces:
                notes.add(f"~subject/{pseudonym}")
            if entry.moving_to and entry.moving_to.id in spaces:
                notes.add(f"~moved/{pseudonym}")
        return notes

    def _noted(self, pseudonyms: Iterable[str]) -> set[str]:
        """Keys of the notes that there are."""
        noted: set[str] = set()
        for some in chunks(f"~{what}/{pseudonym}" for what in ("subject", "moved") for pseudonym in pseudonyms):
            noted.update(row["id"] for row in self.tables.query(self.records, among("id", some), ["id"], "SEEN"))
        return noted

    def _write_notes(self, notes: Iterable[str]) -> None:
        kinds = {True: MOVED, False: SUBJECT}
        rows = [self.seal.record(kinds[note.startswith("~moved")], note) for note in sorted(notes)]
        self.tables.upsert(self.records, rows)

    def _tag_ahead(self, entry: Entry, planned: Sequence[tuple[Commit, Enrolment]], earlier: Commits) -> None:
        """Before attributes change, let the templates that are there be found by the new ones, too."""
        changing = {
            self.seal.subject(commit.subject): self.seal.tags(commit.attributes)
            for commit, _ in planned
            if commit.attributes and earlier.get(self.seal.subject(commit.subject))
        }
        stored = self.stored(entry, changing, "tags") if changing else {}
        more = {id: {**row["tags"], **changing[row["subject"]]} for id, row in stored.items()}
        self._tag(entry, stored, {id: tags for id, tags in more.items() if tags != stored[id]["tags"]})

    def _tag(self, entry: Entry, stored: dict[str, Row], tags: dict[str, dict[str, int]]) -> None:
        """Write templates anew with other tags, unless they are deleted meanwhile."""
        if not tags:
            return
        for space, table in entry.tables.items():
            for some in chunks(id for id in tags if stored[id]["space"] == space):
                fields = ["id", "subject", "encoder", "vector"]
                rows = self.tables.query(table, among("id", some), fields, "ALL")
                self.tables.upsert(table, [{**row, "tags": tags[row["id"]]} for row in rows])
        alive = {row[PSEUDONYM:] for row in self.commit_rows({stored[id]["subject"] for id in tags}, "ALL")}
        gone = [id for id in tags if id.split(".")[0] not in alive]
        for table in entry.tables.values() if gone else ():
            self.tables.delete(table, gone)


def records_of(tables: Tables, id: str) -> str:
    """The collection of a gallery's plain rows."""
    return f"{tables.prefix}_{id}_records"


def chunks(values: Iterable[str]) -> Iterator[list[str]]:
    """Each once, as many at a time as a query takes."""
    ordered = list(dict.fromkeys(values))
    for start in range(0, len(ordered), PAGE):
        yield ordered[start : start + PAGE]
