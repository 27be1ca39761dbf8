"""MilvusGallery: the subjects of one gallery in Milvus, and how they change without transactions.

Milvus writes one row at a time. So one row decides: templates go first and count for nothing until their *commit* row
is there; a deletion takes the commit first. Each change notes itself in a *journal* row before its first step and
crosses that out after its last: what a process that died left behind is found by its journal and swept. Commits are
never rewritten, so two processes that change the same subject cannot undo each other. After its last step a change
looks at its subjects once more and puts right what is derived from their commits (``_settle``); of two changes at the
same time at least the later one sees both.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from pkd.serving.galleries.gallery import Enrolment, Subject, Template
from pkd.serving.galleries.milvus_rows import (
    COMMIT,
    ENCODER,
    JOURNAL,
    MOVED,
    SUBJECT,
    Commit,
    Entry,
    Seal,
    among,
    current,
    fingerprint,
)
from pkd.serving.galleries.milvus_tables import PAGE, Freshness, Row, Tables
from pkd.serving.galleries.rotation import Rotation
from pkd.serving.galleries.vault import GalleryKey
from pkd.serving.problems import Problem

SWEEP_SECONDS = 3600.0
"""How old a journal must be to be swept: its process is taken for dead."""
MOST_SECONDS = SWEEP_SECONDS / 2
"""How long an enrolment may take until its commit; it is given up after that, before anyone sweeps it."""

Commits = dict[str, list[Commit]]
"""Pseudonym of a subject → their commits."""


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
        """Encoder → space, of all that this gallery's spaces ever had. Read anew unless ``known`` is among them."""
        if self._encoders.get(known) not in entry.tables:
            rows = self.tables.pages(self.records, f"kind == {ENCODER}", ["id", "data"], "SEEN")
            self._encoders = dict(self.seal.open(row) for row in rows)
        return {encoder: space for encoder, space in self._encoders.items() if space in entry.tables}

    def register(self, encoders: dict[str, str]) -> None:
        """Note whose templates are about to come."""
        new = [pair for pair in encoders.items() if self._encoders.get(pair[0]) != pair[1]]
        self.tables.upsert(self.records, [self.seal.encoder_row(*pair) for pair in new])
        self._encoders.update(new)

    def commits(self, pseudonyms: Iterable[str], fresh: Freshness = "SEEN") -> Commits:
        """Every commit of these subjects."""
        found: Commits = defaultdict(list)
        for some in _chunks(pseudonyms):
            where = f"kind == {COMMIT} and {among('subject', some)}"
            for row in self.tables.pages(self.records, where, ["id", "subject", "data"], fresh):
                found[row["subject"]].append(Commit(**self.seal.open(row)))
        return found

    def by_key(self, keys: Iterable[str]) -> Commits:
        """Commits with these idempotency keys (hashed)."""
        found: Commits = defaultdict(list)
        for some in _chunks(keys):
            where = f"kind == {COMMIT} and {among('key', some)}"
            for row in self.tables.pages(self.records, where, ["id", "key", "data"], "SEEN"):
                found[row["key"]].append(Commit(**self.seal.open(row)))
        return found

    def stored(self, entry: Entry, pseudonyms: Iterable[str], *more: str, fresh: Freshness = "SEEN") -> dict[str, Row]:
        """Template id → its row, with its space and the fields ``more``; whether committed or not."""
        rows: dict[str, Row] = {}
        for space, table in entry.tables.items():
            for some in _chunks(pseudonyms):
                for row in self.tables.pages(table, among("subject", some), ["id", "subject", *more], fresh):
                    rows[row["id"]] = {**row, "space": space}
        return rows

    def insert(self, entry: Entry, planned: Sequence[tuple[Commit, Enrolment]], earlier: Commits) -> None:
        """Enrol: templates, then commits. When this returns, all are durable and every read may find them."""
        started = time.monotonic()
        pseudonyms = {self.seal.subject(commit.subject) for commit, _ in planned}
        journal = self._note(pseudonyms, [commit.id for commit, _ in planned])
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
                kept = np.asarray(template.vector, np.float16).astype(np.float32)
                hidden = self.rotation(template.space, len(kept)).hide(kept)
                row = {"id": id, "subject": subject, "encoder": encoder, "tags": tags, "vector": hidden}
                rows[template.space].append(row)
                fingerprints.append(fingerprint(hidden))
            commits.append(replace(commit, fingerprints=fingerprints))
        for space, some in rows.items():
            self.tables.insert(entry.tables[space], some)
        if time.monotonic() - started > MOST_SECONDS:
            raise Problem("store-unavailable", "Milvus was too slow: the enrolment was given up. Send it again.")
        self.tables.insert(self.records, [self.seal.commit(commit) for commit in commits])
        self._settle(entry, pseudonyms)
        self.tables.delete(self.records, [journal])

    def remove(self, entry: Entry, commits: Sequence[Commit], *, keep: Sequence[Commit] = ()) -> tuple[int, int]:
        """Delete commits and their templates; of ``keep`` the templates alone. How many templates, how many rows."""
        pseudonyms = {self.seal.subject(commit.subject) for commit in (*commits, *keep)}
        ids = {id for commit in (*commits, *keep) for id in commit.template_ids}
        journal = self._note(pseudonyms, [])
        rows = [self.seal.subject(commit.subject) + commit.id for commit in commits]
        self.tables.delete(self.records, rows)
        stored = [id for id in self.stored(entry, pseudonyms) if id in ids]
        for table in entry.tables.values():
            self.tables.delete(table, sorted(ids))
        derived = self._settle(entry, pseudonyms)
        self.tables.delete(self.records, [journal])
        return len(stored), len(stored) + len(rows) + derived

    def sweep(self, entry: Entry, before: float) -> None:
        """Finish what processes that died before then (seconds since 1970) have begun."""
        where = f"kind == {JOURNAL}"
        journals = {
            row["id"]: (row["created"], *self.seal.open(row))
            for row in self.tables.pages(self.records, where, ["id", "created", "data"], "ALL")
        }
        for id, (created, pseudonyms, _) in journals.items():
            if created >= before * 1e6:
                continue
            stored = self.stored(entry, pseudonyms, fresh="ALL")
            commits = self.commits(pseudonyms, "ALL")
            alive = {commit.id for found in commits.values() for commit in found}
            # A journal is written before its templates: one that belongs to a template seen above is seen now.
            for row in list(self.tables.pages(self.records, where, ["id", "data"], "ALL")):
                alive.update(self.seal.open(row)[1] if row["id"] != id else [])
            for space, table in entry.tables.items():
                left = [key for key, row in stored.items() if row["space"] == space and key.split(".")[0] not in alive]
                self.tables.delete(table, left)
            self._settle(entry, pseudonyms)
            self.tables.delete(self.records, [id])

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

    def expire(self, entry: Entry, now: float) -> tuple[int, int]:
        """Delete what is past its time: how many templates, how many rows.

        A commit whose attributes or consent still hold stays, without its templates, while its subject has others.
        """
        where = f"kind == {COMMIT} and expires <= {int(now * 1e6)}"
        expired = {row["subject"] for row in self.tables.pages(self.records, where, ["id", "subject"], "SEEN")}
        templates = rows = 0
        for some in _chunks(expired):
            commits, stored = self.commits(some), self.stored(entry, some)
            gone: list[Commit] = []
            emptied: list[Commit] = []
            for found in commits.values():
                past = [commit for commit in found if commit.expires is not None and commit.expires <= now]
                left = [commit for commit in found if commit not in past and set(commit.template_ids) & stored.keys()]
                described = current(found)
                for number, commit in enumerate(past):
                    needed = left and current([*left, *past[number + 1 :]]) != described
                    if not needed:
                        gone.append(commit)
                    elif set(commit.template_ids) & stored.keys():
                        emptied.append(commit)
                if not left:
                    gone += [commit for commit in found if commit not in past]
            if gone or emptied:
                done = self.remove(entry, gone, keep=emptied)
                templates, rows = templates + done[0], rows + done[1]
        return templates, rows

    def _note(self, pseudonyms: Iterable[str], enrolments: Sequence[str]) -> str:
        id = f"~journal/{time.time_ns():x}/{os.urandom(8).hex()}"
        self.tables.insert(self.records, [self.seal.record(JOURNAL, id, [sorted(pseudonyms), list(enrolments)])])
        return id

    def _settle(self, entry: Entry, pseudonyms: Iterable[str]) -> int:
        """Make what is derived from commits as they say: who is there, who has moved, what templates are found by.

        Returns how many rows of records went.
        """
        pseudonyms = set(pseudonyms)
        stored = self.stored(entry, pseudonyms, "tags")
        commits = self.commits(pseudonyms)
        there: set[str] = set()
        untrue: dict[str, dict[str, int]] = {}
        for pseudonym, found in commits.items():
            tags = self.seal.tags(current(found)[0])
            for id in (id for commit in found for id in commit.template_ids if id in stored):
                there.add(f"~subject/{pseudonym}")
                if entry.moving_to and stored[id]["space"] == entry.moving_to.id:
                    there.add(f"~moved/{pseudonym}")
                if stored[id]["tags"] != tags:
                    untrue[id] = tags
        self._tag(entry, {id: stored[id] for id in untrue}, untrue)
        noted: set[str] = set()
        for some in _chunks(f"~{what}/{pseudonym}" for what in ("subject", "moved") for pseudonym in pseudonyms):
            noted.update(row["id"] for row in self.tables.query(self.records, among("id", some), ["id"], "SEEN"))
        kinds = {True: MOVED, False: SUBJECT}
        new = [self.seal.record(kinds[id.startswith("~moved")], id) for id in sorted(there - noted)]
        self.tables.upsert(self.records, new)
        self.tables.delete(self.records, sorted(noted - there))
        return len(noted - there)

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
            for some in _chunks(id for id in tags if stored[id]["space"] == space):
                fields = ["id", "subject", "encoder", "vector"]
                rows = self.tables.query(table, among("id", some), fields, "ALL")
                self.tables.upsert(table, [{**row, "tags": tags[row["id"]]} for row in rows])
        commits = self.commits({stored[id]["subject"] for id in tags}, "ALL")
        alive = {commit.id for found in commits.values() for commit in found}
        gone = [id for id in tags if id.split(".")[0] not in alive]
        for table in entry.tables.values() if gone else ():
            self.tables.delete(table, gone)


def records_of(tables: Tables, id: str) -> str:
    """The collection of a gallery's plain rows."""
    return f"{tables.prefix}_{id}_records"


def _chunks(values: Iterable[str]) -> Iterator[list[str]]:
    ordered = list(dict.fromkeys(values))
    for start in range(0, len(ordered), PAGE):
        yield ordered[start : start + PAGE]
