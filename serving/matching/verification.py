"""Compare two faces under the certificate of their ordered pair of encoders."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pkd.serving.core.embedding_codec import decode
from pkd.serving.core.schemas import (
    CertificateAnswer,
    ComparedTemplate,
    EmbeddingSide,
    NotCompared,
    NotComparedReason,
    Policy,
    Side,
    SignatureAnswer,
    VerifyAnswer,
)
from pkd.serving.inference.registry import Encoders, Loaded
from pkd.toolkit.certificates.certificate import Assurance, CertificateFile
from pkd.toolkit.core.errors import BadVector, NotCertified, PkdError, SpaceMismatch, UnsupportedFmr

Pair = tuple[str, str]
"""Encoder ids, query first."""
Rank = tuple[bool, float, float]
Vectors = NDArray[np.float64]
FEW = 64
"""Most comparisons that are made one by one: they take less time than a thread would."""
AT_ONCE = 2**20
"""Most scores of one matrix product, about."""
REASONS: Mapping[type[PkdError], NotComparedReason] = {
    UnsupportedFmr: "unsupported-fmr",
    NotCertified: "not-certified",
    SpaceMismatch: "space-mismatch",
}
"""Reasons why encoders are not compared, as answers say it; those that came nearest to being compared first."""
ROUNDING = 1e-9
"""Larger than the difference between a score of a matrix product and the same score alone."""


@dataclass(frozen=True)
class MatchRule:
    """Hold the certificate and the threshold of a pair of encoders, resolved before anything is embedded."""

    file: CertificateFile
    threshold: float
    target_fmr: float | None
    assurance: Assurance | None


@dataclass(frozen=True)
class ProbeVector:
    """Hold one vector of one side. A subject has several; ``template`` then says which this is."""

    encoder: str
    vector: Vectors
    """Unit, D."""
    template: ComparedTemplate | None = None


def resolve_rules(
    encoders: Encoders,
    queries: Sequence[str],
    galleries: Sequence[str],
    policy: Policy | None,
    default_fmr: float,
    default_assurance: Assurance = "point",
) -> tuple[dict[Pair, MatchRule], dict[Pair, PkdError]]:
    """Resolve the match rule of every ordered pair of encoders that may be compared, and why the others may not.

    Raises SpaceMismatch, NotCertified or UnsupportedFmr where none may.
    """
    rules: dict[Pair, MatchRule] = {}
    refused: dict[Pair, PkdError] = {}
    for pair in sorted({(query, gallery) for query in set(queries) for gallery in set(galleries)}):
        try:
            rules[pair] = _rule(encoders, pair, policy, default_fmr, default_assurance)
        except (SpaceMismatch, NotCertified, UnsupportedFmr) as error:
            refused[pair] = error
    if not rules:
        order = list(REASONS)
        nearest = min(refused.values(), key=lambda error: order.index(type(error)))
        if len(refused) > 1 and "works" in nearest.details:
            nearest.details["works"] = {
                "queries": sorted({q for q, g in encoders.files if g in galleries}),
                "galleries": sorted({g for q, g in encoders.files if q in queries}),
            }
        raise nearest
    return rules, refused


def encoder_of(encoders: Encoders, side: EmbeddingSide) -> str:
    """Return the full id of the encoder of an embedding. Raises UnknownEncoder or SpaceMismatch."""
    id = encoders.resolve(side.encoder)
    encoders.require_space(id, side.space)
    return id


@dataclass
class ResolvedSide:
    """Hold one side of a comparison whose encoder's name was resolved, once, before anything is decoded."""

    name: str
    """The request's name for it: a or b."""
    given: Side
    encoders: Sequence[str]
    """Full ids: one for an image or embedding, one a template for a subject."""
    vectors: Sequence[ProbeVector] = ()
    loaded: Loaded | None = None
    """The encoder that embeds an image; None for embeddings and subjects."""

    def decode(self, encoders: Encoders) -> None:
        """Take the vector of an embedding that a client sent. Raises BadVector naming the side."""
        if isinstance(self.given, EmbeddingSide):
            (encoder,) = self.encoders
            try:
                vector = decode(self.given.embedding, self.given.encoding, encoders.dim_of(encoders.space_of(encoder)))
            except BadVector as error:
                raise BadVector(f"{self.name}: {error}") from None
            self.vectors = [ProbeVector(encoder, vector)]


def is_quick(a: Sequence[ProbeVector], b: Sequence[ProbeVector]) -> bool:
    """Tell whether ``decide`` takes so little time that the event loop can wait for it."""
    return len(a) * len(b) <= FEW


def decide(
    encoders: Encoders, rules: Mapping[Pair, MatchRule], a: Sequence[ProbeVector], b: Sequence[ProbeVector]
) -> VerifyAnswer:
    """Answer /v1/verify with the permitted comparison that speaks most for a match, of equal ones the first.

    Raises BadVector where sizes differ.
    """
    quick = is_quick(a, b)
    likely = product(a, b) if quick else _likely(rules, a, b)
    compared = [
        (*_compare(rule, one, other), rule, one, other)
        for one, other in likely
        if (rule := rules.get((one.encoder, other.encoder)))
    ]
    _, score, rule, one, other = min(compared, key=lambda entry: entry[0])
    rate = rule.file.certificate.fmr_at(score)
    return VerifyAnswer(
        match=score >= rule.threshold,
        score=score,
        threshold=rule.threshold,
        target_fmr=rule.target_fmr,
        assurance=rule.assurance,
        fmr_at_score=rate.fmr,
        fmr_ci95=rate.ci95,
        fmr_is_upper_bound=rate.is_upper_bound,
        certificate=describe_certificate(encoders, rule.file),
        a=one.template,
        b=other.template,
        comparisons=len(compared) if quick else _count(rules, a, b),
    )


def left_out(vectors: Sequence[ProbeVector], permitted: set[str], refused: Mapping[str, PkdError]) -> list[NotCompared]:
    """Count the templates of one side whose encoder takes part in no permitted pair."""
    counts = Counter(one.encoder for one in vectors if one.encoder not in permitted)
    return [
        NotCompared(encoder=encoder, templates=count, reason=REASONS[type(refused[encoder])])
        for encoder, count in counts.items()
    ]


def describe_certificate(encoders: Encoders, file: CertificateFile) -> CertificateAnswer:
    """Describe the certificate that an answer rests on, and who signed it."""
    signature = None
    if signed := file.signature or file.bundle:
        covers: Literal["certificate", "bundle"] = "certificate" if file.signature else "bundle"
        signature = SignatureAnswer(key=signed.key, verified=encoders.keys is not None, covers=covers)
    return CertificateAnswer.model_validate({**dict(file.certificate), "signature": signature})


def rank(score: float, threshold: float, fmr: float) -> Rank:
    """Order comparisons.

    Smaller speaks more for a match: one before none, then the smaller rate, then the larger margin.
    """
    return (score < threshold, fmr, threshold - score)


def _rule(
    encoders: Encoders, pair: Pair, policy: Policy | None, default_fmr: float, default_assurance: Assurance
) -> MatchRule:
    file = encoders.certificate_file(*pair)
    if policy is not None and policy.threshold is not None:
        return MatchRule(file, policy.threshold, None, None)
    fmr = default_fmr if policy is None or policy.target_fmr is None else policy.target_fmr
    assurance = (policy and policy.assurance) or default_assurance
    try:
        return MatchRule(file, file.certificate.threshold(fmr, assurance), fmr, assurance)
    except UnsupportedFmr as error:
        smallest, largest = file.certificate.smallest(assurance), file.certificate.points[0].fmr
        raise UnsupportedFmr(str(error), details={"smallest": smallest, "largest": largest, "got": fmr}) from None


def _likely(
    rules: Mapping[Pair, MatchRule], a: Sequence[ProbeVector], b: Sequence[ProbeVector]
) -> list[tuple[ProbeVector, ProbeVector]]:
    """Choose the permitted comparisons of many that the one that speaks most for a match is among, in their order.

    Under one certificate the largest score speaks most: of each pair of encoders those are kept that rounding may have
    put below another one.
    """
    queries, galleries = _stacked(a), _stacked(b)
    found = []
    for query, gallery in rules:
        if query not in queries or gallery not in galleries:
            continue
        (of_a, rows), (of_b, columns) = queries[query], galleries[gallery]
        if rows.shape[1] != columns.shape[1]:
            raise _sizes_differ(rows[0], columns[0])
        step = max(1, AT_ONCE // len(columns))
        for begin in range(0, len(rows), step):
            scores = rows[begin : begin + step] @ columns.T
            below = scores < scores.max() - ROUNDING
            found += [(of_a[begin + row], of_b[column]) for row, column in np.argwhere(~below).tolist()]
    return [(a[one], b[other]) for one, other in sorted(found)]


def _stacked(given: Sequence[ProbeVector]) -> dict[str, tuple[list[int], Vectors]]:
    """Map each encoder to its vectors as rows, each once, and to where each stands first."""
    first: dict[str, dict[bytes, int]] = defaultdict(dict)
    for place, one in enumerate(given):
        first[one.encoder].setdefault(one.vector.tobytes(), place)
    places = {encoder: list(vectors.values()) for encoder, vectors in first.items()}
    return {encoder: (at, np.stack([given[place].vector for place in at])) for encoder, at in places.items()}


def _count(rules: Mapping[Pair, MatchRule], a: Sequence[ProbeVector], b: Sequence[ProbeVector]) -> int:
    queries, galleries = (Counter(one.encoder for one in side) for side in (a, b))
    return sum(queries[query] * galleries[gallery] for query, gallery in rules)


def _compare(rule: MatchRule, a: ProbeVector, b: ProbeVector) -> tuple[Rank, float]:
    if len(a.vector) != len(b.vector):
        raise _sizes_differ(a.vector, b.vector)
    score = float(np.clip(np.dot(a.vector, b.vector), -1.0, 1.0))
    return rank(score, rule.threshold, rule.file.certificate.fmr_at(score).fmr), score


def _sizes_differ(a: Vectors, b: Vectors) -> BadVector:
    return BadVector(f"a has {len(a):,} numbers and b has {len(b):,}; embeddings of one space have the same size.")
