"""Searches of a gallery: what one-to-many identification compares, streamed in blocks, never as an N×M array.

A search compares one probe with everyone enrolled. A person's score is the highest of that person's entries. A search
is mated where the probe's person is enrolled (ISO/IEC 19795-1, closed and open set identification).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pkd.toolkit.evaluation.metrics.pairing import Floats, Ints, Mask, Pairing

_BLOCK = 1 << 22
"""Scores of a block of searches: 16 MB."""


@dataclass(frozen=True)
class Plan:
    """Which entries are enrolled and which are searched. int64 indices into the gallery side and the probe side."""

    enrolled: Ints
    searched: Ints
    left_out: int
    """Probes that are not searched, for they are enrolled themselves (the same bytes)."""


@dataclass(frozen=True)
class Searches:
    """Q searches. All arrays have one entry per search."""

    identity: Ints
    """Person of the probe."""
    mated: Mask
    best: Floats
    """Highest score of anyone enrolled."""
    mate: Floats
    """Score of the probe's own person; −inf where not enrolled."""
    rank: Ints
    """People enrolled who score at or above the mate, the mate included, so that a tie never counts in favour; 0
    where not enrolled."""


def one_gallery(pairing: Pairing) -> list[Plan]:
    """Everyone on the gallery side is enrolled with all images, every probe is searched."""
    return [_plan(pairing, np.arange(len(pairing.gallery)), np.arange(len(pairing.query)))]


def two_galleries(pairing: Pairing, seed: int) -> list[Plan]:
    """The people of one set in two halves at random; each half is enrolled in turn, with one image a person at random.

    All other images are searched: those of the half itself have a mate, those of the other half have none. So everyone
    with two images gives mated searches, and everyone gives searches without a mate (as with the two galleries of
    IJB-C, Maze et al. 2018).
    """
    random = np.random.default_rng(seed)
    labels = pairing.query
    by_content = np.lexsort((pairing.query_file, labels))  # another order of the same images is the same split
    shuffled = by_content[random.permutation(len(labels))]
    people, first = np.unique(labels[shuffled], return_index=True)
    chosen = shuffled[first]
    half = np.zeros(len(people), bool)
    half[random.permutation(len(people))[: len(people) // 2]] = True
    plans = []
    for enrolled in (chosen[half], chosen[~half]):
        plans.append(_plan(pairing, enrolled, np.setdiff1d(np.arange(len(labels)), enrolled)))
    return plans


def search(
    probe: Floats,
    probe_identity: Ints,
    gallery: Floats,
    gallery_identity: Ints,
    *,
    advance: Callable[[int], None] = lambda done: None,
) -> Searches:
    """Search everyone. ``probe``, ``gallery``: float32 Q×D and M×D unit rows with int64 identities, one list of names.

    ``advance`` is told how many probes are done.
    """
    order = np.argsort(gallery_identity, kind="stable")
    people, starts = np.unique(gallery_identity[order], return_index=True)
    entries = gallery[order].T
    place = np.minimum(np.searchsorted(people, probe_identity), len(people) - 1)
    mated = people[place] == probe_identity
    best, mate = np.empty(len(probe), np.float32), np.full(len(probe), -np.inf, np.float32)
    rank = np.zeros(len(probe), np.int64)
    step = max(1, _BLOCK // len(order))
    for start in range(0, len(probe), step):
        here = slice(start, start + step)
        scores = probe[here] @ entries
        if len(people) < len(order):
            scores = np.maximum.reduceat(scores, starts, axis=1)
        best[here] = scores.max(axis=1)
        own = np.flatnonzero(mated[here])
        found = scores[own, place[here][own]]
        mate[start + own] = found
        rank[start + own] = np.count_nonzero(scores[own] >= found[:, None], axis=1)
        advance(len(scores))
    return Searches(probe_identity, mated, best, mate, rank)


def joined(parts: Sequence[Searches]) -> Searches:
    """The searches of several galleries, one after the other."""
    return Searches(
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("identity", "mated", "best", "mate", "rank"))
    )


def _plan(pairing: Pairing, enrolled: Ints, searched: Ints) -> Plan:
    itself = np.isin(pairing.query_file[searched], pairing.gallery_file[enrolled])
    return Plan(enrolled, searched[~itself], int(itself.sum()))
