"""Paired comparison of two encoders over the same people: difference, interval and p-value."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.metrics.bootstrap import interval
from pkd.toolkit.evaluation.metrics.pairing import Doubles
from pkd.toolkit.evaluation.results.schema import PairedDifference


def paired_difference(a: Doubles, b: Doubles, *, observed: float) -> PairedDifference:
    """Difference of a statistic of A and of B, from the values of the same resamples in the same order.

    ``a``, ``b``: float64, R each. ``observed``: A − B over all people. The p-value is the smallest level at which the
    percentile interval excludes 0 (Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 15.4): twice
    the fraction of resamples on the far side of 0, with one added to count and number, so that it is never 0. Raises
    InputError where the numbers of resamples differ.
    """
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise InputError(
            f"{len(a):,} resamples against {len(b):,}: evaluate both with the same --bootstrap and --seed."
        )
    difference = a - b
    tail = min(np.count_nonzero(difference <= 0), np.count_nonzero(difference >= 0))
    low, high = interval(difference)
    return PairedDifference(
        difference=observed,
        ci95=(min(low, observed), max(high, observed)),
        p=float(min(1.0, 2 * (tail + 1) / (len(difference) + 1))),
    )


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several comparisons, adjusted: the chance of one false claim among them all (Holm 1979)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, running = [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        running = max(running, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = running
    return adjusted
