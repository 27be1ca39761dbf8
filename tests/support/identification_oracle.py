"""Identification by brute force in float64: every search a Python loop over everyone enrolled, all thresholds tried."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Candidates:
    """One search: who is enrolled, best first, ties with the mate before it."""

    identity: int
    mate: float | None
    rank: int
    best: float


def searches(
    probe: np.ndarray, probe_identity: np.ndarray, gallery: np.ndarray, gallery_identity: np.ndarray
) -> list[Candidates]:
    """Every probe against every person, whose score is the highest of their entries."""
    found = []
    for vector, identity in zip(probe.astype(np.float64), probe_identity.tolist(), strict=True):
        score: dict[int, float] = {}
        for entry, person in zip(gallery.astype(np.float64), gallery_identity.tolist(), strict=True):
            score[person] = max(score.get(person, -np.inf), float(vector @ entry))
        mate = score.get(identity)
        rank = 0 if mate is None else sum(s >= mate for s in score.values())
        found.append(Candidates(identity, mate, rank, max(score.values())))
    return found


def weights(found: list[Candidates], drawn: np.ndarray, *, balanced: bool) -> list[float]:
    """Compute what each search weighs among those of its kind."""
    made = []
    for one in found:
        alike = sum(o.identity == one.identity and (o.mate is None) == (one.mate is None) for o in found)
        made.append(float(drawn[one.identity]) / (alike if balanced else 1))
    return made


def rank_rate(found: list[Candidates], weight: list[float], rank: int) -> float:
    """Fraction of mated searches with the mate within ``rank``."""
    mated = [(one, w) for one, w in zip(found, weight, strict=True) if one.mate is not None]
    return sum(w for one, w in mated if one.rank <= rank) / sum(w for _, w in mated)


def fpir(found: list[Candidates], weight: list[float], threshold: float) -> float:
    """Fraction of the searches without a mate that return anyone."""
    others = [(one, w) for one, w in zip(found, weight, strict=True) if one.mate is None]
    return sum(w for one, w in others if one.best >= threshold) / sum(w for _, w in others)


def fnir(found: list[Candidates], weight: list[float], threshold: float, within: int) -> float:
    """Fraction of mated searches whose mate is below the threshold or not within the best."""
    mated = [(one, w) for one, w in zip(found, weight, strict=True) if one.mate is not None]
    missed = sum(w for one, w in mated if one.rank > within or not (one.mate is not None and one.mate >= threshold))
    return missed / sum(w for _, w in mated)


def threshold_at(found: list[Candidates], weight: list[float], target: float) -> float:
    """Smallest float32 threshold with FPIR ≤ target, tried just above every score."""
    lowest = float(np.finfo(np.float32).min)
    scores = sorted({one.best for one in found if one.mate is None})
    tried = [lowest, *(float(np.nextafter(np.float32(s), np.float32(np.inf))) for s in scores)]
    return next(t for t in tried if fpir(found, weight, t) <= target * (1 + 1e-9))
