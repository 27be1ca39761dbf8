"""Turn a rate and its variance over people into a 95 % interval that also holds near 0 and 1.

A rate over people is no binomial count: a person's pairs fail together. Korn and Graubard (1998, Confidence intervals
for proportions with small expected number of positive counts estimated from survey data) take as many independent
trials as would vary as much, and the exact interval of Clopper and Pearson (1934) for these. Where nobody fails nothing
varies, and the trials are as many as there are effective people.
"""

from __future__ import annotations

from math import lgamma
from statistics import NormalDist

import numpy as np

from pkd.toolkit.certificates.certificate import Interval
from pkd.toolkit.evaluation.metrics.pairing import Doubles

TRIALS_PER_PERSON = 2.0
"""Most independent trials that one effective person counts for where some fail: others who fail may be missing. Chosen
by coverage and width (benchmarks/coverage.py). Where nobody fails it is one trial: nothing tells how people fail."""
_TERMS = 200
_STEPS = 60
_TOLERANCE = 1e-12


def effective(share: Doubles) -> float:
    """Compute the number of equal shares that vary as much as these: (Σ share)² / Σ share² (Kish 1965)."""
    return float(share.sum() ** 2 / (share**2).sum()) if share.any() else 0.0


def student_quantile(people: float, probability: float = 0.975) -> float:
    """Compute Student's quantile with n − 1 degrees of freedom (Cornish and Fisher), times √(n/(n − 1))."""
    z = NormalDist().inv_cdf(probability)
    free = max(people, 3.0) - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return float(t * np.sqrt(1 + 1 / free))


def small_rate_interval(
    rate: float, variance: float, people: float, largest: float, *, samples: int = 1, probability: float = 0.975
) -> Interval:
    """Compute the log-normal interval of a false match rate: its ends are ``probability`` quantiles on either side.

    ``variance`` over people, ``people`` effective ones; ``largest``: part of the rate that the most influential person
    makes up. At the upper end one more such person is added to rate and variance, as Fay and Feuer (1997, Confidence
    intervals for directly standardized rates) add the largest weight: few people who match many others decide the rate,
    and a sample without them shows neither rate nor variance. ``samples``: 2 for what a fresh sample of as many people
    would measure, which may lack that person, too.
    """
    t = student_quantile(people, probability)
    more = variance + largest**2
    low = np.sqrt(samples * (more if samples > 1 else variance)) / rate
    high = np.sqrt(samples * more) / (rate + largest)
    return rate * float(np.exp(-t * low)), min(1.0, (rate + largest) * float(np.exp(t * high)))


def proportion_interval(
    rate: float, variance: float, people: float, *, trials_per_person: float = TRIALS_PER_PERSON
) -> Interval:
    """Compute the 95 % interval of a rate that ``people`` effective people give with this variance over people."""
    (low,), (high,) = proportion_intervals(
        np.array([rate]), np.array([variance]), people, trials_per_person=trials_per_person
    )
    return float(low), float(high)


def proportion_intervals(
    rates: Doubles,
    variances: Doubles,
    people: float | Doubles,
    *,
    trials_per_person: float | Doubles = TRIALS_PER_PERSON,
    tail: float = 0.025,
) -> tuple[Doubles, Doubles]:
    """Compute the lower and the upper ends of several rates' intervals, as ``proportion_interval`` does.

    ``people``: of all rates, or of each. ``tail``: chance of a true rate beyond either end.
    """
    rates = np.clip(rates, 0.0, 1.0)
    certain = (variances <= 0) | (rates <= 0) | (rates >= 1)
    trials = rates * (1 - rates) / np.where(certain, 1.0, variances)
    quantiles = np.array([student_quantile(each) for each in np.atleast_1d(people)])
    trials *= (NormalDist().inv_cdf(0.975) / quantiles) ** 2
    most = np.maximum(people, 1.0)
    trials = np.where(certain, most, np.clip(trials, 1.0, most * trials_per_person))
    hits = rates * trials
    low = np.where(hits > 0, _beta_quantile(tail, hits, trials - hits + 1), 0.0)
    high = np.where(hits < trials, _beta_quantile(1 - tail, hits + 1, trials - hits), 1.0)
    return np.minimum(low, rates), np.maximum(high, rates)


def _beta_quantile(probability: float, a: Doubles, b: Doubles) -> Doubles:
    """Find x with I_x(a, b) = probability by Newton's method between bounds; a and b of 0 are taken as nearly 0."""
    a, b = np.maximum(a, 1e-9), np.maximum(b, 1e-9)
    log_beta = np.array([lgamma(p) + lgamma(q) - lgamma(p + q) for p, q in zip(a.tolist(), b.tolist(), strict=True)])
    low, high, x = np.zeros(len(a)), np.ones(len(a)), a / (a + b)
    for _ in range(_STEPS):
        excess = _beta_cumulative(x, a, b, log_beta) - probability
        low, high = np.where(excess < 0, x, low), np.where(excess < 0, high, x)
        with np.errstate(all="ignore"):
            density = np.exp((a - 1) * np.log(x) + (b - 1) * np.log1p(-x) - log_beta)
            newton = x - excess / density
        following = np.where((low < newton) & (newton < high), newton, (low + high) / 2)
        moved = np.abs(following - x)
        x = following
        if (moved < _TOLERANCE).all():
            break
    return x


def _beta_cumulative(x: Doubles, a: Doubles, b: Doubles, log_beta: Doubles) -> Doubles:
    """Compute the regularised incomplete beta function by its continued fraction (Numerical Recipes, section 6.4)."""
    turned = x > (a + 1) / (a + b + 2)
    x, a, b = np.where(turned, 1 - x, x), np.where(turned, b, a), np.where(turned, a, b)
    with np.errstate(divide="ignore"):
        front = np.exp(-log_beta + a * np.log(x) + b * np.log1p(-x)) / a
    c, d = np.ones(len(x)), 1 / _away(1 - (a + b) * x / (a + 1))
    fraction = d.copy()
    for m in range(1, _TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d, c = 1 / _away(1 + even * d), _away(1 + even / c)
        fraction *= d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d, c = 1 / _away(1 + odd * d), _away(1 + odd / c)
        step = d * c
        fraction *= step
        if (np.abs(step - 1) < 1e-8).all():
            break
    value: Doubles = np.where(turned, 1 - front * fraction, front * fraction)
    return value


def _away(value: Doubles) -> Doubles:
    """Keep a divisor away from 0."""
    return np.where(np.abs(value) < 1e-300, 1e-300, value)
