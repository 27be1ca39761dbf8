"""One gallery in Milvus as it is read and searched: commits, the templates they name, and the subjects of these.

Milvus knows only the nearest rows; a search finds the nearest subjects, exactly. How a gallery changes: commit.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pkd.serving.galleries.crypto import GalleryKey
from pkd.serving.galleries.milvus.client import MAX_ROWS, PAGE, Consistency, MilvusConnection, Row
from pkd.serving.galleries.milvus.records import COMMIT, ENCODER, Commit, GalleryRow, RowCipher, among, current
from pkd.serving.galleries.store import Attributes, Hit, SearchResult, Subject, Template, Vectors

Commits = dict[str, list[Commit]]
"""Pseudonym of a subject → their commits."""


class MilvusGallery:
    """Read one gallery's collections. Safe to use from several threads.

    Methods take the gallery's row as it is now: a migration changes which collections it has.
    """

    def __init__(self, connection: MilvusConnection, id: str, key: GalleryKey) -> None:
        self.connection, self.cipher = connection, RowCipher(key)
        self.records = records_of(connection, id)
        self._encoders: dict[str, str] = {}

    def encoders(self, row: GalleryRow, known: str = "") -> dict[str, str]:
        """Map every encoder that the gallery's spaces ever had to its space; read anew unless ``known`` is there.

        Raises DecryptionError only where the record of ``known`` does not decrypt: others can still be searched.
        """
        if self._encoders.get(known) not in row.tables:
            rows = list(self.connection.pages(self.records, f"kind == {ENCODER}", ["id", "data"], "bounded"))
            self._encoders = dict(data for _, data in self.cipher.decrypted(rows))
            if known and known not in self._encoders:
                for one in rows:
                    self.cipher.decrypt(one) if one["id"] == self.cipher.encoder_key(known) else None
        return {encoder: space for encoder, space in self._encoders.items() if space in row.tables}

    def register(self, encoders: dict[str, str]) -> None:
        """Note the encoders (→ space) whose templates are about to come."""
        new = [pair for pair in encoders.items() if self._encoders.get(pair[0]) != pair[1]]
        self.connection.upsert(self.records, [self.cipher.encoder_row(*pair) for pair in new])
        self._encoders.update(new)

    def commits(self, pseudonyms: Iterable[str], consistency: Consistency = "bounded") -> Commits:
        """Read every commit of these subjects that decrypts."""
        return self._commits("subject", pseudonyms, consistency)

    def commit_keys(self, pseudonyms: Iterable[str], consistency: Consistency = "bounded") -> list[str]:
        """List the rows of all commits of these subjects by their keys, also of those that do not decrypt."""
        return [row["id"] for row in self._commit_rows("subject", pseudonyms, [], consistency)]

    def by_key(self, row: GalleryRow, keys: Iterable[str]) -> Commits:
        """Read the commits with these idempotency keys (hashed) that still have a template: others are forgotten."""
        found = self._commits("key", keys, "bounded")
        unseen = [commit for commits in found.values() for commit in commits]
        left: set[str] = set()
        levels: tuple[Consistency, ...] = ("bounded", "strong")  # nothing is taken for gone that was only not seen yet
        for level in levels:
            stored = self.stored(row, {self.cipher.subject(commit.subject) for commit in unseen}, consistency=level)
            left.update(commit.id for commit in unseen if stored.keys() & set(commit.template_ids))
            unseen = [commit for commit in unseen if commit.id not in left]
        for key, commits in found.items():
            found[key] = [commit for commit in commits if commit.id in left]
        return found

    def stored(
        self, row: GalleryRow, pseudonyms: Iterable[str], *more: str, consistency: Consistency = "bounded"
    ) -> dict[str, Row]:
        """Map template ids to their rows, with their space and the fields ``more``, whether committed or not."""
        rows: dict[str, Row] = {}
        for space, table in row.tables.items():
            for some in chunks(pseudonyms):
                for one in self.connection.pages(table, among("subject", some), ["id", "subject", *more], consistency):
                    rows[one["id"]] = {**one, "space": space}
        return rows

    def page(self, after: str, limit: int, consistency: Consistency = "bounded") -> list[str]:
        """List pseudonyms of subjects after that one, in order."""
        found: list[str] = []
        while len(found) < limit:
            start = f"{after}~" if after else ""  # ~ sorts after every hexadecimal digit
            where = f'kind == {COMMIT} and id > "{start}"'
            rows = self.connection.query(self.records, where, ["id", "subject"], consistency, min(limit, PAGE))
            found += dict.fromkeys(row["subject"] for row in rows)
            if len(rows) < min(limit, PAGE):
                break
            after = found[-1]
        return found[:limit]

    def subjects(self, row: GalleryRow, pseudonyms: Sequence[str], *, vectors: bool) -> Iterator[Subject]:
        """Yield these subjects, in this order, without those who have no template."""
        commits = self.commits(pseudonyms)
        stored = self.stored(row, pseudonyms, *(["vector"] if vectors else []))
        for pseudonym in pseudonyms:
            templates = []
            for commit in sorted(commits.get(pseudonym, []), key=lambda commit: commit.sequence):
                for id, (encoder, space) in zip(commit.template_ids, commit.templates, strict=True):
                    if id in stored:
                        vector = None
                        if vectors:
                            hidden = np.asarray(stored[id]["vector"], np.float32)
                            vector = self.cipher.rotation(space, len(hidden)).reveal(hidden)
                            vector = vector.astype(np.float16).astype(np.float32)
                        templates.append(Template(id, encoder, space, commit.created, commit.expires, vector))
            if templates:
                attributes, consent = current(commits[pseudonym])
                yield Subject(commits[pseudonym][0].subject, tuple(templates), attributes, consent)

    def without(self, row: GalleryRow, space: str, after: str, limit: int, consistency: Consistency) -> list[str]:
        """List the ids of up to ``limit`` subjects without a template in this space, though in another: a page."""
        found: list[str] = []
        while len(found) < limit:
            pseudonyms = self.page(after, PAGE, consistency)
            commits = self.commits(pseudonyms, consistency)
            stored = self.stored(row, pseudonyms, consistency=consistency)
            for pseudonym in pseudonyms:
                spaces = spaces_of(commits[pseudonym], stored)
                if spaces and space not in spaces:
                    found.append(commits[pseudonym][0].subject)
            if len(pseudonyms) < PAGE:
                break
            after = pseudonyms[-1]
        return found[:limit]

    def _commits(self, column: str, values: Iterable[str], consistency: Consistency) -> Commits:
        found: Commits = defaultdict(list)
        for row, data in self.cipher.decrypted(self._commit_rows(column, values, [column, "data"], consistency)):
            found[row[column]].append(Commit(**data))
        return found

    def _commit_rows(
        self, column: str, values: Iterable[str], fields: Sequence[str], consistency: Consistency
    ) -> Iterator[Row]:
        for some in chunks(values):
            where = f"kind == {COMMIT} and {among(column, some)}"
            yield from self.connection.pages(self.records, where, ["id", *fields], consistency)


def spaces_of(commits: Iterable[Commit], stored: dict[str, Row]) -> set[str]:
    """Name the spaces in which templates of these commits are stored."""
    return {stored[id]["space"] for commit in commits for id in commit.template_ids if id in stored}


def records_of(connection: MilvusConnection, id: str) -> str:
    """Name the collection of a gallery's plain rows."""
    return f"{connection.prefix}_{id}_records"


def chunks(values: Iterable[str]) -> Iterator[list[str]]:
    """Yield each value once, as many at a time as a query takes."""
    ordered = list(dict.fromkeys(values))
    for start in range(0, len(ordered), PAGE):
        yield ordered[start : start + PAGE]


TIE = 1e-6
"""Scores closer than this are equal: the same vector in another row may differ by its last bit."""


def search(
    gallery: MilvusGallery, row: GalleryRow, encoder: str, queries: Vectors, top_k: int, where: Attributes
) -> Sequence[SearchResult]:
    """Find the nearest subjects to each query, as GalleryStore.search."""
    nobody = [SearchResult((), 0) for _ in queries]
    space = gallery.encoders(row, encoder).get(encoder)
    if space is None:
        return nobody
    table = row.tables[space]
    tags = "".join(f' and tags["{tag}"] == 1' for tag in gallery.cipher.tags(where))
    filter = f'encoder == "{gallery.cipher.hashed("encoder", encoder)}"{tags}'
    searched = gallery.connection.count(table, filter, "bounded")
    if not searched or not len(queries):
        return nobody
    hidden = gallery.cipher.rotation(space, queries.shape[1]).hide(np.asarray(queries, np.float32))
    limit = min(MAX_ROWS, 2 * top_k + 8)
    rows = gallery.connection.search(table, hidden, filter, ["subject"], limit)
    commits = gallery.commits({one["subject"] for found in rows for one in found})
    answers = []
    for query, found in zip(hidden, rows, strict=True):
        best = _Best(gallery, commits, where)
        best.take(found)
        # Enough only when no row that was not seen can be better than, or as good as, the last that will be answered.
        while len(found) == limit and not best.certain(top_k, found[-1]["score"]):
            found = gallery.connection.search(table, query[None], filter + best.rest(), ["subject"], limit)[0]
            best.take(found)
        answers.append(SearchResult(tuple(best.ranked()[:top_k]), searched))
    return answers


class _Best:
    """Collect the answer to one query as rows come."""

    def __init__(self, gallery: MilvusGallery, commits: Commits, where: Attributes) -> None:
        self._gallery, self._commits, self._where = gallery, commits, where
        self._best: dict[str, Hit] = {}
        self._others: set[str] = set()
        self._uncommitted: list[str] = []

    def take(self, rows: Sequence[Row]) -> None:
        """Take in rows, best first: the first committed one of a subject is their best."""
        unknown = {row["subject"] for row in rows} - self._commits.keys()
        self._commits.update({pseudonym: [] for pseudonym in unknown})
        self._commits.update(self._gallery.commits(unknown))
        for row in rows:
            pseudonym, id = row["subject"], row["id"]
            if pseudonym in self._best or pseudonym in self._others:
                continue
            commits = self._commits[pseudonym]
            if not any(id in commit.template_ids for commit in commits):
                self._uncommitted.append(id)
            elif not self._where.items() <= current(commits)[0].items():
                self._others.add(pseudonym)
            else:
                self._best[pseudonym] = Hit(commits[0].subject, id, float(row["score"]))

    def certain(self, top_k: int, last: float) -> bool:
        """Tell whether rows that score at most ``last`` cannot change the first ``top_k``."""
        return len(self._best) >= top_k and last < self.ranked()[top_k - 1].score - TIE

    def ranked(self) -> list[Hit]:
        """Return all subjects so far, best first; equal scores by the subjects' ids."""
        return sorted(self._best.values(), key=lambda hit: (-round(hit.score / TIE), hit.subject))

    def rest(self) -> str:
        """Return a filter that leaves out all that was taken."""
        filter = ""
        if self._best or self._others:
            filter += f" and not ({among('subject', [*self._best, *self._others])})"
        if self._uncommitted:
            filter += f" and not ({among('id', self._uncommitted)})"
        return filter
