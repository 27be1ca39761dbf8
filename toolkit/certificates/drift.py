"""Tell whether a certificate still holds, from scores that pass by: a sequential test with a stated false alarm rate.

At each operating point a certificate promises how often two different people reach a threshold. Each observation is a
yes or no, "an impostor reached it", with the largest probability p₀ that the certificate allows. A bet on a larger
rate, p₁ = r·p₀, multiplies a capital of 1 by p₁/p₀ on a yes and (1 − p₁)/(1 − p₀) on a no. While the promise holds the
capital is a supermartingale, whatever the order, the number of looks or the time of stopping, and reaches 1/α with a
probability of α at most (Ville 1939; Ramdas, Grünwald, Vovk and Shafer 2023, Statistical Science 38). Capital is split
evenly between points and ratios, so that nobody chooses one after the fact. Bets are fixed beforehand, and what one
process saw multiplies what another saw: only sums of logarithms are kept, no score.

What is assumed: (1) visits are independent draws from the people of the gallery; whoever comes daily is drawn daily.
(2) The people of a gallery are few, and their own rate differs from everybody's by chance: the promise is widened by
the certificate's own interval, scaled to their number, at a level of α/2; the other half is the test's. (3) Nobody is
enrolled under two names (pkd-gallery review).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from pkd.toolkit.certificates.certificate import Certificate, OperatingPoint

ALPHA = 0.05
"""Chance of a false alarm for one certificate, over all the time that it is watched."""
RATIOS = (1.5, 2.0, 3.0, 5.0, 10.0)
"""Alternatives that are bet on: how much larger than promised the rate may have become."""
KINDS = ("identify", "verify")
LARGEST = 0.9
"""Probability from which an observation tells nothing: a gallery of so many that somebody always reaches the point."""


@dataclass(frozen=True)
class Observation:
    """Hold one yes or no of one operating point."""

    fmr: float
    """The operating point's."""
    exceeded: bool
    expected: float
    """Probability by the certificate's own rate, without any allowance."""
    promised: float
    """Largest probability that the certificate allows."""

    @property
    def logs(self) -> tuple[float, ...]:
        """List the logarithms of the factors that the capitals of ``RATIOS`` are multiplied by."""
        return tuple(_log_factor(self.exceeded, self.promised, ratio) for ratio in RATIOS)


def searched(certificate: Certificate, impostor: float, comparisons: int, people: int) -> list[Observation]:
    """Observe whether the best of ``comparisons`` templates that are not the searched person's reached each point.

    ``impostor``: cosine of the best subject who is not the answer; where nobody was found, of the second best, for the
    best may be the person, missed. So it never errs upwards, whoever is searched for. ``people``: in the gallery. A
    search reaches a point with at most ``comparisons`` times the probability of one comparison.
    """
    found = []
    for point in certificate.points:
        promised = comparisons * widened(certificate, point, people)
        if promised < LARGEST:
            expected = min(comparisons * point.fmr, promised)
            found.append(Observation(point.fmr, impostor >= point.threshold, expected, promised))
    return found


def verified(
    certificate: Certificate, score: float, threshold: float, comparisons: int, people: int
) -> list[Observation]:
    """Observe whether a verification was refused with a score that reached a point below its threshold.

    Nobody knows whether a refused face was an impostor's or its owner's, missed. The certificate bounds both: an
    impostor reaches the point with its false match rate, an owner falls between point and threshold with the difference
    of the true accept rates. The larger of the two bounds every mixture. Empty where the threshold lies past the
    certificate's last point.
    """
    stricter = [point for point in certificate.points if point.threshold >= threshold]
    if not stricter:
        return []
    found = []
    for point in certificate.points:
        if point.threshold >= threshold:
            continue
        impostor = comparisons * widened(certificate, point, people)
        kept = stricter[0].tar_balanced_ci95[0]
        between = (point.tar_balanced_ci95[1] if comparisons == 1 else 1.0) - kept
        missed = max(0.0, between)
        missed += _quantile(certificate) * math.sqrt(missed * (1 - missed) / max(people, 1))
        promised = max(impostor, missed)
        if promised < LARGEST:
            expected = min(comparisons * point.fmr, promised)
            found.append(Observation(point.fmr, point.threshold <= score < threshold, expected, promised))
    return found


def widened(certificate: Certificate, point: OperatingPoint, people: int) -> float:
    """Widen a point's false match rate by what it may be among ``people`` people, log-normal, at a level of α/2.

    The variance of its logarithm is that of the certificate's own interval, and that of a fresh set of people: what
    ``prediction95`` has beyond it for an equally large set, scaled to theirs, and the noise of their pairs.
    """
    spread = _log(point.fmr_ci95[1], point.fmr_ci95[0]) / (2 * 1.96)
    fresh = max((_log(point.prediction95[1], point.fmr) / 1.96) ** 2 - spread**2, 0.0)
    pairs = max(people * (people - 1) / 2, 1.0)
    of_people = max(fresh - 1 / (point.fmr * certificate.identity_pairs), 0.0) * certificate.identities / max(people, 1)
    variance = spread**2 + max(fresh, of_people) + 1 / (point.fmr * pairs)
    return min(point.fmr * math.exp(_quantile(certificate) * math.sqrt(variance)), 1.0)


def evidence(certificate: Certificate, logs: Sequence[Sequence[float]]) -> float:
    """Return the capital, from the sums of logarithms of every kind and point that was observed.

    ``logs``: one row of ``RATIOS`` for each; those never observed hold their share of the capital as it was.
    """
    shares = len(KINDS) * len(certificate.points) * len(RATIOS)
    seen = [one for row in logs for one in row]
    return (sum(math.exp(min(one, 700.0)) for one in seen) + shares - len(seen)) / shares


def alarm_at() -> float:
    """Return the capital at which the promise is taken for broken."""
    return 2 / ALPHA


def _quantile(certificate: Certificate) -> float:
    """Return the normal quantile of the allowance: α/2, shared by all points of both kinds."""
    return NormalDist().inv_cdf(1 - ALPHA / 2 / (len(KINDS) * len(certificate.points)))


def _log(a: float, b: float) -> float:
    return math.log(max(a, 1e-12) / max(b, 1e-12)) if a > b else 0.0


def _log_factor(exceeded: bool, promised: float, ratio: float) -> float:
    other = min(ratio * promised, (1 + promised) / 2)
    return math.log(other / promised) if exceeded else math.log((1 - other) / (1 - promised))
