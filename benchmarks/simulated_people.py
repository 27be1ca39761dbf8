"""Simulate people who differ as real ones do: for the benchmarks of intervals, of paired tests and of the gate.

People are centres on a sphere with images about them; how far differs from person to person (log-normal).
``SCENARIOS`` says how they differ otherwise. No seed below ``FRESH`` is drawn: those were seen while the methods were
chosen.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pkd.toolkit.evaluation.metrics.pair_scores import BINS, PairScores
from pkd.toolkit.evaluation.metrics.pairing import Floats, Ints, Pairing

DIM, AVERAGE = 16, 4
STEP = 256
"""Rows of a tile of scores."""
FRESH = 20_000
"""First trial of every row."""


@dataclass(frozen=True)
class Scenario:
    """How people differ."""

    within: float = 0.45
    """Typical distance of an image from its person's centre."""
    power_law: bool = False
    """Images a person: P(n) ∝ n^-1.5 up to 30; else 1 + Poisson(3)."""
    wolves: float = 0.0
    """Fraction whom many resemble."""
    unlike: float = 0.0
    """Fraction whom nobody resembles."""
    families: float = 0.0
    """Fraction with a relative in the sample."""
    levels: int = 0
    """Values that a coordinate may have; 0: any. Few make scores tie."""
    cameras: bool = False
    """Half of the images are of a camera that moves them all the same way."""
    mislabelled: float = 0.0
    """Fraction of people who stand under two names."""


SCENARIOS = {
    "alike": Scenario(),
    "near one": Scenario(within=0.25),
    "power law": Scenario(power_law=True),
    "wolves": Scenario(power_law=True, wolves=0.04, unlike=0.1),
    "families": Scenario(power_law=True, families=0.2),
    "ties": Scenario(levels=3),
    "cameras": Scenario(cameras=True),
    "labels": Scenario(mislabelled=0.01),
}


def embeddings(
    scenario: Scenario, people: int, seed: int, *, encoder: int = 0, noise: float = 0.15
) -> tuple[Floats, Ints]:
    """Draw unit vectors of fresh people, with the name that each image stands under.

    ``encoder``: 0 or 1; each sees every image a little differently, by ``noise``: equally good where it is the same.
    """
    random = np.random.default_rng(seed)
    centres = random.standard_normal((people, DIM))
    common = np.full(DIM, 0.3)
    kind = random.random(people)
    strength = np.where(kind < scenario.wolves, 0.45, 1.0)[:, None]
    centres = strength * centres + np.where(kind > 1 - scenario.unlike, -1.0, 1.0)[:, None] * common
    related = random.random(people) < scenario.families
    relatives = np.flatnonzero(related)[: np.count_nonzero(related) // 2 * 2].reshape(-1, 2)
    centres[relatives[:, 1]] = 0.8 * centres[relatives[:, 0]] + 0.6 * centres[relatives[:, 1]]
    if scenario.power_law:
        chances = np.arange(1, 31) ** -1.5
        counts = random.choice(np.arange(1, 31), people, p=chances / chances.sum())
    else:
        counts = 1 + random.poisson(AVERAGE - 1, people)
    labels = np.repeat(np.arange(people), counts)
    within = scenario.within * np.exp(0.5 * random.standard_normal(people))
    vectors = centres[labels] + within[labels, None] * random.standard_normal((len(labels), DIM))
    if scenario.cameras:
        vectors += 0.35 * random.integers(0, 2, len(labels))[:, None] * np.sign(np.arange(DIM) - DIM / 2 + 0.5)
    vectors += noise * np.random.default_rng([seed, encoder]).standard_normal(vectors.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if scenario.levels:
        vectors = np.round(vectors * scenario.levels * 2) / (scenario.levels * 2)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    if scenario.mislabelled:
        twice = random.random(people) < scenario.mislabelled * 2
        labels = np.where(twice[labels] & (random.random(len(labels)) < 0.5), labels + people, labels)
        labels = np.unique(labels, return_inverse=True)[1]
    return vectors.astype(np.float32), labels.astype(np.int64)


def scored(vectors: Floats, labels: Ints, lowest: float, *, gallery: Floats | None = None) -> PairScores:
    """Score all pairs and keep the impostors at or above ``lowest``: no rate of interest lies below them.

    ``gallery``: what another encoder makes of the images; of every two the second is then embedded by it.
    """
    order = np.argsort(labels, kind="stable")
    other = (vectors if gallery is None else gallery)[order]
    vectors, labels = vectors[order], labels[order]
    files, parts = np.arange(len(labels)), []
    own_first, own_second = _genuine(labels)
    for top in range(0, len(labels), STEP):
        scores = vectors[top : top + STEP] @ other[top:].T
        high, column = np.divmod(np.flatnonzero(scores >= lowest), scores.shape[1])
        row, column = top + high, top + column
        impostor = (row < column) & (labels[row] != labels[column])
        own = slice(*np.searchsorted(own_first, (top, top + STEP)))
        row, column = np.append(own_first[own], row[impostor]), np.append(own_second[own], column[impostor])
        parts.append((scores[row - top, column - top], row, column))
    kept, first, second = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(-kept, kind="stable")
    kept, first, second = kept[order], first[order].astype(np.int32), second[order].astype(np.int32)
    same = labels[first] == labels[second]
    return PairScores(
        pairing=Pairing(labels, labels, files, files, int(labels.max()) + 1, unordered=True),
        genuine=kept[same],
        genuine_query=first[same],
        genuine_gallery=second[same],
        impostor=kept[~same],
        impostor_query=first[~same],
        impostor_gallery=second[~same],
        weight=np.ones(np.count_nonzero(~same)),
        cut=-np.inf,
        histogram=np.zeros(BINS, np.int64),
    )


def _genuine(labels: Ints) -> tuple[Ints, Ints]:
    """List every pair of images of one name, i < j in ascending order of i; ``labels`` ascend."""
    place = np.arange(len(labels))
    later = np.searchsorted(labels, labels, "right") - place - 1
    first = np.repeat(place, later)
    second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(later) - later, later)
    return first, second


def seeds(name: str, people: int, trials: int | range) -> Iterator[int]:
    """List the seeds of a row's trials; no two rows share people."""
    base = zlib.crc32(f"{name}/{people}".encode()) * 10**5 + FRESH
    yield from (base + trial for trial in (trials if isinstance(trials, range) else range(trials)))
