"""The commit protocol: how subjects change in Milvus, which writes single rows and has no transactions.

**Invariant: a template counts if, and only if, a commit row names it.** A commit row is written once, never rewritten,
and deleted once. So one write decides each change, and two processes that change one subject cannot undo each other.

====  =====================  =====================  ==================================================================
step  enrolling              deleting               a crash after it leaves
====  =====================  =====================  ==================================================================
1     write the journal      write the journal      the journal, which names the subjects that were about to change
2     write templates                               templates that no commit names: nobody finds them
3     **write commits**      **delete commits**     the change, in full; what follows from it is not done yet
4                            delete templates       counts of subjects, and tags to filter by, of before
5     derive                 derive                 the journal
6     clear the journal      clear the journal      nothing
====  =====================  =====================  ==================================================================

Up to step 2 nothing of a change is visible, from step 3 on all of it. A process that died leaves its journal; once that
is an hour old, ``repair`` (called by every sweep) does steps 4 to 6 for its subjects, whichever step was the last. All
three may be done again. Two things are derived from commits and put right in step 5: the notes that subjects are
counted by, and the tags that templates are filtered by. Of two changes at the same time, at least the later one sees
both when it derives.

Between steps 3 and 5 an enrolment looks whether it may stay (enrolment.py): who must withdraw deletes its own commits.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pkd.serving.core.errors import StoreUnavailable
from pkd.serving.galleries.milvus.client import Row
from pkd.serving.galleries.milvus.gallery import Commits, MilvusGallery, chunks, spaces_of
from pkd.serving.galleries.milvus.records import (
    JOURNAL,
    MOVED,
    PSEUDONYM,
    SUBJECT,
    Commit,
    GalleryRow,
    among,
    current,
    fingerprint,
)
from pkd.serving.galleries.store import Enrolment
from pkd.serving.galleries.templates import STORED, choose_templates, enrolments_again, unit_rows, unknown_subject

SWEEP_SECONDS = 3600.0
"""Age from which a journal is repaired, seconds: its process is taken for dead."""
ENROLMENT_SECONDS = SWEEP_SECONDS / 2
"""Longest time of an enrolment until its commit, seconds; it is given up after that, before anyone repairs it."""


@dataclass(frozen=True)
class Removal:
    """Name the rows that are to be deleted."""

    pseudonyms: Sequence[str]
    commits: Sequence[str]
    """The keys of their rows."""
    templates: Mapping[str, Sequence[str]]
    """Collection → ids."""
    derived: int
    """Number of derived rows that go beside these."""

    @property
    def count(self) -> tuple[int, int]:
        """Count the templates, and all rows."""
        templates = sum(len(ids) for ids in self.templates.values())
        return templates, templates + len(self.commits) + self.derived


def enrol(
    gallery: MilvusGallery, row: GalleryRow, planned: Sequence[tuple[Commit, Enrolment]], earlier: Commits
) -> str:
    """Do steps 1 to 3 of an enrolment; ``finish_enrolment`` is to follow. Returns the journal's id.

    ``earlier``: the subjects' commits so far. A NoCollection means that nobody was enrolled.
    """
    started, write = time.monotonic(), gallery.connection.insert
    pseudonyms = {gallery.cipher.subject(commit.subject) for commit, _ in planned}
    journal = write_journal(gallery, pseudonyms, [commit.id for commit, _ in planned])
    _tag_ahead(gallery, row, planned, earlier)
    templates, commits = _rows(gallery, planned, earlier)
    for space, rows in templates.items():
        write(row.tables[space], rows)
    if time.monotonic() - started > ENROLMENT_SECONDS:
        raise StoreUnavailable("Milvus was too slow: the enrolment was given up. Send it again.")
    write(gallery.records, commits)
    return journal


def finish_enrolment(gallery: MilvusGallery, row: GalleryRow, pseudonyms: Iterable[str], journal: str) -> None:
    """Do steps 5 and 6 of an enrolment."""
    derive(gallery, row, pseudonyms)
    clear_journal(gallery, journal)


def plan_removal(
    gallery: MilvusGallery, row: GalleryRow, commits: Sequence[str], *, keep: Sequence[str] = ()
) -> Removal:
    """Find what goes with these commits (their rows' keys), also with ones that do not decrypt.

    ``keep``: commits of which only the templates go. Whatever else names these subjects is counted, too, which is
    right unless somebody enrols them at this moment.
    """
    pseudonyms = {key[:PSEUDONYM] for key in (*commits, *keep)}
    ids = {key[PSEUDONYM:] for key in (*commits, *keep)}
    templates: dict[str, list[str]] = defaultdict(list)
    for id, one in gallery.stored(row, pseudonyms, consistency="strong").items():
        if id.split(".")[0] in ids:
            templates[row.tables[one["space"]]].append(id)
    staying = {key[:PSEUDONYM] for key in set(gallery.commit_keys(pseudonyms)).difference(commits)}
    derived = _notes(gallery, pseudonyms - staying)
    return Removal(sorted(pseudonyms), list(commits), templates, len(derived))


def remove(gallery: MilvusGallery, removal: Removal) -> str:
    """Do steps 1 to 3 of a deletion; ``finish_removal`` is to follow. Returns the journal's id."""
    journal = write_journal(gallery, removal.pseudonyms, [])
    gallery.connection.delete(gallery.records, removal.commits)
    return journal


def finish_removal(gallery: MilvusGallery, row: GalleryRow, removal: Removal, journal: str) -> None:
    """Do steps 4 to 6 of a deletion."""
    for table, ids in removal.templates.items():
        if table in row.tables.values():  # or a migration has ended, and dropped it
            gallery.connection.delete(table, ids)
    derive(gallery, row, removal.pseudonyms)
    clear_journal(gallery, journal)


def repair(gallery: MilvusGallery, row: GalleryRow, before: float) -> int:
    """Do steps 4 to 6 for processes that died before then (seconds since 1970); returns how many templates went."""
    removed = 0
    for journal, (pseudonyms, _) in _journals(gallery):
        if journal["created"] >= before * 1e6:
            continue
        stored = gallery.stored(row, pseudonyms, consistency="strong")
        alive = {key[PSEUDONYM:] for key in gallery.commit_keys(pseudonyms, "strong")}
        # A journal is written before its templates: one that belongs to a template seen above is seen now.
        for other, (_, enrolments) in _journals(gallery):
            alive.update(enrolments if other["id"] != journal["id"] else [])
        for space, table in row.tables.items():
            left = [id for id, one in stored.items() if one["space"] == space and id.split(".")[0] not in alive]
            gallery.connection.delete(table, left)
            removed += len(left)
        derive(gallery, row, pseudonyms)
        clear_journal(gallery, journal["id"])
    return removed


def write_journal(gallery: MilvusGallery, pseudonyms: Iterable[str], enrolments: Sequence[str]) -> str:
    """Write that these subjects are about to change, by these enrolments; returns the journal's id."""
    id = f"~journal/{time.time_ns():x}/{os.urandom(8).hex()}"
    data = [sorted(pseudonyms), list(enrolments)]
    gallery.connection.insert(gallery.records, [gallery.cipher.record(JOURNAL, id, data)])
    return id


def clear_journal(gallery: MilvusGallery, journal: str) -> None:
    """Delete the journal of a change that is complete."""
    gallery.connection.delete(gallery.records, [journal])


def derive(gallery: MilvusGallery, row: GalleryRow, pseudonyms: Iterable[str]) -> None:
    """Make derived rows as the commits say: who is there, who has moved, what templates are filtered by."""
    pseudonyms = set(pseudonyms)
    stored, commits = gallery.stored(row, pseudonyms, "tags"), gallery.commits(pseudonyms)
    wrong: dict[str, dict[str, int]] = {}
    for found in commits.values():
        tags = gallery.cipher.tags(current(found)[0])
        ids = [id for commit in found for id in commit.template_ids if id in stored]
        wrong.update({id: tags for id in ids if stored[id]["tags"] != tags})
    _tag(gallery, row, stored, wrong)
    due, noted = _notes_due(row, commits, stored), _notes(gallery, pseudonyms)
    _write_notes(gallery, due - noted)
    gone = sorted(noted - due)
    gallery.connection.delete(gallery.records, gone)
    # Who enrolled meanwhile may have found these notes still there, and written none.
    pseudonyms = {note[-PSEUDONYM:] for note in gone}
    if commits := gallery.commits(pseudonyms, "strong"):
        stored = gallery.stored(row, pseudonyms, consistency="strong")
        _write_notes(gallery, _notes_due(row, commits, stored))


def _rows(
    gallery: MilvusGallery, planned: Sequence[tuple[Commit, Enrolment]], earlier: Commits
) -> tuple[Mapping[str, list[Row]], list[Row]]:
    """Make the rows of an enrolment: space → templates, and commits."""
    cipher, templates, commits = gallery.cipher, defaultdict[str, list[Row]](list), []
    for commit, enrolment in planned:
        subject, fingerprints = cipher.subject(commit.subject), []
        tags = cipher.tags(commit.attributes or current(earlier.get(subject, []))[0])
        for id, template in zip(commit.template_ids, enrolment.templates, strict=True):
            # Rounded as every store of galleries does, so that all give the same scores and the same exports.
            kept = unit_rows(np.asarray(template.vector, STORED).tobytes(), 1)[0]
            hidden = cipher.rotation(template.space, len(kept)).hide(kept)
            encoder = cipher.hashed("encoder", template.encoder)
            templates[template.space].append(
                {"id": id, "subject": subject, "encoder": encoder, "tags": tags, "vector": hidden}
            )
            fingerprints.append(fingerprint(hidden))
        commits.append(cipher.commit(replace(commit, fingerprints=fingerprints)))
    return templates, commits


def _journals(gallery: MilvusGallery) -> list[tuple[Row, tuple[list[str], list[str]]]]:
    """Read all journals that decrypt: their rows, and each one's pseudonyms and enrolments."""
    rows = gallery.connection.pages(gallery.records, f"kind == {JOURNAL}", ["id", "created", "data"], "strong")
    return list(gallery.cipher.decrypted(rows))


def _notes_due(row: GalleryRow, commits: Commits, stored: dict[str, Row]) -> set[str]:
    """Name the notes that there should be, by their keys."""
    notes: set[str] = set()
    for pseudonym, found in commits.items():
        spaces = spaces_of(found, stored)
        if spaces:
            notes.add(f"~subject/{pseudonym}")
        if row.moving_to and row.moving_to.id in spaces:
            notes.add(f"~moved/{pseudonym}")
    return notes


def _notes(gallery: MilvusGallery, pseudonyms: Iterable[str]) -> set[str]:
    """Name the notes that there are, by their keys."""
    keys = (f"~{what}/{pseudonym}" for what in ("subject", "moved") for pseudonym in pseudonyms)
    found = (gallery.connection.query(gallery.records, among("id", some), ["id"], "bounded") for some in chunks(keys))
    return {row["id"] for rows in found for row in rows}


def _write_notes(gallery: MilvusGallery, notes: Iterable[str]) -> None:
    rows = [gallery.cipher.record(MOVED if key.startswith("~moved") else SUBJECT, key) for key in sorted(notes)]
    gallery.connection.upsert(gallery.records, rows)


def _tag_ahead(
    gallery: MilvusGallery, row: GalleryRow, planned: Sequence[tuple[Commit, Enrolment]], earlier: Commits
) -> None:
    """Before attributes change, let the templates that are there be found by the new ones, too."""
    cipher = gallery.cipher
    changing = {
        cipher.subject(commit.subject): cipher.tags(commit.attributes)
        for commit, _ in planned
        if commit.attributes and earlier.get(cipher.subject(commit.subject))
    }
    stored = gallery.stored(row, changing, "tags") if changing else {}
    more = {id: {**one["tags"], **changing[one["subject"]]} for id, one in stored.items()}
    _tag(gallery, row, stored, {id: tags for id, tags in more.items() if tags != stored[id]["tags"]})


def _tag(
    gallery: MilvusGallery, row: GalleryRow, stored: Mapping[str, Row], tags: Mapping[str, dict[str, int]]
) -> None:
    """Write templates anew with other tags, unless they are deleted meanwhile."""
    if not tags:
        return
    for space, table in row.tables.items():
        for some in chunks(id for id in tags if stored[id]["space"] == space):
            fields = ["id", "subject", "encoder", "vector"]
            rows = gallery.connection.query(table, among("id", some), fields, "strong")
            gallery.connection.upsert(table, [{**one, "tags": tags[one["id"]]} for one in rows])
    alive = {key[PSEUDONYM:] for key in gallery.commit_keys({stored[id]["subject"] for id in tags}, "strong")}
    gone = [id for id in tags if id.split(".")[0] not in alive]
    for table in row.tables.values() if gone else ():
        gallery.connection.delete(table, gone)


@dataclass(frozen=True)
class Reassignment:
    """Say what is enrolled again, and which commits go then, so that these templates are gone and nothing else."""

    again: Sequence[Enrolment]
    commits: Sequence[str]
    """Keys of their rows."""
    removed: int
    last: bool
    """True: no template is left, and the subject goes as a whole."""

    @classmethod
    def plan(cls, gallery: MilvusGallery, row: GalleryRow, subject: str, templates: Sequence[str]) -> Reassignment:
        """Plan it. Raises UnknownSubject or UnknownTemplate."""
        pseudonym = gallery.cipher.subject(subject)
        commits = gallery.commits([pseudonym], "strong").get(pseudonym, [])
        found = next(gallery.subjects(row, [pseudonym], vectors=True), None)
        if found is None:
            raise unknown_subject(row.name, subject)
        chosen = {one.id for one in choose_templates(row.name, found, templates)}
        touched = {id.split(".")[0] for id in chosen}
        left = [commit for commit in commits if commit.id not in touched]
        staying = [one for one in found.templates if one.id.split(".")[0] in touched and one.id not in chosen]
        if left and not staying and current(left) != (found.attributes, found.consent):
            newest = max(left, key=lambda commit: commit.sequence)  # attributes and consent stand in what goes
            touched.add(newest.id)
            staying = [one for one in found.templates if one.id.split(".")[0] == newest.id]
        return cls(
            again=enrolments_again(subject, staying, "enrol", attributes=dict(found.attributes), consent=found.consent),
            commits=[gallery.cipher.commit_key(commit) for commit in commits if commit.id in touched],
            removed=len(chosen),
            last=len(chosen) == len(found.templates),
        )
