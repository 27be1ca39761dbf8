"""Read and score template pairs that a list names, millions of them.

The format is that of ``ijbc_template_pair_label.txt`` (IJB-B and IJB-C 1:1 as InsightFace's ``eval_ijbc.py`` reads
it): one pair a line, ``template template label``, label 1 where both are of one subject. The first template is
the enrolled one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.metrics.pair_scores import BINS, KEEP, PairScores, bin_of, strata_of
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats, Ints, Mask, Pairing

Ids = NDArray[np.int32]
READ = 1 << 24
"""Bytes of the list that are parsed at a time."""
BLOCK = 1 << 15
"""Pairs that are scored at a time: 128 MB of 512-d vectors."""
_DIGITS = np.zeros(256, bool)
_DIGITS[list(b"0123456789")] = True
_SPACE = np.zeros(256, bool)
_SPACE[list(b" \t\r\n")] = True


@dataclass(frozen=True, kw_only=True)
class ListedPairs(Pairing):
    """Compare P listed pairs of templates. ``query``, ``gallery``: the identity of every template, on either side."""

    first: Ids
    """P: query template of each pair."""
    second: Ids
    """P: gallery template of each pair."""
    same: Mask
    """P: True where both are of one identity."""

    @cached_property
    def left_out(self) -> tuple[Ints, Ints]:
        """Return no pairs: the list says what is compared."""
        return np.empty(0, np.int64), np.empty(0, np.int64)

    @cached_property
    def per_query(self) -> Doubles:
        """Count the impostor pairs of each identity, as the query."""
        return self._count(self.query[self.first[~self.same]])

    @cached_property
    def per_gallery(self) -> Doubles:
        """Count the impostor pairs of each identity, in the gallery."""
        return self._count(self.gallery[self.second[~self.same]])

    @cached_property
    def genuine_per_identity(self) -> Doubles:
        """Count the genuine pairs of each identity."""
        return self._count(self.query[self.first[self.same]])

    @cached_property
    def people(self) -> tuple[Ids, Ids, Doubles]:
        """List every pair of different identities a < b that is compared, and its number of pairs."""
        a, b = self.query[self.first[~self.same]], self.gallery[self.second[~self.same]]
        codes, count = np.unique(np.minimum(a, b) * self.identities + np.maximum(a, b), return_counts=True)
        low, high = np.divmod(codes, self.identities)
        return low.astype(np.int32), high.astype(np.int32), count.astype(np.float64)

    @cached_property
    def identity_pairs_per_identity(self) -> Doubles:
        """Count for each identity the others that it is compared with."""
        a, b, _ = self.people
        return self._count(np.concatenate([a, b]).astype(np.int64))

    @cached_property
    def impostor_pairs_per_identity(self) -> Doubles:
        """Count the impostor pairs of each identity, on either side."""
        return self.per_query + self.per_gallery

    def impostor_weight(self, multiplicity: Doubles) -> float:
        """Sum multiplicity[a]·multiplicity[b] over all impostor pairs."""
        a, b, count = self.people
        weight = np.take(multiplicity, a)
        weight *= np.take(multiplicity, b)
        return float(weight @ count)

    def identity_pair_weight(self, multiplicity: Doubles) -> float:
        """Sum multiplicity[a]·multiplicity[b] over the pairs of different identities that are compared."""
        a, b, _ = self.people
        return float(np.take(multiplicity, a) @ np.take(multiplicity, b))

    def pairs_between(self, a: Ints, b: Ints) -> Doubles:
        """Count the listed pairs of each two identities that the list compares."""
        low, high, count = self.people
        codes = low.astype(np.int64) * self.identities + high
        return count[np.searchsorted(codes, self._code(a, b))]

    def _count(self, identity: Ints) -> Doubles:
        return np.bincount(identity, minlength=self.identities).astype(np.float64)


def listed(first: Ids, second: Ids, same: Mask, subject: Ints) -> ListedPairs:
    """Build listed pairs. ``subject``: int64, one per template. Identities count those that occur in the list."""
    used = np.zeros(int(subject.max()) + 1, bool)
    used[subject[first]] = used[subject[second]] = True
    identity = np.where(used[subject], (np.cumsum(used) - 1)[subject], 0)
    rows = np.arange(len(subject))
    return ListedPairs(
        identity, identity, rows, rows, int(used.sum()), first=first, second=second, same=same, unordered=False
    )


def score_listed(
    pairs: ListedPairs,
    query: Floats,
    gallery: Floats,
    *,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> PairScores:
    """Score every listed pair by its cosine. ``query``, ``gallery``: float32 T×D unit rows of all templates.

    Impostors thin out downwards as in ``score_pairs``. Memory: 13 bytes a pair, 16 more while they are sorted.
    ``advance`` is told the pairs done.
    """
    scores = np.empty(len(pairs.first), np.float32)
    for start in range(0, len(scores), BLOCK):
        here = slice(start, start + BLOCK)
        np.einsum("nd,nd->n", query[pairs.first[here]], gallery[pairs.second[here]], out=scores[here])
        advance(len(scores[here]))

    genuine, impostor = _descending(scores, pairs.same), _descending(scores, ~pairs.same)
    histogram = np.zeros(BINS, np.int64)
    for start in range(0, len(impostor), READ):
        histogram += np.bincount(bin_of(scores[impostor[start : start + READ]]), minlength=BINS)
    weight, cut = np.ones(len(impostor)), -np.inf
    if len(impostor) > 2 * KEEP:
        strata = strata_of(scores[impostor], len(impostor))
        random = np.random.default_rng(seed)
        impostor = impostor[random.random(len(impostor)) < strata.rate[strata.of(scores[impostor])]]
        weight, cut = strata.weights(scores[impostor], histogram), float(strata.lowest[0])
    return PairScores(
        pairing=pairs,
        genuine=scores[genuine],
        genuine_query=pairs.first[genuine],
        genuine_gallery=pairs.second[genuine],
        impostor=scores[impostor],
        impostor_query=pairs.first[impostor],
        impostor_gallery=pairs.second[impostor],
        weight=weight,
        cut=cut,
        histogram=histogram,
    )


def read_pair_labels(path: Path, ids: Ints) -> tuple[Ids, Ids, Mask]:
    """Read a template pair list → first, second (rows of the ascending template ``ids``) and same.

    Raises InputError naming the line that is malformed, names an unknown template, or pairs a template with itself.
    """
    firsts, seconds, labels = [], [], []
    line = 1
    for numbers, lines in _numbers(path):
        rows = np.minimum(np.searchsorted(ids, numbers[:, :2]), len(ids) - 1)
        unknown = (ids[rows] != numbers[:, :2]).any(axis=1)
        for bad, what in (
            (unknown, "names a template that has no faces"),
            (numbers[:, 2] > 1, "has a label other than 0 and 1"),
            (rows[:, 0] == rows[:, 1], "pairs a template with itself"),
        ):
            if bad.any():
                at = int(np.flatnonzero(bad)[0])
                said = " ".join(map(str, numbers[at].tolist()))
                raise InputError(f"{path}: about line {line + at:,}: {said!r} {what}. Use the files of one data set.")
        firsts.append(rows[:, 0].astype(np.int32))
        seconds.append(rows[:, 1].astype(np.int32))
        labels.append(numbers[:, 2] == 1)
        line += lines
    if not firsts:
        raise InputError(f"{path}: empty. Copy it again.")
    return np.concatenate(firsts), np.concatenate(seconds), np.concatenate(labels)


def _numbers(path: Path) -> Iterator[tuple[Ints, int]]:
    """Read blocks of lines of three numbers → int64 K×3, and the number of lines."""
    line, rest = 1, b""
    try:
        with path.open("rb") as file:
            while block := file.read(READ):
                text, newline, tail = (rest + block).rpartition(b"\n")
                rest = tail
                if newline:
                    yield from _parsed(path, text + b"\n", line)
                    line += text.count(b"\n") + 1
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. Make it readable.") from None
    yield from _parsed(path, rest + b"\n", line)


def _parsed(path: Path, text: bytes, line: int) -> Iterator[tuple[Ints, int]]:
    data = np.frombuffer(text, np.uint8)
    blank = _SPACE[data]
    begins = ~blank & np.concatenate([[True], blank[:-1]])
    ends = np.flatnonzero(data == ord("\n"))
    fields = np.diff(np.cumsum(begins)[ends], prepend=0)
    foreign = np.flatnonzero(~blank & ~_DIGITS[data])
    odd = np.flatnonzero((fields != 3) & (fields != 0))
    if len(foreign) or len(odd):
        first = min([np.searchsorted(ends, foreign[0]), *odd[:1]] if len(foreign) else odd[:1])
        said = text.split(b"\n")[int(first)][:60].decode("utf-8", "replace")
        raise InputError(f"{path}:{line + int(first)}: expected 'template template label', found {said!r}.")
    if begins.any():
        yield np.fromstring(text, np.int64, sep=" ").reshape(-1, 3), len(ends)


def _descending(scores: Floats, chosen: Mask) -> Ints:
    places = np.flatnonzero(chosen)
    return places[np.argsort(-scores[places], kind="stable")]
