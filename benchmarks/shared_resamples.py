"""Compute the resampled true accept rates of a simulated evaluation at a fifth of the cost.

``pkd``'s bootstrap sums up all impostors anew in every resample, as suits its two hundred rates. A simulation asks for
two. A false match rate is linear in how often people were drawn: at the places where the search for a threshold begins
one product of matrices gives that of all resamples, and only the last few hundred impostors are summed up one by one.
The rates are those of ``bootstrap`` (tests/unit/benchmarks/test_coverage.py).
"""

from __future__ import annotations

import numpy as np

from pkd.toolkit.evaluation.metrics.bootstrap import fmr_variance
from pkd.toolkit.evaluation.metrics.error_rates import impostor_cumulative, raw_impostor_cumulative
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats, Ints

HALVINGS = 8
"""Steps of the search that are looked up."""


def accepted(scores: PairScores, fmrs: Doubles, *, resamples: int, seed: int) -> dict[str, tuple[Doubles, Doubles]]:
    """Compute ``TAR`` and ``raw TAR``: of all people (F) and of every resample (R×F), as ``bootstrap`` does."""
    drawn = _draw(scores, resamples, seed)
    everyone = np.ones((1, drawn.shape[1]))
    found = {}
    for name, raw in (("TAR", False), ("raw TAR", True)):
        full = (raw_impostor_cumulative if raw else impostor_cumulative)(scores, everyone[0])
        variance = fmr_variance(scores, np.searchsorted(full, fmrs, "right"), raw=raw)
        with np.errstate(divide="ignore", invalid="ignore"):
            shrink = np.nan_to_num(np.sqrt(variance.total / variance.resampled), nan=1.0)
        last = np.append(scores.impostor, np.float32(-np.inf))
        places = first_beyond(scores, drawn, full, shrink, fmrs, raw=raw)
        own = first_beyond(scores, everyone, full, shrink, fmrs, raw=raw)
        observed = _accepted(scores, everyone, last[own], raw=raw)[0]
        found[name] = observed, _accepted(scores, drawn, last[places], raw=raw)
    return found


def first_beyond(
    scores: PairScores, drawn: Doubles, full: Doubles, shrink: Doubles, fmrs: Doubles, *, raw: bool
) -> Ints:
    """Find for each resample and target the first kept impostor that is one too many (R×F), by the same halvings.

    ``drawn``: R×N, how often each person was drawn; the rest is as in ``pkd``'s ``first_beyond``.
    """
    part = scores.weight if raw else scores.share
    a, b = scores.impostor_identities
    p, n = scores.pairing, len(part)
    pairs = p.impostor_pairs_per_identity if raw else p.identity_pairs_per_identity
    total = np.maximum(pairs.sum() / 2 + (drawn - 1) @ pairs, pairs.max())[:, None]
    nodes = _nodes(n)
    order = np.argsort(nodes, kind="stable")
    segment = np.searchsorted(nodes[order], np.arange(n), "left") * p.identities
    size = (len(nodes) + 1) * p.identities
    each = np.bincount(segment + a, part, size) + np.bincount(segment + b, part, size)
    people = np.cumsum(each.reshape(-1, p.identities)[:-1], axis=0)
    sums = np.empty((len(drawn), len(nodes)))
    sums[:, order] = drawn @ people.T - np.cumsum(part)[nodes[order]]

    targets, resample = fmrs * (1 + 1e-9), np.arange(len(drawn))[:, None]
    low, high = np.zeros((len(drawn), len(fmrs)), np.int64), np.full((len(drawn), len(fmrs)), n)
    base, node = np.zeros(low.shape), np.zeros(low.shape, np.int64)
    for _ in range(HALVINGS):
        middle, under_way = (low + high) // 2, low < high
        at = sums[resample, node]
        within = under_way & (shrink * at / total + (1 - shrink) * full[np.minimum(middle, n - 1)] <= targets)
        low, high = np.where(within, middle + 1, low), np.where(under_way & ~within, middle, high)
        base, node = np.where(within, at, base), 2 * node + 1 + within
    for f in range(len(fmrs)):
        length = int((high[:, f] - low[:, f]).max())
        place = np.minimum(low[:, f : f + 1] + np.arange(max(length, 1)), n - 1)
        weight = (drawn[resample, a[place]] + drawn[resample, b[place]] - 1) * part[place]
        rate = shrink[f] * (base[:, f : f + 1] + np.cumsum(weight, axis=1)) / total + (1 - shrink[f]) * full[place]
        first, start, end = low[:, f].copy(), low[:, f].copy(), high[:, f].copy()
        while (under_way := start < end).any():
            middle = (start + end) // 2
            within = rate[resample[:, 0], np.minimum(middle - first, length - 1)] <= targets[f]
            start, end = (
                np.where(under_way & within, middle + 1, start),
                np.where(under_way & ~within, middle, end),
            )
        low[:, f] = start
    return low


def _nodes(n: int) -> Ints:
    """List the places that the first halvings of 0 to ``n`` may look at: those after place k are 2k + 1 and 2k + 2."""
    low, high, found = np.zeros(1, np.int64), np.full(1, n), []
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        found.append(np.minimum(middle, n - 1))
        low, high = np.stack([low, middle + 1], axis=1).ravel(), np.stack([middle, high], axis=1).ravel()
        high = np.maximum(low, high)
    return np.concatenate(found)


def _accepted(scores: PairScores, drawn: Doubles, last: Floats, *, raw: bool) -> Doubles:
    """Compute the true accept rates where the scores above ``last`` (R×F) match."""
    per_person, person = scores.pairing.genuine_per_identity, scores.genuine_identity
    weight = np.ones(len(person)) if raw else 1 / per_person[person]
    every = drawn @ (per_person if raw else (per_person > 0).astype(np.float64))
    above = np.searchsorted(-scores.genuine, -last, "left")
    rate = np.empty(above.shape)
    for f, column in enumerate(above.T):
        start, end = int(column.min()), int(column.max())
        sure = drawn @ np.bincount(person[:start], weight[:start], len(per_person))
        more = np.cumsum(drawn[:, person[start:end]] * weight[start:end], axis=1)
        more = np.concatenate([np.zeros((len(drawn), 1)), more], axis=1)
        rate[:, f] = (sure + more[np.arange(len(drawn)), column - start]) / every
    return rate


def _draw(scores: PairScores, resamples: int, seed: int) -> Doubles:
    """Draw people with replacement, R×N, as ``bootstrap`` does."""
    pairing, random = scores.pairing, np.random.default_rng(seed)
    even = np.full(pairing.identities, 1 / pairing.identities)
    wanted = pairing.genuine_per_identity > 0
    drawn = np.empty((resamples, pairing.identities))
    for r in range(resamples):
        drawn[r] = random.multinomial(pairing.identities, even)
        while not (pairing.identity_pair_weight(drawn[r]) > 0 and drawn[r, wanted].any()):
            drawn[r] = random.multinomial(pairing.identities, even)
    return drawn
