"""Other ways to an interval of a false match rate, which benchmarks/coverage.py compares with pkd's.

Each takes what a sample shows at one threshold, ``Seen``, and gives a 95 % interval. Those that draw people again count
the noise of a pair once where their name says so; the plain ones count it three times (Owen 2007).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import gamma, norm

from pkd.toolkit.certificates.certificate import Interval
from pkd.toolkit.evaluation.metrics.intervals import student_quantile
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats

DRAWS = 200
GROUPS = 20
"""Groups of people that the tail model's jackknife leaves out one at a time."""


@dataclass(frozen=True)
class Seen:
    """Hold one sample at one threshold."""

    rate: float
    variance: float
    """Over people, the noise of pairs once."""
    people: float
    """Effective people."""
    largest: float
    """Part of the rate that the most influential person makes up."""
    matched: Floats
    """N×N: share of the pairs of images of every two people that match, 0 on the diagonal."""


def before(s: Seen) -> Interval:
    """Compute the log-normal interval without another influential person: what pkd gave until now."""
    factor = math.exp(student_quantile(s.people) * math.sqrt(s.variance) / s.rate)
    return s.rate / factor, s.rate * factor


def jackknife(s: Seen) -> Interval:
    """Compute Student's t interval; the variance is what leaving out one person at a time gives."""
    reach = student_quantile(s.people) * math.sqrt(s.variance)
    return s.rate - reach, s.rate + reach


def gamma_exact(s: Seen) -> Interval:
    """Compute the exact Poisson interval of as many hits as vary as much: the binomial floor over people."""
    v = s.variance * (student_quantile(s.people) / 1.96) ** 2
    hits = s.rate**2 / v
    return float(gamma.ppf(0.025, hits)) * v / s.rate, float(gamma.ppf(0.975, hits + 1)) * v / s.rate


def fay_feuer(s: Seen) -> Interval:
    """Compute the gamma interval of Fay and Feuer (1997): at the upper end one more most influential person."""
    v = s.variance * (student_quantile(s.people) / 1.96) ** 2
    rate, more = s.rate + s.largest, v + s.largest**2
    return (
        float(gamma.ppf(0.025, s.rate**2 / v)) * v / s.rate,
        float(gamma.ppf(0.975, rate**2 / more)) * more / rate,
    )


def drawn_again(s: Seen, seed: int) -> dict[str, Interval]:
    """Compute the intervals that draw people again: percentiles, BCa, studentised, Bayesian, subsampling."""
    random = np.random.default_rng(seed)
    n = len(s.matched)
    times = random.multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float32)
    each = times @ s.matched
    pairs = (n * n - (times**2).sum(axis=1)) / 2
    rates = np.einsum("dn,dn->d", each, times) / 2 / pairs
    once = s.rate + (rates - rates.mean()) * math.sqrt(s.variance) / rates.std()
    deviation = each - rates[:, None] * (n - times)
    noise = np.maximum(np.einsum("dn,dn->d", times @ s.matched**2, times) / 2 / pairs - rates**2, 0) / pairs
    variances = np.maximum((times * deviation**2).sum(axis=1) / pairs**2 - noise, noise)
    usable = np.maximum(rates, s.rate / 50)
    shrink = math.sqrt(s.variance) / rates.std()
    studentised = np.log(usable / s.rate) * usable / np.sqrt(np.maximum(variances, 1e-30)) * shrink
    low, high = np.quantile(studentised, (0.025, 0.975)) * math.sqrt(s.variance) / s.rate
    weights = random.standard_gamma(1.0, (DRAWS, n)).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    bayesian = np.einsum("dn,dn->d", weights @ s.matched, weights) / (1 - (weights**2).sum(axis=1))
    half = n // 2
    chosen = (np.argsort(random.random((DRAWS, n)), axis=1) < half).astype(np.float32)
    less = np.einsum("dn,dn->d", chosen @ s.matched, chosen) / (half * (half - 1)) - s.rate
    below, above = np.quantile(less, (0.025, 0.975)) * math.sqrt(half / (n - half))
    return {
        "percentiles": _ends(rates),
        "percentiles, noise once": _ends(once),
        "BCa, noise once": _accelerated(s, rates, once),
        "studentised": (s.rate * math.exp(-high), s.rate * math.exp(-low)),
        "Bayesian": _ends(bayesian),
        "subsampling": (s.rate - above, s.rate - below),
    }


def tail_model(
    scores: Floats, share: Doubles, people: tuple[np.ndarray, np.ndarray], at: float, pairs: float
) -> Interval:
    """Follow an exponential tail (extreme value index 0) from ten times the rate; error by a jackknife over people.

    ``scores``: descending; ``share`` of each in its pair of people; ``people``: both identities; ``at``: the threshold.
    """
    above = int(np.searchsorted(-scores, -at, "right"))
    rate = share[:above].sum() / pairs
    end = min(int(np.searchsorted(np.cumsum(share) / pairs, min(10 * rate, 0.15))), len(scores) - 1)
    start = float(scores[end])
    group = [side[:end] % GROUPS for side in people]

    def modelled(kept: np.ndarray, scale: float) -> float:
        weight = share[:end] * kept
        excess = (weight @ (scores[:end] - start)) / weight.sum()
        return float(weight.sum() / pairs / scale * math.exp(-(at - start) / excess))

    whole = modelled(np.ones(end), 1.0)
    left = [modelled((group[0] != g) & (group[1] != g), (1 - 1 / GROUPS) ** 2) for g in range(GROUPS)]
    deviation = math.sqrt((GROUPS - 1) / GROUPS * float(np.var(np.log(left)) * GROUPS))
    factor = math.exp(student_quantile(GROUPS) * deviation)
    return whole / factor, whole * factor


def _ends(values: Doubles) -> Interval:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _accelerated(s: Seen, rates: Doubles, once: Doubles) -> Interval:
    """Correct percentiles for bias and skewness (Efron 1987)."""
    bias = norm.ppf(np.clip((rates < s.rate).mean(), 0.01, 0.99))
    person = s.matched.sum(axis=1) - (len(s.matched) - 1) * s.rate
    acceleration = (person**3).sum() / 6 / ((person**2).sum() ** 1.5)
    at = [bias + (bias + z) / (1 - acceleration * (bias + z)) for z in (-1.96, 1.96)]
    low, high = np.quantile(once, norm.cdf(at))
    return float(low), float(high)
