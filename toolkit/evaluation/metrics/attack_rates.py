"""Choose the threshold of an attack detector on some subjects, and measure APCER and BPCER on others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.certificates.attack_detection import Classified
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.metrics.intervals import effective, proportion_interval

Scores = NDArray[np.float32]
FEWEST = 2
"""Fewest subjects of each kind, where a threshold is chosen and where it is measured."""


@dataclass(frozen=True)
class Presentations:
    """Hold the scores of one kind of presentation: N, and whom each shows."""

    scores: Scores
    subjects: NDArray[np.str_]

    def of(self, people: set[str]) -> Presentations:
        """Take the presentations of some people."""
        kept = np.isin(self.subjects, sorted(people))
        return Presentations(self.scores[kept], self.subjects[kept])


def split_subjects(kinds: Mapping[str, Presentations], seed: int) -> tuple[set[str], set[str]]:
    """Halve the people, so that nobody is in both halves under any kind, and each kind has people in both.

    Raises InputError for a kind of fewer than four subjects.
    """
    rng = np.random.default_rng(seed)
    choosing, measured = set[str](), set[str]()
    for name, kind in sorted(kinds.items(), key=lambda item: len(np.unique(item[1].subjects))):
        people = np.unique(kind.subjects)
        if len(people) < 2 * FEWEST:
            raise InputError(f"{name}: shows {len(people)} subjects, at least {2 * FEWEST} are needed. Add people.")
        for one in rng.permutation([person for person in people.tolist() if person not in choosing | measured]):
            here, there = (len(side & set(people.tolist())) for side in (choosing, measured))
            (choosing if here < there else measured).add(str(one))
        if min(len(side & set(people.tolist())) for side in (choosing, measured)) < FEWEST:
            raise InputError(f"{name}: its people cannot be halved beside the other kinds'. Add people.")
    return choosing, measured


def choose_threshold(attacks: Mapping[str, Presentations], target_apcer: float) -> float:
    """Find the smallest threshold where no species is classified as bona fide more often than ``target_apcer``."""
    needed = []
    for kind in attacks.values():
        falling = np.sort(kind.scores)[::-1]
        allowed = int(np.floor(target_apcer * len(falling) + 1e-9))
        needed.append(float(np.nextafter(falling[allowed], np.float32(np.inf))))
    return max(needed)


def rate_of(wrong: NDArray[np.bool_], subjects: NDArray[np.str_]) -> Classified:
    """Compute the share of wrong decisions with its 95 % interval: those of one subject fail together."""
    people, place = np.unique(subjects, return_inverse=True)
    counts = np.bincount(place)
    failed = np.bincount(place, weights=wrong)
    rate, many = float(wrong.mean()), len(people)
    variance = float(((failed - rate * counts) ** 2).sum() / len(wrong) ** 2 * many / max(1, many - 1))
    low, high = proportion_interval(rate, variance, effective(counts.astype(np.float64)))
    return Classified(presentations=len(wrong), subjects=many, rate=rate, ci95=(low, high))
