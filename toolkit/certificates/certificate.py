"""Certify what was measured: the permission to match queries of one encoder against a gallery of another.

It holds all a server needs of an evaluation: thresholds for target false match rates, and the calibration from a
score to the false match rate at that score. The pair of encoders is ordered, and one pair's threshold is never used
for another.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, ValidationError, model_validator

from pkd.toolkit.certificates.signing import Signature, signature_beside
from pkd.toolkit.core.encoder_info import Role, short
from pkd.toolkit.core.errors import BadVector, BundleError, UnsupportedFmr
from pkd.toolkit.core.models import Record, fault_of, read_json

SCHEMA = 3
USEFUL = 0.5
"""TAR below which a pair is called poor."""
SLACK = 1 + 1e-9
"""Most that the calibration's rate at an operating point may lie above the point's, a factor: rounding."""


Assurance = Literal["point", "bound"]
"""Promise that a target false match rate is asked with: ``point``, that it is met on average over evaluations like
this one; ``bound``, that it is kept with 95 % confidence."""
Interval = tuple[float, float]
"""Both ends of an interval, the lower first."""


def _ascending(interval: Interval) -> Interval:
    if interval[0] > interval[1]:
        raise ValueError(f"an interval runs from {interval[0]:g} to {interval[1]:g}")
    return interval


# What a server loads has a range: a rate of 5 or 10^400 pairs would be passed on to whoever asks it.
Rate = Annotated[float, Field(ge=-1e-9, le=1 + 1e-9)]
"""A share of pairs, 0 to 1."""
RateInterval = Annotated[tuple[Rate, Rate], AfterValidator(_ascending)]
Score = Annotated[float, Field(ge=-2, le=2)]
"""Cosine similarity; embeddings that were rounded are not quite of unit length."""
Ratio = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(le=10**15)]


class Assured(Record):
    """Give the threshold that keeps a promise about a target rate, and what people it accepts."""

    threshold: Score
    """Cosine similarity at and above which a pair matches: a score of the calibration."""
    tar_balanced: Rate
    """True accept rate there, every identity weighing the same."""


class OperatingPoint(Record):
    """Give error rates at one threshold; intervals are 95 % identity-level bootstrap intervals."""

    fmr: Rate
    """Target false match rate, a fraction: of two different people drawn at random, however many images there are."""
    threshold: Score
    """Cosine similarity at and above which a pair matches."""
    fmr_ci95: RateInterval
    """The threshold's false match rate over all people like these: how well it is known."""
    prediction95: RateInterval
    """Range that holds the false match rate of a fresh, equally large set of such people at this threshold in 95 of 100
    cases: wider, for the fresh set has a chance of its own, and the threshold's is in it, too."""
    raw_threshold: Score
    """Threshold for the same rate where every pair of images weighs the same, as published figures count. Not used."""
    tar: Rate
    """True accept rate at ``raw_threshold``, every genuine pair weighing the same."""
    tar_ci95: RateInterval
    tar_balanced: Rate
    """True accept rate at ``threshold``, every identity weighing the same."""
    tar_balanced_ci95: RateInterval
    as_point: Assured | None = None
    """Threshold whose true false match rate is at most ``fmr`` on average; None where too few people resolve it."""
    as_bound: Assured | None = None
    """Threshold whose true false match rate is at most ``fmr`` with 95 % confidence; None as above."""


def usefulness(point: OperatingPoint) -> str | None:
    """Say "useless" of a pair that does no better than chance, "poor" where it misses most people; None otherwise."""
    if point.tar_balanced_ci95[0] <= 2 * point.fmr:
        return "useless"
    return "poor" if point.tar_balanced < USEFUL else None


class Calibration(Record):
    """Map a score to its false match rate, at ascending scores; rates fall from left to right."""

    score: tuple[Score, ...]
    fmr: tuple[Rate, ...]
    low: tuple[Rate, ...]
    high: tuple[Rate, ...]
    point: tuple[Rate, ...]
    """Mean true rate of thresholds that are chosen for the measured rate ``fmr``: larger, for a threshold that came out
    too low errs by more than one that came out too high."""
    bound: tuple[Rate, ...]
    """Upper end of the one-sided 95 % interval of the true rate."""

    @model_validator(mode="after")
    def _consistent(self) -> Calibration:
        columns = (self.score, self.fmr, self.low, self.high, self.point, self.bound)
        if not self.score or len({len(c) for c in columns}) != 1:
            raise ValueError("calibration columns must be non-empty and equally long")
        if any(a > b for a, b in zip(self.score, self.score[1:], strict=False)):
            raise ValueError("calibration scores must ascend")
        if any(a < b for a, b in zip(self.fmr, self.fmr[1:], strict=False)):
            raise ValueError("calibration false match rates must not rise with the score")
        for name, column in (("point", self.point), ("bound", self.bound)):
            if any(a < b for a, b in pairwise(column)):
                raise ValueError(f"calibration {name} rates must not rise with the score")
        return self

    @property
    def resolved_scores(self) -> tuple[float, float]:
        """Return the first score, and the first one of the smallest rate; those after it are for assured rates only."""
        return self.score[0], self.score[self.fmr.index(self.fmr[-1])]

    def score_at(self, fmr: float) -> float:
        """Return the smallest measured score whose rate is at most ``fmr``; the last one where none is.

        Between two of them nobody knows where the rate falls, for scores may tie: a straight line may lie below it.
        """
        return next((score for score, rate in zip(self.score, self.fmr, strict=True) if rate <= fmr), self.score[-1])

    def assured_at(self, fmr: float, assurance: Assurance) -> float | None:
        """Return the smallest measured score at which ``fmr`` is assured; None where none is."""
        rates = self.point if assurance == "point" else self.bound
        slack = fmr * SLACK
        return next((score for score, rate in zip(self.score, rates, strict=True) if rate <= slack), None)


class ScoreRate(NamedTuple):
    """Hold what a certificate says of one score."""

    fmr: float
    """False match rate of a threshold at this score."""
    ci95: Interval
    """95 % interval of it."""
    is_upper_bound: bool
    """True past the last resolved score: the rate there is at most ``fmr``, and nobody measured how much less."""


class GroupRates(Record):
    """Give error rates of one group at one operating point; intervals are 95 % identity-level bootstrap intervals.

    A rate is None where the group is too small to resolve it.
    """

    target_fmr: Rate
    """The operating point's false match rate, over everyone."""
    threshold: Score
    """Cosine similarity: the operating point's, found over everyone."""
    fmr: Rate | None
    """False match rate between people of the group; the smallest rate that the group resolves where that is larger."""
    fmr_ci95: RateInterval | None
    fmr_is_upper_bound: bool
    """True where the group's false match rate lies below the smallest rate that the group resolves."""
    fmr_ratio: Ratio | None
    """``fmr`` over everyone's at this threshold; None where that is zero, too."""
    fnmr_balanced: Rate | None
    """False non-match rate, every identity weighing the same."""
    fnmr_balanced_ci95: RateInterval | None
    fnmr_balanced_ratio: Ratio | None
    """``fnmr_balanced`` over everyone's at this threshold; None where that is zero, too."""
    fnmr: Rate | None
    """False non-match rate, every genuine pair weighing the same."""
    fnmr_ci95: RateInterval | None


class Group(Record):
    """Describe the people with one value of an attribute. Pairs count where both people belong to the group."""

    value: str
    identities: Count = Field(ge=0)
    images: Count = Field(ge=0)
    genuine_identities: Count = Field(ge=0)
    """Identities with genuine pairs: what the balanced rate averages over."""
    genuine_pairs: Count = Field(ge=0)
    impostor_pairs: Count = Field(ge=0)
    identity_pairs: Count = Field(ge=0)
    """Pairs of different identities that were compared."""
    min_fmr: Rate | None
    """Smallest false match rate that these resolve; None where there is no impostor pair."""
    rates: tuple[GroupRates, ...]
    """One per operating point of the certificate, in its order."""


class Attribute(Record):
    """Describe one column of the labels, for example ``sex``."""

    name: str
    unlabelled: Count = Field(ge=0)
    """Identities without a value: they count in no group."""
    groups: tuple[Group, ...]
    """Groups by value, in alphabetical order."""


def no_less(rate: float) -> str:
    """Write a positive rate in three digits that are not below it, so that asking for them is not refused."""
    step = 10.0 ** (math.floor(math.log10(rate)) - 2)
    return f"{math.ceil(rate / step * (1 - 1e-9)) * step:.3g}"


class Certificate(Record):
    """Allow queries from ``query`` to be matched against a gallery of ``gallery``, with these error rates.

    Format and rules: docs/certificate.md. Raises ValidationError where its parts contradict one another.
    """

    schema_version: int = SCHEMA
    query: str
    """Encoder id of the query (probe) side."""
    query_role: Role
    gallery: str
    """Encoder id of the gallery side."""
    gallery_role: Role
    space: str
    """Id of the embedding space that both share."""
    protocol: str
    """Rule by which images were compared with one another."""
    points: tuple[OperatingPoint, ...]
    """Operating points, from the largest false match rate to the smallest."""
    calibration: Calibration
    resolved_scores: tuple[Score, Score]
    """Scores between which the rate is resolved: the calibration's first, and its first one of the smallest rate."""
    min_fmr: Rate = Field(gt=0)
    """Smallest false match rate that the pairs of different identities resolve."""
    identities: Count = Field(ge=2)
    genuine_identities: Count = Field(ge=1)
    """Identities with genuine pairs: what the balanced rates average over."""
    identity_pairs: Count = Field(ge=1)
    """Pairs of different identities that were compared."""
    images: Count = Field(ge=2)
    genuine_pairs: Count = Field(ge=1)
    impostor_pairs: Count = Field(ge=1)
    demographics: tuple[Attribute, ...] = ()
    """Error rates per group, where labels were given."""
    labels_digest: str | None = None
    """SHA-256 of the file of labels."""
    data_name: str
    data_digest: str
    """SHA-256 over contents and identities of the images."""
    synthetic: bool = False
    """True where the faces were procedural: the rates say nothing about people."""
    intervals: str
    """Method of the 95 % intervals."""
    resamples: Count = Field(ge=1)
    seed: int
    tool: str
    created: str
    """ISO 8601, UTC."""

    @model_validator(mode="after")
    def _ordered(self) -> Certificate:
        for point, following in zip(self.points, self.points[1:], strict=False):
            if not (point.fmr > following.fmr and point.threshold <= following.threshold):
                raise ValueError("operating points must go from the largest FMR to the smallest, thresholds rising")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Certificate:
        """Refuse a threshold that was changed: it no longer lies on the calibration, signed or not."""
        c = self.calibration
        if self.resolved_scores != c.resolved_scores:
            raise ValueError("resolved_scores must be the calibration's first score, and its first of the last rate")
        rate = dict(zip(c.score, c.fmr, strict=True))
        for point in self.points:
            if point.threshold not in rate:
                raise ValueError(f"the threshold {point.threshold:g} of FMR {point.fmr:g} is not on the calibration")
            if not self.min_fmr * (1 - 1e-9) <= point.fmr <= 1:
                raise ValueError(f"an operating point at FMR {point.fmr:g}, below min_fmr {self.min_fmr:g} or above 1")
            if rate[point.threshold] > SLACK * point.fmr:
                raise ValueError(
                    f"at the threshold of FMR {point.fmr:g} the calibration says {rate[point.threshold]:g}"
                )
            asked: tuple[tuple[Assurance, Assured | None], ...] = (("point", point.as_point), ("bound", point.as_bound))
            for assurance, assured in asked:
                if (assured.threshold if assured else None) != c.assured_at(point.fmr, assurance):
                    raise ValueError(f"FMR {point.fmr:g} as a {assurance}: the threshold is not the calibration's")
        return self

    @property
    def file_name(self) -> str:
        """Return ``query__gallery.json`` with shortened ids, so that one folder holds every ordered pair."""
        return file_name(self.query, self.gallery)

    def threshold(self, fmr: float, assurance: Assurance = "point") -> float:
        """Find the smallest measured score at which the false match rate ``fmr`` is assured.

        Never falls as ``fmr`` falls, and is never below the threshold of the measured rate. Raises UnsupportedFmr
        outside the operating points, and where the people resolve the rate but not this assurance of it.
        """
        largest, smallest = self.points[0].fmr, self.points[-1].fmr
        if not smallest * (1 - 1e-9) <= fmr <= largest * (1 + 1e-9):
            raise UnsupportedFmr(
                f"target FMR {fmr:g} is not covered by the certificate of {short(self.query)} against "
                f"{short(self.gallery)}, which supports {smallest:g} to {largest:g} ({self.impostor_pairs:,} impostor "
                f"pairs of {self.identities:,} identities). Ask for {no_less(smallest)} or more, or evaluate on more "
                "people."
            )
        found = self.calibration.assured_at(fmr, assurance)
        if found is None:
            promise = "with 95 % confidence" if assurance == "bound" else "on average"
            raise UnsupportedFmr(
                f"target FMR {fmr:g} {promise} is not covered by the certificate of {short(self.query)} against "
                f"{short(self.gallery)}: its {self.identities:,} people promise "
                f"{no_less(self.smallest(assurance))} or more. Ask for that, or evaluate on more people."
            )
        return found

    def smallest(self, assurance: Assurance) -> float:
        """Return the smallest false match rate that is supported with this assurance."""
        rates = self.calibration.point if assurance == "point" else self.calibration.bound
        return max(self.points[-1].fmr, rates[-1])

    def fmr_at(self, score: float) -> ScoreRate:
        """Return the false match rate of a threshold at ``score``: that of the measured score at or below it.

        So it is never below the measured rate, however scores tie; the low end of its interval is the next score's.
        Past the last resolved score its rate is an upper bound, for no rate is claimed that the pairs do not resolve.
        Below the first one every impostor pair matches. Raises BadVector for NaN.
        """
        if math.isnan(score):
            raise BadVector("score is NaN: an embedding holds NaN. Embed the image again.")
        c = self.calibration
        right = bisect_right(c.score, score)
        last = c.fmr.index(c.fmr[-1])
        if right == 0:
            return ScoreRate(c.fmr[0], (c.low[0], c.high[0]), False)
        if right > last:
            beyond = score > c.score[last]
            return ScoreRate(c.fmr[-1], (0.0 if beyond else c.low[last], c.high[last]), beyond)
        low = c.low[right - 1] if score == c.score[right - 1] else min(c.low[right - 1], c.low[right])
        return ScoreRate(c.fmr[right - 1], (low, c.high[right - 1]), False)


@dataclass(frozen=True)
class CertificateFile:
    """Hold a certificate as it lies on disk: its exact bytes, and the signature beside it, unchecked."""

    path: Path
    data: bytes
    certificate: Certificate
    signature: Signature | None
    bundle: Signature | None = None
    """Signature of the manifest of the bundle that holds it, and so of these bytes, too."""

    @classmethod
    def read(cls, path: Path) -> CertificateFile:
        """Read a file. Raises BundleError for what is no certificate, NotTrusted for what is no signature."""
        data = _read(path)
        return cls(path, data, parse_certificate(data, path), signature_beside(path))


def file_name(query: str, gallery: str) -> str:
    """Return the file name of the certificate of this ordered pair of encoder ids."""
    return f"{short(query)}__{short(gallery)}.json"


def read_certificate(path: str | Path) -> Certificate:
    """Read and validate one certificate file. Raises BundleError naming the file."""
    return parse_certificate(_read(path), path)


def parse_certificate(data: bytes, path: str | Path) -> Certificate:
    """Validate the bytes of a certificate file; ``path`` is what errors name. Raises BundleError."""
    try:
        version = read_json(data, path)["schema_version"]  # first of all: another version has other fields
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BundleError(f"{path}: not a certificate: it states no schema_version.") from None
    if version != SCHEMA or isinstance(version, bool):
        remedy = (
            "Evaluate again with this pkd." if version in (1, 2) and not isinstance(version, bool) else "Upgrade pkd."
        )
        raise BundleError(f"{path}: certificate schema {version!r}; this pkd reads {SCHEMA}. {remedy}")
    try:
        certificate = Certificate.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise BundleError(f"{path}: not a certificate: {fault_of(error)}.") from None
    if not certificate.points:
        raise BundleError(f"{path}: a certificate without operating points certifies nothing. Evaluate on more people.")
    return certificate


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: not a certificate: {error.strerror}.") from None
