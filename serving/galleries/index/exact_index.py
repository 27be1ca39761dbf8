"""The exact index: it holds the templates of one encoder as rows in memory.

A search is exact in the sense of real numbers: which subjects are nearest, and in which order, is decided by scores in
float64, summed in one fixed order, so that equal templates score equally wherever they lie and however many queries
were answered at once. The product in float32 that goes before only discards what cannot be among the nearest: its error
is at most D·2⁻²⁴·|x||q| (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

NO_SET = 0
"""Number that rows without a template have. No filter allows it."""


class AttributeSets:
    """Number the sets that templates share; a set that no template has any more is forgotten, its number reused."""

    def __init__(self) -> None:
        self._numbers: dict[frozenset[tuple[str, str]], int] = {}
        self._sets: list[frozenset[tuple[str, str]]] = [frozenset()]
        self._templates: list[int] = [0]
        self._free: list[int] = []
        self._having: dict[tuple[str, str], set[int]] = {}

    def __len__(self) -> int:
        """How many sets are in use."""
        return len(self._numbers)

    def hold(self, attributes: Mapping[str, str], templates: int) -> int:
        """Return the number of this set, which so many more templates have from now on."""
        items = frozenset(attributes.items())
        number = self._numbers.get(items)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._sets[number] = items
            else:
                number = len(self._sets)
                self._sets.append(items)
                self._templates.append(0)
            self._numbers[items] = number
            for item in items:
                self._having.setdefault(item, set()).add(number)
        self._templates[number] += templates
        return number

    def release(self, numbers: NDArray[np.int32]) -> None:
        """Take back the sets of templates that are gone, one number for each."""
        for number, count in enumerate(np.bincount(numbers).tolist()):
            if not count:
                continue
            self._templates[number] -= count
            if not self._templates[number]:
                items = self._sets[number]
                del self._numbers[items]
                for item in items:
                    self._having[item].discard(number)
                    if not self._having[item]:
                        del self._having[item]
                self._free.append(number)

    def allowed(self, where: Mapping[str, str]) -> NDArray[np.bool_]:
        """Tell of each set, by its number, whether it has all of ``where``."""
        having = sorted((self._having.get(item, set()) for item in where.items()), key=len)
        matching = set.intersection(*having) if having else set(self._numbers.values())
        mask = np.zeros(len(self._sets), np.bool_)
        mask[np.fromiter(matching, np.int64, len(matching))] = True
        return mask


SMALLEST_BLOCK, LARGEST_BLOCK = 1024, 65536
"""Rows of a block. An index grows by about what it has, so that no row is ever copied."""
SPARSE = 8
"""A filter that leaves less than one row in so many gathers them first."""
AT_ONCE = 4096
"""Rows scored in float64 together."""
QUERIES_AT_ONCE = 32
FEW = 4
"""Queries from which a matrix product is faster than dot products (measured)."""
TILE = 128
"""Rows of one matrix product."""
GATHERED = 256
"""Rows that a filter leaves, copied together at a time."""
LOWEST = np.finfo(np.float32).min
LONGEST = 1.001
"""Length of a template at most: float16 rounds a unit vector."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Allowed = NDArray[np.bool_]
Scored = tuple[float, int, int]
"""Score, subject, template."""


class ParallelMap(Protocol):
    """Map over blocks: ``map``, or an executor's."""

    def __call__(self, work: Callable[[Block], None], blocks: Iterable[Block], /) -> Iterator[None]:
        """Do the work on every block, in order or at once."""
        ...


class Block:
    """Hold rows of one allocation; a row without a template has template 0 and is filled again."""

    def __init__(self, rows: int, dim: int) -> None:
        self.vectors = np.zeros((rows, dim), np.float32)  # memory is taken from the system when first written
        self.templates = np.zeros(rows, np.int64)
        self.subjects = np.zeros(rows, np.int64)
        self.sets = np.full(rows, NO_SET, np.int32)
        self.used = 0
        """Rows from here on were never written."""
        self.live = 0


@dataclass(frozen=True)
class Nearest:
    """Answer one query: subjects with the best of their templates, best first."""

    best: Sequence[Scored]
    searched: int


class ExactIndex:
    """Search templates of one encoder exactly. Not thread-safe: nothing may change while it is searched."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._blocks: list[Block] = []

    def __len__(self) -> int:
        """Templates."""
        return sum(block.live for block in self._blocks)

    def add(self, templates: Ints, subjects: Ints, sets: NDArray[np.int32], vectors: Floats) -> None:
        """Add N rows (``vectors`` N×D) to rows that are free."""
        done, total = 0, len(templates)
        while done < total:
            block = next((block for block in self._blocks if block.live < len(block.templates)), None) or self._grow()
            free = np.flatnonzero(block.templates == 0)[: total - done]
            part = slice(done, done + len(free))
            rows: slice | NDArray[np.intp] = free
            if free[-1] - free[0] == len(free) - 1:
                rows = slice(int(free[0]), int(free[-1]) + 1)
            block.vectors[rows] = vectors[part]
            block.templates[rows] = templates[part]
            block.subjects[rows] = subjects[part]
            block.sets[rows] = sets[part]
            block.live += len(free)
            block.used = max(block.used, int(free[-1]) + 1)
            done += len(free)

    def remove(self, templates: Ints) -> tuple[Ints, NDArray[np.int32]]:
        """Remove those that are there, overwriting their vectors; returns subjects and attribute sets of each."""
        subjects, sets = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        for block in self._blocks:
            known = block.templates[: block.used]
            rows = np.flatnonzero(known == templates[0] if len(templates) == 1 else np.isin(known, templates))
            if not len(rows):
                continue
            subjects.append(block.subjects[rows])
            sets.append(block.sets[rows])
            block.vectors[rows] = 0
            block.templates[rows], block.subjects[rows], block.sets[rows] = 0, 0, NO_SET
            block.live -= len(rows)
        self._blocks = [block for block in self._blocks if block.live]
        return np.concatenate(subjects), np.concatenate(sets)

    def describe(self, subject: int, number: int) -> NDArray[np.int32]:
        """Give all rows of a subject another attribute set; returns those they had."""
        before = [np.zeros(0, np.int32)]
        for block in self._blocks:
            rows = np.flatnonzero(block.subjects[: block.used] == subject)
            before.append(block.sets[rows])
            block.sets[rows] = number
        return np.concatenate(before)

    def holding(self, subjects: Ints) -> Ints:
        """Return those of ``subjects`` that have a row."""
        found = [np.intersect1d(block.subjects[: block.used], subjects) for block in self._blocks]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))

    def checksum(self) -> int:
        """Sum up all templates with their vectors, in any order, as ``checksum`` of the same rows does."""
        parts = [block.templates > 0 for block in self._blocks]
        sums = (
            checksum(block.templates[rows], block.vectors[rows])
            for block, rows in zip(self._blocks, parts, strict=True)
        )
        return sum(sums) % 2**64

    def search(
        self,
        queries: Floats,
        top_k: Sequence[int],
        allowed: Sequence[Allowed | None],
        name: Callable[[int], str],
        parallel_map: ParallelMap = map,
    ) -> list[Nearest]:
        """Find for each of the rows Q×D its ``top_k`` nearest subjects; equal scores in the order of their names.

        ``allowed``: attribute set → whether its subjects take part; None: everyone. ``parallel_map``:
        as ``map``, which may work on several blocks at once.
        """
        found: list[Nearest] = []
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            part = slice(start, start + QUERIES_AT_ONCE)
            tops = [_TopK(self.dim, query, k) for query, k in zip(queries[part], top_k[part], strict=True)]
            score = partial(_score, queries=queries[part], allowed=allowed[part], tops=tops, lock=Lock())
            deque(parallel_map(score, self._blocks), maxlen=0)
            found += [Nearest(top.finish(name), top.searched) for top in tops]
        return found

    def _grow(self) -> Block:
        rows = min(max(sum(len(block.templates) for block in self._blocks), SMALLEST_BLOCK), LARGEST_BLOCK)
        self._blocks.append(Block(rows, self.dim))
        return self._blocks[-1]


def checksum(templates: Ints, vectors: Floats) -> int:
    """Return a number that depends on which template has which bits, not on their order; it can be summed."""
    bits = np.ascontiguousarray(vectors, np.float32).view(np.uint32).astype(np.uint64)
    weights = np.arange(1, bits.shape[1] + 1, dtype=np.uint64)
    total: int = ((bits * weights).sum(axis=1) * templates.astype(np.uint64)).sum(dtype=np.uint64).item()
    return total


def _score(block: Block, queries: Floats, allowed: Sequence[Allowed | None], tops: Sequence[_TopK], lock: Lock) -> None:
    """Score one block for every query, and let each take in its best."""
    masks = [_mask(block, sets) for sets in allowed]
    counts = [block.live if mask is None else int(np.count_nonzero(mask)) for mask in masks]
    sparse = [mask is not None and count * SPARSE < block.used for mask, count in zip(masks, counts, strict=True)]
    dense = [i for i, count in enumerate(counts) if count and not sparse[i]]
    scores = dict(zip(dense, products(block.vectors, block.used, queries[dense]), strict=True))
    for i, (top, mask) in enumerate(zip(tops, masks, strict=True)):
        rows = None
        if mask is not None and sparse[i]:
            rows = np.flatnonzero(mask)
            scores[i] = _gathered(block.vectors, rows, queries[i])
        elif mask is not None and i in scores:
            scores[i][~mask] = -np.inf
        with lock:
            top.searched += counts[i]
            if counts[i]:
                top.take(block, scores[i], rows)


def products(vectors: Floats, used: int, queries: Floats) -> Floats:
    """Compute the scalar products Q×``used`` of each query with the first rows; ``vectors`` has whole tiles of rows.

    How the product is cut decides its speed, not its result: one call a query is a dot product a row, at the speed
    of memory; for several, a tile of rows stays in the cache while every query passes over it.
    """
    if len(queries) < FEW:
        made = [np.matmul(vectors[:used, None, :], query)[:, 0] for query in queries]
        return np.stack(made) if made else np.zeros((0, used), np.float32)
    tiles = vectors[: -(-used // TILE) * TILE].reshape(-1, TILE, vectors.shape[1])
    scores: Floats = np.matmul(tiles, queries.T).reshape(-1, len(queries))[:used]
    return np.ascontiguousarray(scores.T)


def _gathered(vectors: Floats, rows: NDArray[np.intp], query: Floats) -> Floats:
    """Compute scalar products with some rows, gathered a cacheful at a time."""
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), GATHERED):
        part = vectors[rows[start : start + GATHERED]]
        scores[start : start + GATHERED] = np.matmul(part[:, None, :], query)[:, 0]
    return scores


class _TopK:
    """Accumulate one query's nearest rows. ``cutoff``: no row that scores lower can still be among them."""

    def __init__(self, dim: int, query: Floats, top_k: int) -> None:
        self.query = query.astype(np.float64)
        self.margin = 2 * dim * 2.0**-24 * LONGEST * float(np.linalg.norm(self.query))
        self.top_k = top_k
        self.cutoff = float(LOWEST)
        self.searched = 0
        self.kept: list[tuple[Block, NDArray[np.intp], Floats]] = []
        """Block, rows, scores in float32."""

    def take(self, block: Block, scores: Floats, rows: NDArray[np.intp] | None) -> None:
        """Take in a block's scores; ``rows``: which they belong to, None for the first ones in order."""
        if self.cutoff == LOWEST:
            subjects = block.subjects[: block.used] if rows is None else block.subjects[rows]
            self._raise(scores, subjects)
        hits = np.flatnonzero(scores >= np.float32(self.cutoff))
        if not len(hits):
            return
        self.kept.append((block, hits if rows is None else rows[hits], scores[hits]))
        scores = np.concatenate([part for _, _, part in self.kept])
        self._raise(scores, np.concatenate([block.subjects[rows] for block, rows, _ in self.kept]))

    def finish(self, name: Callable[[int], str]) -> list[Scored]:
        """Score what is left exactly."""
        scores, subjects, templates = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for block, rows, rough in self.kept:
            rows = rows[rough >= np.float32(self.cutoff)]
            for start in range(0, len(rows), AT_ONCE):
                part = rows[start : start + AT_ONCE]
                scores.append((block.vectors[part] * self.query).sum(axis=1))
                subjects.append(block.subjects[part])
                templates.append(block.templates[part])
        score, subject, template = (np.concatenate(parts) for parts in (scores, subjects, templates))
        order = np.lexsort((template, -score))
        _, first = np.unique(subject[order], return_index=True)
        best = order[np.sort(first)]
        if len(best) > self.top_k:
            best = best[score[best] >= score[best[self.top_k - 1]]]
        found = [(float(score[i]), int(subject[i]), int(template[i])) for i in best]
        return sorted(found, key=lambda one: (-one[0], name(one[1])))[: self.top_k]

    def _raise(self, scores: Floats, subjects: Ints) -> None:
        """Raise the cutoff to below the ``top_k``-th best subject among these, by what float32 may be wrong."""
        rows = min(len(scores), 4 * self.top_k)
        while rows >= self.top_k:
            top = np.argpartition(scores, len(scores) - rows)[len(scores) - rows :]
            order = top[np.argsort(-scores[top])]
            _, first = np.unique(subjects[order], return_index=True)
            if len(first) >= self.top_k:
                last = float(scores[order[np.sort(first)[self.top_k - 1]]])
                self.cutoff = max(self.cutoff, last - self.margin - 2.0**-23)
                return
            if rows == len(scores):
                return
            rows = min(len(scores), 4 * rows)


def _mask(block: Block, allowed: Allowed | None) -> NDArray[np.bool_] | None:
    """Say which rows take part; None: all."""
    if allowed is not None:
        mask: NDArray[np.bool_] = allowed[block.sets[: block.used]]
        return mask
    if block.live == block.used:
        return None
    alive: NDArray[np.bool_] = block.templates[: block.used] > 0
    return alive
