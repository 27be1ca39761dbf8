"""Certificate: the measured permission to match queries of one encoder against a gallery of another.

It holds all a server needs of an evaluation: thresholds for target false match rates, and the calibration from a
score to the false match rate at that score. The pair of encoders is ordered, and one pair's threshold is never used
for another.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from pathlib import Path

from pydantic import ValidationError, model_validator

from pkd.toolkit.errors import BadVector, BundleError, UnsupportedFmr
from pkd.toolkit.record import Record
from pkd.toolkit.space import short

Interval = tuple[float, float]


class OperatingPoint(Record):
    """Error rates at one threshold; intervals are 95 % identity-level bootstrap intervals."""

    fmr: float
    """Target false match rate, a fraction."""
    threshold: float
    """Cosine similarity at and above which a pair matches."""
    fmr_ci95: Interval
    """What the threshold's false match rate may be on other people."""
    tar: float
    """True accept rate over genuine pairs, every pair weighing the same."""
    tar_ci95: Interval
    tar_balanced: float
    """True accept rate with every identity weighing the same."""
    tar_balanced_ci95: Interval


class Calibration(Record):
    """Score → false match rate, at ascending scores; rates fall from left to right."""

    score: tuple[float, ...]
    fmr: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Calibration:
        columns = (self.score, self.fmr, self.low, self.high)
        if not self.score or len({len(c) for c in columns}) != 1:
            raise ValueError("calibration columns must be non-empty and equally long")
        if any(a > b for a, b in zip(self.score, self.score[1:], strict=False)):
            raise ValueError("calibration scores must ascend")
        if any(a < b for a, b in zip(self.fmr, self.fmr[1:], strict=False)):
            raise ValueError("calibration false match rates must not rise with the score")
        return self

    def score_at(self, fmr: float) -> float:
        """Smallest score whose interpolated rate is at most ``fmr``; the last one where none is."""
        right = next((i for i, rate in enumerate(self.fmr) if rate <= fmr), len(self.fmr) - 1)
        if right == 0 or self.fmr[right] >= fmr:
            return self.score[right]
        before, after = self.fmr[right - 1], self.fmr[right]
        share = math.log(before / fmr) / math.log(before / after) if after > 0 else (before - fmr) / before
        return self.score[right - 1] + share * (self.score[right] - self.score[right - 1])


class Certificate(Record):
    """Queries from ``query`` may be matched against a gallery of ``gallery``, with these error rates."""

    schema_version: int = 1
    query: str
    """Encoder id of the query (probe) side."""
    gallery: str
    """Encoder id of the gallery side."""
    space: str
    """Id of the embedding space that both share."""
    points: tuple[OperatingPoint, ...]
    """Operating points, from the largest false match rate to the smallest."""
    calibration: Calibration
    min_fmr: float
    """Smallest false match rate that the impostor pairs resolve."""
    identities: int
    images: int
    genuine_pairs: int
    impostor_pairs: int
    data_name: str
    data_digest: str
    synthetic: bool = False
    """True where the faces were procedural: the rates say nothing about people."""
    tool: str
    created: str
    """ISO 8601, UTC."""

    @model_validator(mode="after")
    def _ordered(self) -> Certificate:
        for point, following in zip(self.points, self.points[1:], strict=False):
            if not (point.fmr > following.fmr and point.threshold <= following.threshold):
                raise ValueError("operating points must go from the largest FMR to the smallest, thresholds rising")
        return self

    @property
    def file_name(self) -> str:
        """``query__gallery.json`` with shortened ids, so that one folder holds every ordered pair."""
        return f"{short(self.query)}__{short(self.gallery)}.json"

    def threshold(self, fmr: float) -> float:
        """Smallest score whose false match rate is at most ``fmr``.

        A measured operating point's own threshold, and between two of them the calibration curve (straight in log
        FMR). Never falls as ``fmr`` falls. Raises UnsupportedFmr outside the points.
        """
        largest, smallest = self.points[0].fmr, self.points[-1].fmr
        if not smallest * (1 - 1e-9) <= fmr <= largest * (1 + 1e-9):
            raise UnsupportedFmr(
                f"target FMR {fmr:g} is not covered by the certificate of {short(self.query)} against "
                f"{short(self.gallery)}, which supports {smallest:g} to {largest:g} ({self.impostor_pairs:,} impostor "
                f"pairs of {self.identities:,} identities). Ask for {smallest:g} or more, or evaluate on more people."
            )
        for point in self.points:
            if math.isclose(point.fmr, fmr, rel_tol=1e-9):
                return point.threshold
        lower = max(point.threshold for point in self.points if point.fmr > fmr)
        upper = min(point.threshold for point in self.points if point.fmr < fmr)
        return min(max(self.calibration.score_at(fmr), lower), upper)

    def fmr_at(self, score: float) -> tuple[float, Interval]:
        """False match rate at ``score`` and its 95 % interval.

        Past the last measured score the last rate is kept: no rate is claimed that the impostor pairs do not resolve.
        Raises BadVector for NaN.
        """
        if math.isnan(score):
            raise BadVector("score is NaN: an embedding holds NaN. Embed the image again.")
        c = self.calibration
        right = bisect_right(c.score, score)
        if right in (0, len(c.score)):
            end = min(right, len(c.score) - 1)
            return c.fmr[end], (c.low[end], c.high[end])
        share = (score - c.score[right - 1]) / (c.score[right] - c.score[right - 1])
        fmr, low, high = (_between(column[right - 1], column[right], share) for column in (c.fmr, c.low, c.high))
        return fmr, (low, high)


def read_certificate(path: str | Path) -> Certificate:
    """Read and validate one certificate file. Raises BundleError naming the file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: not a certificate: {error.strerror}.") from None
    return parse_certificate(data, path)


def parse_certificate(data: bytes, path: str | Path) -> Certificate:
    """Validate the bytes of a certificate file; ``path`` is what errors name. Raises BundleError."""
    try:
        certificate = Certificate.model_validate_json(data)
    except ValidationError as error:
        raise BundleError(f"{path}: not a certificate: {error.errors()[0]['msg']}.") from None
    if certificate.schema_version != 1:
        raise BundleError(f"{path}: certificate schema {certificate.schema_version}; this pkd reads 1. Upgrade pkd.")
    if not certificate.points:
        raise BundleError(f"{path}: a certificate without operating points certifies nothing. Evaluate on more people.")
    return certificate


def _between(a: float, b: float, share: float) -> float:
    """Interpolate geometrically, so that rates over many decades stay straight lines; linearly down to zero."""
    if a > 0 and b > 0:
        return float(a ** (1 - share) * b**share)
    return a + share * (b - a)
