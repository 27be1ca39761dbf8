"""Measure error rates of the people who share a label, at the thresholds that were found over everyone.

A deployment does so: one threshold for all, and whether it treats groups alike is a question of its own
(NISTIR 8280, Grother, Ngan and Hanaoka 2019, compares false match rates of groups in the same way).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pkd.toolkit.certificates.certificate import Attribute, Group, GroupRates, Interval, OperatingPoint
from pkd.toolkit.evaluation.metrics.bootstrap import Bootstrap, bootstrap
from pkd.toolkit.evaluation.metrics.error_rates import EXPECTED, fmr_at, matching, smallest_fmr
from pkd.toolkit.evaluation.metrics.intervals import effective, proportion_interval
from pkd.toolkit.evaluation.metrics.labels import Labels
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores, score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats, Ints, Mask, Pairing
from pkd.toolkit.evaluation.results.schema import LabelFile

NAMED = 10
"""Most identities without a value that are named."""


@dataclass(frozen=True)
class Part:
    """Hold the images of one group: ``pairing`` over its own identities, rows of both sides' vectors."""

    attribute: str
    value: str
    pairing: Pairing
    query: Ints
    gallery: Ints
    images: int


@dataclass(frozen=True)
class Groups:
    """Hold the division of one pairing into groups. Needs no embedding."""

    labels: Labels
    unlabelled: dict[str, tuple[str, ...]]
    """Attribute → the identities without a value, in alphabetical order."""
    parts: tuple[Part, ...]

    @property
    def record(self) -> LabelFile:
        """Return what report.json says of the labels."""
        named = {attribute: names[:NAMED] for attribute, names in self.unlabelled.items()}
        return LabelFile(name=self.labels.name, sha256=self.labels.sha256, unlabelled=named)


def divide(labels: Labels, identities: Sequence[str], pairing: Pairing, *, one_set: bool) -> Groups:
    """Divide a pairing by every value of every attribute. ``identities``: the names that ``pairing`` numbers.

    ``one_set``: both sides are the same images, which are counted once. Raises InputError for labels of people that
    are not in the set.
    """
    labels = labels.matched(identities)
    unlabelled, parts = {}, []
    for attribute in labels.attributes:
        stated = labels.of(attribute, identities)
        unlabelled[attribute] = tuple(sorted(n for n, v in zip(identities, stated, strict=True) if v is None))
        for value in sorted({v for v in stated if v is not None}):
            parts.append(_part(pairing, attribute, value, np.array([v == value for v in stated]), one_set))
    return Groups(labels, unlabelled, tuple(parts))


def measure_groups(
    groups: Groups,
    query: Floats,
    gallery: Floats,
    scores: PairScores,
    points: Sequence[OperatingPoint],
    *,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[Attribute, ...]:
    """Measure every group at the thresholds of ``points``, which were found over everyone.

    ``query``, ``gallery``: float32 unit rows of the whole pairing. ``scores``: of the whole pairing, which the ratios
    are to. ``advance`` is told how many groups are done.
    """
    everyone = fmr_at(scores, np.array([point.threshold for point in points])).tolist() if points else []
    found: dict[str, list[Group]] = {attribute: [] for attribute in groups.labels.attributes}
    for part in groups.parts:
        scored = None
        if points and part.pairing.genuine_pairs + part.pairing.impostor_pairs:
            scored = score_pairs(part.pairing, query[part.query], gallery[part.gallery], seed=seed)
        found[part.attribute].append(_group(part, scored, points, everyone))
        advance(1)
    return tuple(
        Attribute(name=name, unlabelled=len(groups.unlabelled[name]), groups=tuple(found[name]))
        for name in groups.labels.attributes
    )


def _part(pairing: Pairing, attribute: str, value: str, member: Mask, one_set: bool) -> Part:
    own = np.cumsum(member) - 1
    query, gallery = np.flatnonzero(member[pairing.query]), np.flatnonzero(member[pairing.gallery])
    part = Pairing(
        own[pairing.query[query]],
        own[pairing.gallery[gallery]],
        pairing.query_file[query],
        pairing.gallery_file[gallery],
        int(member.sum()),
        unordered=pairing.unordered,
    )
    return Part(attribute, value, part, query, gallery, len(query) if one_set else len(query) + len(gallery))


def _group(
    part: Part,
    scores: PairScores | None,
    points: Sequence[OperatingPoint],
    everyone: Sequence[float],
) -> Group:
    p = part.pairing
    smallest = smallest_fmr(p)
    rates: tuple[GroupRates, ...] = ()
    if scores:
        rates = _rates(scores, points, everyone, smallest)
    return Group(
        value=part.value,
        identities=p.identities,
        images=part.images,
        genuine_identities=int((p.genuine_per_identity > 0).sum()),
        genuine_pairs=p.genuine_pairs,
        impostor_pairs=p.impostor_pairs,
        identity_pairs=p.identity_pairs,
        min_fmr=smallest if smallest <= 1 else None,
        rates=rates,
    )


def _rates(
    scores: PairScores,
    points: Sequence[OperatingPoint],
    everyone: Sequence[float],
    smallest: float,
) -> tuple[GroupRates, ...]:
    thresholds = np.array([point.threshold for point in points])
    false = [_FalseMatches(None, None, False)] * len(points)
    resolved = [smallest * (1 - 1e-9) <= point.fmr for point in points]
    if any(resolved):
        drawn = bootstrap(scores, np.empty(0), thresholds, resamples=0)
        false = [_false_matches(drawn, k, smallest) if resolved[k] else false[k] for k in range(len(points))]
    rejected = _false_non_matches(scores, thresholds)
    return tuple(
        GroupRates(
            target_fmr=point.fmr,
            threshold=point.threshold,
            fmr=false[k].fmr,
            fmr_ci95=false[k].ci95,
            fmr_is_upper_bound=false[k].is_upper_bound,
            fmr_ratio=_ratio(false[k].fmr, everyone[k]),
            fnmr_balanced=rejected[k].balanced,
            fnmr_balanced_ci95=rejected[k].balanced_ci95,
            fnmr_balanced_ratio=_ratio(rejected[k].balanced, 1 - point.tar_balanced),
            fnmr=rejected[k].raw,
            fnmr_ci95=rejected[k].raw_ci95,
        )
        for k, point in enumerate(points)
    )


class _FalseMatches(NamedTuple):
    fmr: float | None
    ci95: Interval | None
    is_upper_bound: bool


class _FalseNonMatches(NamedTuple):
    balanced: float | None
    balanced_ci95: Interval | None
    raw: float | None
    raw_ci95: Interval | None


def _false_matches(drawn: Bootstrap, k: int, smallest: float) -> _FalseMatches:
    """Quote no rate below the smallest that the group resolves: there it is an upper bound."""
    measured, (low, high) = float(drawn.observed_fmr[k]), drawn.fmr_interval(k)
    if measured >= smallest:
        return _FalseMatches(measured, (low, high), False)
    return _FalseMatches(smallest, (low, max(high, smallest)), True)


def _false_non_matches(scores: PairScores, thresholds: Doubles) -> list[_FalseNonMatches]:
    """Measure false non-match rates at fixed thresholds; none for fewer than ``EXPECTED`` people."""
    pairs = scores.pairing.genuine_per_identity
    has = pairs > 0
    if has.sum() < EXPECTED:
        return [_FalseNonMatches(None, None, None, None)] * len(thresholds)
    accepted = matching(scores.genuine, thresholds)
    made = []
    for first in accepted:  # genuine scores descend: those from here on lie below the threshold
        lost = np.bincount(scores.genuine_identity[first:], minlength=len(pairs))
        fractions = lost / np.maximum(pairs, 1)
        balanced, raw = (_rate_over_people(fractions, weight) for weight in (has.astype(np.float64), pairs))
        made.append(_FalseNonMatches(*balanced, *raw))
    return made


def _rate_over_people(fractions: Doubles, weight: Doubles) -> tuple[float, Interval]:
    """Average the fractions of single people, weighted, with the 95 % interval."""
    share = weight / weight.sum()
    rate = float(share @ fractions)
    variance = float(((share * (fractions - rate)) ** 2).sum())
    return rate, proportion_interval(rate, variance, effective(weight))


def _ratio(rate: float | None, everyone: float) -> float | None:
    return rate / everyone if rate is not None and everyone > 0 else None
