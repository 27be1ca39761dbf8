"""Tell who decides the false match rate, who may stand under two names, and what more people would buy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pkd.toolkit.certificates.certificate import OperatingPoint
from pkd.toolkit.evaluation.metrics.bootstrap import Bootstrap
from pkd.toolkit.evaluation.metrics.error_rates import matching, rates
from pkd.toolkit.evaluation.metrics.intervals import proportion_interval, small_rate_interval
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Ints
from pkd.toolkit.evaluation.results.schema import Influence, Planned, Suspects

NAMED = 10
"""Most people, and most pairs of people, that are named."""
ALIKE = 0.25
"""Two names whose images score above the median genuine score in this part of their pairs look like one person."""
MULTIPLES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Sizes of other sets of such people, over that of this one."""


def influential(scores: PairScores, point: OperatingPoint, names: Sequence[str]) -> tuple[Influence, ...]:
    """Name the people who take part in most false matches at an operating point, the share of each with it."""
    matched = slice(0, int(matching(scores.impostor, np.array([point.threshold]))[0]))
    share = scores.share[matched]
    if not share.any():
        return ()
    size = scores.pairing.identities
    part: Doubles = np.zeros(size)
    for side in scores.impostor_identities:
        part += np.bincount(side[matched], share, minlength=size)
    first = np.argsort(-part, kind="stable")[:NAMED]
    return tuple(
        Influence(identity=names[one], share=float(part[one] / share.sum())) for one in first.tolist() if part[one] > 0
    )


def suspects(scores: PairScores, points: Sequence[OperatingPoint], names: Sequence[str]) -> Suspects | None:
    """Find two names that look like one person, and what they do to the rates; None where no two do.

    Two names do where a quarter of their pairs of images score above the median genuine score: of one person's images
    half do. Relatives, twins and look-alikes can. The rates without them are what correct labels would give.
    """
    level = np.array([float(np.median(scores.genuine))])
    high = slice(0, int(matching(scores.impostor, level)[0]))
    codes, place = np.unique(_codes(scores)[high], return_inverse=True)
    alike = codes[np.bincount(place, scores.share[high], minlength=len(codes)) >= ALIKE]
    if not len(alike) or not points:
        return None
    theirs = np.isin(_codes(scores), alike)
    without = replace(scores, weight=np.where(theirs, 0.0, scores.weight))
    point = points[-1]
    matched = slice(0, int(matching(scores.impostor, np.array([point.threshold]))[0]))
    total = scores.share[matched].sum()
    found = rates(without, np.array([point.fmr]))
    order = np.argsort(-np.bincount(place, scores.share[high], minlength=len(codes)), kind="stable")
    listed = [codes[i] for i in order.tolist() if codes[i] in set(alike.tolist())][:NAMED]
    pairs = [divmod(int(code), scores.pairing.identities) for code in listed]
    return Suspects(
        count=len(alike),
        people=tuple((names[a], names[b]) for a, b in pairs),
        fmr=point.fmr,
        share=float(scores.share[matched][theirs[matched]].sum() / total) if total > 0 else 0.0,
        tar_gain=float(found.tar_balanced[0] - point.tar_balanced),
    )


def planned(drawn: Bootstrap, k: int, fmr: float, place: int) -> Planned:
    """Project the intervals at one operating point to sets of fewer and of more such people.

    ``k``: its place among the bootstrap's targets, ``place``: among its thresholds. Of n times as many people the part
    of the variance that people have falls with n, that of pairs with n²; one person's part falls with n, and the
    effective people rise with it.
    """
    v, rate = drawn.variance, float(drawn.observed_fmr[place])
    noise = float(v.resampled[place] - v.total[place])
    over_people = max(float(v.total[place]) - noise, 0.0)
    everyone = drawn.people[1]
    most, width = [], []
    for n in MULTIPLES:
        variance = over_people / n + noise / n**2
        high = small_rate_interval(rate, variance, float(v.people[place]) * n, float(v.largest[place]) / n)[1]
        most.append(high / rate)
        low, high = proportion_interval(
            float(drawn.observed_tar_balanced[k]), float(drawn.tar_balanced[:, k].var()) / n, everyone * n
        )
        width.append(high - low)
    people = tuple(round(everyone * n) for n in MULTIPLES)
    return Planned(fmr=fmr, people=people, fmr_high=tuple(most), tar_width=tuple(width))


def _codes(scores: PairScores) -> Ints:
    """Give each kept impostor pair a number of its pair of people."""
    a, b = scores.impostor_identities
    codes: Ints = np.minimum(a, b) * scores.pairing.identities + np.maximum(a, b)
    return codes
