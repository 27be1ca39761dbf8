"""Demographics: error rates of the people who share a label, at the thresholds that were found over everyone.

That is what a deployment does: one threshold for all, and whether it treats groups alike is a question of its own
(NISTIR 8280, Grother, Ngan and Hanaoka 2019, compares false match rates of groups in the same way).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pkd.toolkit.certificate import OperatingPoint
from pkd.toolkit.evaluation.bootstrap import interval
from pkd.toolkit.evaluation.labels import Labels
from pkd.toolkit.evaluation.pairs import Doubles, Floats, Ints, Mask, Pairing
from pkd.toolkit.evaluation.rates import EXPECTED, fmr_at, matching, smallest_fmr
from pkd.toolkit.evaluation.results import LabelFile
from pkd.toolkit.evaluation.scores import PairScores, score_pairs
from pkd.toolkit.groups import Attribute, Group, GroupRates

NAMED = 10
"""How many identities without a value are named."""
_BLOCK = 2048


@dataclass(frozen=True)
class Part:
    """The images of one group: ``pairing`` over its own identities, rows of both sides' vectors."""

    attribute: str
    value: str
    pairing: Pairing
    query: Ints
    gallery: Ints
    images: int


@dataclass(frozen=True)
class Groups:
    """How one pairing falls into groups. Needs no embedding."""

    labels: Labels
    unlabelled: dict[str, tuple[str, ...]]
    """Attribute → the identities without a value, in alphabetical order."""
    parts: tuple[Part, ...]

    @property
    def record(self) -> LabelFile:
        """What report.json says of the labels."""
        named = {attribute: names[:NAMED] for attribute, names in self.unlabelled.items()}
        return LabelFile(name=self.labels.name, sha256=self.labels.sha256, unlabelled=named)


def divide(labels: Labels, identities: Sequence[str], pairing: Pairing, *, one_set: bool) -> Groups:
    """The sub-pairing of every value of every attribute. ``identities``: the names that ``pairing`` numbers.

    ``one_set``: both sides are the same images, which are counted once. Raises InputError for labels of people that
    are not in the set.
    """
    labels.check(identities)
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
    resamples: int,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[Attribute, ...]:
    """Rates of every group at the thresholds of ``points``, which were found over everyone.

    ``query``, ``gallery``: float32 unit rows of the whole pairing. ``scores``: of the whole pairing, which the ratios
    are to. ``advance`` is told how many groups are done.
    """
    everyone = fmr_at(scores, np.array([point.threshold for point in points])).tolist() if points else []
    found: dict[str, list[Group]] = {attribute: [] for attribute in groups.labels.attributes}
    for part in groups.parts:
        scored = None
        if points and part.pairing.genuine_pairs + part.pairing.impostor_pairs:
            scored = score_pairs(part.pairing, query[part.query], gallery[part.gallery], seed=seed)
        found[part.attribute].append(_group(part, scored, points, everyone, resamples=resamples, seed=seed))
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
    *,
    resamples: int,
    seed: int,
) -> Group:
    p = part.pairing
    smallest = smallest_fmr(p)
    rates: tuple[GroupRates, ...] = ()
    if scores:
        rates = _rates(scores, points, everyone, smallest, resamples=resamples, seed=seed)
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
    *,
    resamples: int,
    seed: int,
) -> tuple[GroupRates, ...]:
    p = scores.pairing
    thresholds = np.array([point.threshold for point in points])
    resolved = [smallest * (1 - 1e-9) <= point.fmr for point in points]
    genuine = int((p.genuine_per_identity > 0).sum()) >= EXPECTED
    weights = _draws(p, resamples, seed, impostors=any(resolved), genuine=genuine)
    measured = fmr_at(scores, thresholds) if any(resolved) else np.zeros(len(points))
    false = _drawn_fmr(scores, thresholds, weights) if any(resolved) else np.zeros((0, len(points)))
    rejected = _rejected(scores, thresholds)
    per_identity = p.genuine_per_identity
    has = per_identity > 0
    balanced = np.where(has, rejected / np.maximum(per_identity, 1), 0.0)

    made = []
    for k, point in enumerate(points):
        fmr = fmr_ci = raw = raw_ci = level = level_ci = None
        if resolved[k]:
            low, high = interval(false[:, k])
            fmr, fmr_ci = max(float(measured[k]), smallest), (low, max(high, smallest, float(measured[k])))
        if genuine:
            level = float(balanced[k].sum() / has.sum())
            level_ci = interval((weights @ balanced[k]) / (weights @ has))
            raw = float(rejected[k].sum() / per_identity.sum())
            raw_ci = interval((weights @ rejected[k]) / (weights @ per_identity))
        made.append(
            GroupRates(
                target_fmr=point.fmr,
                threshold=point.threshold,
                fmr=fmr,
                fmr_ci95=fmr_ci,
                fmr_is_upper_bound=fmr is not None and bool(measured[k] < smallest),
                fmr_ratio=_ratio(fmr, everyone[k]),
                fnmr_balanced=level,
                fnmr_balanced_ci95=level_ci,
                fnmr_balanced_ratio=_ratio(level, 1 - point.tar_balanced),
                fnmr=raw,
                fnmr_ci95=raw_ci,
            )
        )
    return tuple(made)


def _draws(pairing: Pairing, resamples: int, seed: int, *, impostors: bool, genuine: bool) -> Doubles:
    """R×I: how often each identity was drawn. A draw without the pairs that are asked for is drawn again."""
    random = np.random.default_rng(seed)
    count = pairing.identities
    even = np.full(count, 1 / count)
    has = pairing.genuine_per_identity > 0
    drawn = random.multinomial(count, even, resamples).astype(np.float64)
    for weight in drawn:
        while (impostors and pairing.impostor_weight(weight) <= 0) or (genuine and not weight[has].any()):
            weight[:] = random.multinomial(count, even)
    return drawn


def _rejected(scores: PairScores, thresholds: Doubles) -> Doubles:
    """K×I: genuine pairs of each identity below each threshold."""
    accepted = matching(scores.genuine, thresholds)
    owners, count = scores.genuine_identity, scores.pairing.identities
    return np.array([np.bincount(owners[n:], minlength=count) for n in accepted], np.float64)


def _drawn_fmr(scores: PairScores, thresholds: Doubles, weights: Doubles) -> Doubles:
    """R×K: FMR at each (rising) threshold in each draw: Σ mass·draws(a)·draws(b) over the pairs at or above it.

    Pairs of the same two people are added up first, so that the work depends on people and not on images.
    """
    last = matching(scores.impostor, thresholds)
    query, gallery = scores.impostor_identities
    count = scores.pairing.identities
    level = np.searchsorted(-last, -np.arange(last.max(initial=0)), "left") - 1  # the highest threshold it reaches
    a, b = query[: len(level)], gallery[: len(level)]
    codes = (level * count + np.minimum(a, b)) * count + np.maximum(a, b)
    distinct, place = np.unique(codes, return_inverse=True)
    mass = np.bincount(place, scores.mass[: len(level)], minlength=len(distinct))
    rest, second = np.divmod(distinct, count)
    levels, first = np.divmod(rest, count)
    drawn = np.ascontiguousarray(weights.T, np.float32)  # small whole numbers: exact
    sums = np.zeros((len(thresholds), len(weights)))
    for start in range(0, len(distinct), _BLOCK):
        here = slice(start, start + _BLOCK)
        product = drawn[first[here]]
        product *= drawn[second[here]]
        chosen = np.zeros((len(thresholds), len(product)), np.float32)
        chosen[levels[here], np.arange(len(product))] = mass[here]
        sums += chosen @ product
    totals = np.array([scores.pairing.impostor_weight(weight) for weight in weights])
    reached = np.cumsum(sums[::-1], axis=0)[::-1]  # what reaches a threshold reaches the lower ones
    return np.minimum(reached / totals, 1.0).T


def _ratio(rate: float | None, everyone: float) -> float | None:
    return rate / everyone if rate is not None and everyone > 0 else None
