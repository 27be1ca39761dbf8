"""Extrapolate the threshold for a false match rate that a certificate does not resolve, and say so.

A search among N templates errs about N times as often as one comparison, so its threshold is asked for at rates far
below what an evaluation's people resolve. A verification refuses such a rate; a search answers and marks it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pkd.toolkit.certificates.certificate import Assurance, Calibration, Certificate
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import UnsupportedFmr

DECADE = 10.0
"""Factor up to which the slope of the calibration's tail is taken: to ten times the last resolved rate."""


class Threshold(NamedTuple):
    """Hold a threshold for a target false match rate, and whether it was measured."""

    score: float
    """Cosine similarity at and above which a pair matches; above 1, no pair can."""
    calibrated: bool
    """False: extrapolated beyond what the impostor pairs resolve."""


def threshold_for(certificate: Certificate, fmr: float, assurance: Assurance = "point") -> Threshold:
    """Find the threshold for a per-comparison rate ``fmr`` (a fraction above 0), whatever the certificate resolves.

    Within its points: ``Certificate.threshold``. Above the largest: that one's threshold, which errs less often than
    asked. Below the smallest: ``extrapolated``, for a rate as much smaller as the assurance asks for at the last
    resolved one. Never falls as ``fmr`` falls. Raises UnsupportedFmr where the tail has no slope to follow.
    """
    points, c = certificate.points, certificate.calibration
    try:
        return Threshold(certificate.threshold(min(fmr, points[0].fmr), assurance), True)
    except UnsupportedFmr:
        smallest = min((rate for rate in c.fmr if rate > 0), default=1.0)
        assured = (c.point if assurance == "point" else c.bound)[c.fmr.index(smallest)] if smallest in c.fmr else 1.0
        score = extrapolated(c, fmr * smallest / max(assured, smallest))
    if score is None:
        raise UnsupportedFmr(
            f"the certificate of {short(certificate.query)} against {short(certificate.gallery)} has no tail that "
            f"could be followed to FMR {fmr:g}. Evaluate on more people."
        )
    resolved = c.assured_at(certificate.smallest(assurance), assurance)
    return Threshold(max(score, points[-1].threshold if resolved is None else resolved), False)


def extrapolated(calibration: Calibration, fmr: float) -> float | None:
    """Find the score at which a straight tail of log FMR would fall to ``fmr``; None where the curve does not fall.

    Down to the last resolved rate r the curve itself is followed. Beyond it the line through the scores at 10·r and
    at r goes on:  s(fmr) = s(r) + (s(r) − s(10 r)) / ln 10 · ln(r / fmr).

    Assumes that impostor scores keep an exponential tail with the slope of its last decade. Where the tail falls ever
    faster, as a normal distribution's does, the threshold is too strict and costs matches; where it is heavier (twins,
    siblings, one person under two names), too lax. And r itself rests on about ten pairs of people, so the slope is
    known to a fifth at best: the further ``fmr`` lies below r, the less the answer is worth. Hence never a
    verification's threshold, and never without the mark.
    """
    resolved = [(score, rate) for score, rate in zip(calibration.score, calibration.fmr, strict=True) if rate > 0]
    if not resolved:
        return None
    last = resolved[-1][1]
    if fmr >= last:
        return calibration.score_at(fmr)
    end = next(score for score, rate in resolved if rate == last)
    start, upper = _straight(calibration, DECADE * last), min(DECADE * last, calibration.fmr[0])
    if not (end > start and upper > last):
        return None
    return end + (end - start) / math.log(upper / last) * math.log(last / fmr)


def _straight(calibration: Calibration, fmr: float) -> float:
    """Find the score at which lines between measured scores, straight in log FMR, fall to ``fmr``.

    No threshold is taken from it but the slope of the tail, which steps from score to score would blur.
    """
    right = next((i for i, rate in enumerate(calibration.fmr) if rate <= fmr), len(calibration.fmr) - 1)
    if right == 0 or calibration.fmr[right] >= fmr:
        return calibration.score[right]
    before, after = calibration.fmr[right - 1], calibration.fmr[right]
    share = math.log(before / fmr) / math.log(before / after) if after > 0 else (before - fmr) / before
    return calibration.score[right - 1] + share * (calibration.score[right] - calibration.score[right - 1])
