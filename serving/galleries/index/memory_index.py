"""The memory index: it holds a gallery's templates, and any number of threads search them exactly.

Searches that arrive while one runs are answered together in one index product; changes take their turn between them
(combining_queue.py). So a change waits for one batch at most, and a search never sees half a change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pkd.serving.galleries.index.combining_queue import CombiningQueue
from pkd.serving.galleries.index.exact_index import AttributeSets, ExactIndex, Floats, Ints, ParallelMap
from pkd.serving.galleries.store import Attributes, Hit, SearchResult
from pkd.serving.galleries.templates import TOLERANCE
from pkd.toolkit.core.errors import BadVector


@dataclass(frozen=True)
class Rows:
    """Hold templates to be added. Numbers are the store's own; N of each."""

    encoder: str
    templates: Ints
    subjects: Ints
    names: Sequence[str]
    """The subjects' ids."""
    attributes: Sequence[Attributes]
    """Distinct sets of attributes, fewer than N."""
    described: Ints
    """Number of the one that each subject has."""
    vectors: Floats
    """N×D."""


@dataclass(frozen=True)
class _Query:
    encoder: str
    vector: Floats
    top_k: int
    where: Attributes


class MemoryIndex:
    """Search a gallery's templates, of all encoders. Thread-safe."""

    def __init__(self, parallel_map: ParallelMap = map, sets: AttributeSets | None = None) -> None:
        """Begin empty. ``parallel_map``: an executor's ``map``, to search a large gallery on several cores."""
        self._map = parallel_map
        self._indexes: dict[str, ExactIndex] = {}
        self._names: dict[int, str] = {}
        self._sets = AttributeSets() if sets is None else sets
        self._queue: CombiningQueue[_Query, SearchResult] = CombiningQueue(self._answer)

    @property
    def subjects(self) -> int:
        """Count the subjects who have a template."""
        return len(self._names)

    def __len__(self) -> int:
        """Templates of all encoders."""
        return sum(len(index) for index in self._indexes.values())

    def search(self, encoder: str, queries: Floats, top_k: int, where: Attributes | None) -> Sequence[SearchResult]:
        """Find the nearest subjects, as GalleryStore.search. Raises BadVector unless ``queries`` are unit rows Q×D."""
        index = self._indexes.get(encoder)
        if index and queries.shape[1:] != (index.dim,):
            raise BadVector(f"the query has shape {queries.shape[1:]}, its space {index.dim:,} numbers.")
        if not (abs(np.linalg.norm(queries, axis=1) - 1) <= TOLERANCE).all():  # NaN fails, too
            raise BadVector("a query is not a unit vector.")
        return self._queue.do([_Query(encoder, query, top_k, where or {}) for query in queries])

    def add(self, rows: Rows) -> None:
        """Add templates. The attributes given are those of the subjects from now on."""
        self._queue.alone(lambda: self._add(rows))

    def remove(self, templates: Ints) -> None:
        """Forget templates, and subjects that have no other; numbers that are not here are passed over."""
        self._queue.alone(lambda: self._remove(templates))

    def describe(self, subject: int, attributes: Attributes) -> None:
        """Give a subject other attributes."""
        self._queue.alone(lambda: self._describe(subject, attributes))

    def counts(self) -> dict[str, int]:
        """Map encoders to their numbers of templates."""
        return {encoder: len(index) for encoder, index in self._indexes.items()}

    def contents(self) -> dict[str, tuple[int, int]]:
        """Map encoders to their numbers of templates, and the checksums that pkd-gallery verify compares."""
        found: dict[str, tuple[int, int]] = {}

        def look() -> None:
            found.update((encoder, (len(index), index.checksum())) for encoder, index in self._indexes.items())

        self._queue.alone(look)
        return found

    def _answer(self, batch: Sequence[_Query]) -> Sequence[SearchResult]:
        answers: dict[int, SearchResult] = {}
        for encoder in {query.encoder for query in batch}:
            asked = [i for i, query in enumerate(batch) if query.encoder == encoder]
            index = self._indexes.get(encoder)
            if index is None:
                answers.update((i, SearchResult((), 0)) for i in asked)
                continue
            near = index.search(
                np.stack([batch[i].vector for i in asked]),
                [batch[i].top_k for i in asked],
                [self._sets.allowed(batch[i].where) if batch[i].where else None for i in asked],
                self._names.__getitem__,
                self._map,
            )
            for i, found in zip(asked, near, strict=True):
                hits = (Hit(self._names[subject], template_id(number), score) for score, subject, number in found.best)
                answers[i] = SearchResult(tuple(hits), found.searched)
        return [answers[i] for i in range(len(batch))]

    def _add(self, rows: Rows) -> None:
        if rows.encoder not in self._indexes:
            self._indexes[rows.encoder] = ExactIndex(rows.vectors.shape[1])
        counts = np.bincount(rows.described, minlength=len(rows.attributes)).tolist()
        numbers = [self._sets.hold(items, count) for items, count in zip(rows.attributes, counts, strict=True)]
        sets = np.array(numbers, np.int32)[rows.described]
        self._names.update(zip(rows.subjects.tolist(), rows.names, strict=True))
        self._indexes[rows.encoder].add(rows.templates, rows.subjects, sets, rows.vectors)

    def _remove(self, templates: Ints) -> None:
        touched = [np.zeros(0, np.int64)]
        for index in self._indexes.values():
            subjects, sets = index.remove(templates)
            self._sets.release(sets)
            touched.append(subjects)
        gone = np.unique(np.concatenate(touched))
        for index in self._indexes.values():
            gone = np.setdiff1d(gone, index.holding(gone), assume_unique=True)
        for subject in gone.tolist():
            del self._names[subject]
        self._indexes = {encoder: index for encoder, index in self._indexes.items() if len(index)}

    def _describe(self, subject: int, attributes: Attributes) -> None:
        number = self._sets.hold(attributes, 1)  # held while it is handed out
        for index in self._indexes.values():
            before = index.describe(subject, number)
            self._sets.hold(attributes, len(before))
            self._sets.release(before)
        self._sets.release(np.array([number], np.int32))


def template_id(number: int) -> str:
    """Write a template's number as it is shown outside."""
    return f"{number:012x}"
