"""Brute force in float64: every pair in a Python loop, thresholds by trying all. What the fast code must agree with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pkd.toolkit.evaluation.metrics.pairing import Pairing


@dataclass
class Pair:
    """One compared pair."""

    score: float
    query: int
    gallery: int
    weight: float = 1.0

    @property
    def same(self) -> bool:
        return self.query == self.gallery


def all_pairs(pairing: Pairing, query: np.ndarray, gallery: np.ndarray, weight: np.ndarray | None = None) -> list[Pair]:
    """Every pair that counts. ``weight``: draws of each identity; copies of one identity are never paired."""
    found = []
    for i in range(len(pairing.query)):
        for j in range(len(pairing.gallery)):
            if pairing.query_file[i] == pairing.gallery_file[j] or (pairing.unordered and j <= i):
                continue
            a, b = int(pairing.query[i]), int(pairing.gallery[j])
            w = 1.0 if weight is None else float(weight[a] if a == b else weight[a] * weight[b])
            if w:
                found.append(Pair(float(query[i].astype(np.float64) @ gallery[j].astype(np.float64)), a, b, w))
    return found


def fmr(pairs: list[Pair], threshold: float) -> float:
    """Weighted fraction of impostor pairs at or above the threshold."""
    impostors = [p for p in pairs if not p.same]
    return sum(p.weight for p in impostors if p.score >= threshold) / sum(p.weight for p in impostors)


def tar(pairs: list[Pair], threshold: float) -> float:
    """Weighted fraction of genuine pairs at or above the threshold."""
    genuine = [p for p in pairs if p.same]
    return sum(p.weight for p in genuine if p.score >= threshold) / sum(p.weight for p in genuine)


def tar_balanced(pairs: list[Pair], threshold: float) -> float:
    """Mean over drawn identities of the fraction of their genuine pairs at or above the threshold."""
    people = {p.query: p.weight for p in pairs if p.same}
    rate = {a: np.mean([p.score >= threshold for p in pairs if p.same and p.query == a]) for a in people}
    return float(sum(people[a] * rate[a] for a in people) / sum(people.values()))


def fmr_balanced(pairs: list[Pair], threshold: float) -> float:
    """Mean over pairs of different people of the fraction of their image pairs at or above the threshold."""
    people: dict[frozenset[int], list[Pair]] = {}
    for p in pairs:
        if not p.same:
            people.setdefault(frozenset((p.query, p.gallery)), []).append(p)
    rates = [(found[0].weight, np.mean([p.score >= threshold for p in found])) for found in people.values()]
    return float(sum(w * rate for w, rate in rates) / sum(w for w, _ in rates))


def threshold_at(pairs: list[Pair], target: float, rate: Callable[[list[Pair], float], float] = fmr_balanced) -> float:
    """Smallest float32 threshold with FMR ≤ target, tried at every score and just above it."""
    scores = sorted({p.score for p in pairs if not p.same})
    tried = [-np.inf, *(float(np.nextafter(np.float32(s), np.float32(np.inf))) for s in scores)]
    return next(t for t in tried if rate(pairs, t) <= target * (1 + 1e-9))


def equal_error_rate(pairs: list[Pair]) -> float:
    """Smallest over all thresholds of the larger error."""
    tried = [*sorted({p.score for p in pairs}), np.inf]
    return min(max(fmr(pairs, t), 1 - tar(pairs, t)) for t in tried)
