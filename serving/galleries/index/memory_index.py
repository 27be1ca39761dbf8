"""MemoryIndex: a gallery's templates in memory, exactly searched by any number of threads.

Searches that arrive while one runs are answered together in one matrix product; changes take their turn between them
(drain.py). So a change waits for one batch at most, and a search never sees half a change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pkd.serving.galleries.index.attribute_sets import AttributeSets
from pkd.serving.galleries.index.combining_queue import Drain
from pkd.serving.galleries.index.exact_index import Floats, Ints, Matrix, Spread
from pkd.serving.galleries.store import Attributes, Found, Hit
from pkd.serving.galleries.templates import TOLERANCE
from pkd.toolkit.core.errors import BadVector


@dataclass(frozen=True)
class Rows:
    """Templates to be added. Numbers are the store's own; N of each."""

    encoder: str
    templates: Ints
    subjects: Ints
    names: Sequence[str]
    """The subjects' ids."""
    attributes: Sequence[Attributes]
    """Distinct sets of attributes, fewer than N."""
    described: Ints
    """Which of them each subject has."""
    vectors: Floats
    """N×D."""


@dataclass(frozen=True)
class _Query:
    encoder: str
    vector: Floats
    top_k: int
    where: Attributes


class MemoryIndex:
    """Thread-safe."""

    def __init__(self, spread: Spread = map) -> None:
        """``spread``: an executor's ``map``, to search a large gallery on several cores."""
        self._spread = spread
        self._matrices: dict[str, Matrix] = {}
        self._names: dict[int, str] = {}
        self._sets = AttributeSets()
        self._drain: Drain[_Query, Found] = Drain(self._answer)

    def __len__(self) -> int:
        """Templates of all encoders."""
        return sum(len(matrix) for matrix in self._matrices.values())

    def search(self, encoder: str, queries: Floats, top_k: int, where: Attributes | None) -> Sequence[Found]:
        """As GalleryStore.search; ``queries`` Q×D, unit rows. Raises BadVector for anything else."""
        matrix = self._matrices.get(encoder)
        if matrix and queries.shape[1:] != (matrix.dim,):
            raise BadVector(f"the query has shape {queries.shape[1:]}, its space {matrix.dim:,} numbers.")
        if not (abs(np.linalg.norm(queries, axis=1) - 1) <= TOLERANCE).all():  # NaN fails, too
            raise BadVector("a query is not a unit vector.")
        return self._drain.do([_Query(encoder, query, top_k, where or {}) for query in queries])

    def add(self, rows: Rows) -> None:
        """Add templates. The attributes given are those of the subjects from now on."""
        self._drain.alone(lambda: self._add(rows))

    def remove(self, templates: Ints) -> None:
        """Forget templates, and subjects that have no other; numbers that are not here are passed over."""
        self._drain.alone(lambda: self._remove(templates))

    def describe(self, subject: int, attributes: Attributes) -> None:
        """Give a subject other attributes."""
        self._drain.alone(lambda: self._describe(subject, attributes))

    def contents(self) -> dict[str, tuple[int, int]]:
        """Encoder → how many templates, and the checksum of them all: what pkd-gallery verify compares."""
        found: dict[str, tuple[int, int]] = {}

        def look() -> None:
            found.update((encoder, (len(matrix), matrix.checksum())) for encoder, matrix in self._matrices.items())

        self._drain.alone(look)
        return found

    def _answer(self, batch: Sequence[_Query]) -> Sequence[Found]:
        answers: dict[int, Found] = {}
        for encoder in {query.encoder for query in batch}:
            places = [place for place, query in enumerate(batch) if query.encoder == encoder]
            matrix = self._matrices.get(encoder)
            if matrix is None:
                answers.update((place, Found((), 0)) for place in places)
                continue
            near = matrix.search(
                np.stack([batch[place].vector for place in places]),
                [batch[place].top_k for place in places],
                [self._sets.allowed(batch[place].where) if batch[place].where else None for place in places],
                self._names.__getitem__,
                self._spread,
            )
            for place, found in zip(places, near, strict=True):
                hits = (Hit(self._names[subject], template_id(number), score) for score, subject, number in found.best)
                answers[place] = Found(tuple(hits), found.searched)
        return [answers[place] for place in range(len(batch))]

    def _add(self, rows: Rows) -> None:
        if rows.encoder not in self._matrices:
            self._matrices[rows.encoder] = Matrix(rows.vectors.shape[1])
        counts = np.bincount(rows.described, minlength=len(rows.attributes)).tolist()
        numbers = [self._sets.hold(items, count) for items, count in zip(rows.attributes, counts, strict=True)]
        sets = np.array(numbers, np.int32)[rows.described]
        self._names.update(zip(rows.subjects.tolist(), rows.names, strict=True))
        self._matrices[rows.encoder].add(rows.templates, rows.subjects, sets, rows.vectors)

    def _remove(self, templates: Ints) -> None:
        touched = [np.zeros(0, np.int64)]
        for matrix in self._matrices.values():
            subjects, sets = matrix.remove(templates)
            self._sets.release(sets)
            touched.append(subjects)
        gone = np.unique(np.concatenate(touched))
        for matrix in self._matrices.values():
            gone = np.setdiff1d(gone, matrix.holding(gone), assume_unique=True)
        for subject in gone.tolist():
            del self._names[subject]
        self._matrices = {encoder: matrix for encoder, matrix in self._matrices.items() if len(matrix)}

    def _describe(self, subject: int, attributes: Attributes) -> None:
        number = self._sets.hold(attributes, 1)  # held while it is handed out
        for matrix in self._matrices.values():
            before = matrix.describe(subject, number)
            self._sets.hold(attributes, len(before))
            self._sets.release(before)
        self._sets.release(np.array([number], np.int32))


def template_id(number: int) -> str:
    """How a template's number is written outside."""
    return f"{number:012x}"
