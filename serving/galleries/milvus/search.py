"""Searching a gallery in Milvus: the nearest subjects, exactly, of a database that knows only the nearest rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pkd.serving.galleries.milvus.client import MAX_ROWS, Row
from pkd.serving.galleries.milvus.gallery import Commits, MilvusGallery
from pkd.serving.galleries.milvus.records import GalleryRow, among, current
from pkd.serving.galleries.store import Attributes, Hit, SearchResult, Vectors

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
