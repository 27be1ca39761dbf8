"""Verify: one comparison under the certificate of its ordered encoder pair."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pkd.serving.core.embedding_codec import decode
from pkd.serving.core.schemas import EmbeddingSide, ImageSide, Policy
from pkd.serving.inference.registry import Encoders
from pkd.toolkit.certificates.certificate import CertificateFile
from pkd.toolkit.core.errors import BadVector, NotCertified, PkdError, SpaceMismatch, UnsupportedFmr

Pair = tuple[str, str]
"""Encoder ids, query first."""
Rank = tuple[bool, float, float]
Vectors = NDArray[np.float64]
FEW = 64
"""Comparisons that are made one by one: they take less than a thread would."""
AT_ONCE = 2**20
"""Scores of one matrix product, about."""
REASONS: Mapping[type[PkdError], str] = {
    UnsupportedFmr: "unsupported-fmr",
    NotCertified: "not-certified",
    SpaceMismatch: "space-mismatch",
}
"""Why a pair of encoders is not compared, as answers say it; the ones that came nearest to being compared first."""
ROUNDING = 1e-9
"""More than a score of a matrix product is away from the same one alone."""


@dataclass(frozen=True)
class Terms:
    """What was settled before anything is embedded: the certificate and the threshold."""

    file: CertificateFile
    threshold: float
    target_fmr: float | None


@dataclass(frozen=True)
class Shown:
    """One vector of one side. A subject shows several; ``of`` then says which template this is."""

    encoder: str
    vector: Vectors
    """Unit, D."""
    of: Mapping[str, str] | None = None


def settle(
    encoders: Encoders, queries: Sequence[str], galleries: Sequence[str], policy: Policy | None, default_fmr: float
) -> tuple[dict[Pair, Terms], dict[Pair, PkdError]]:
    """The terms of every ordered pair of encoders that may be compared, and why the others may not.

    Raises SpaceMismatch, NotCertified or UnsupportedFmr where none may.
    """
    settled: dict[Pair, Terms] = {}
    refused: dict[Pair, PkdError] = {}
    for pair in sorted({(query, gallery) for query in set(queries) for gallery in set(galleries)}):
        try:
            settled[pair] = _terms(encoders, pair, policy, default_fmr)
        except (SpaceMismatch, NotCertified, UnsupportedFmr) as error:
            refused[pair] = error
    if not settled:
        order = list(REASONS)
        nearest = min(refused.values(), key=lambda error: order.index(type(error)))
        if len(refused) > 1 and "works" in nearest.details:
            nearest.details["works"] = {
                "queries": sorted({q for q, g in encoders.files if g in galleries}),
                "galleries": sorted({g for q, g in encoders.files if q in queries}),
            }
        raise nearest
    return settled, refused


def encoder_of(encoders: Encoders, side: ImageSide | EmbeddingSide) -> str:
    """Full id of the encoder behind one side; an image's must be loaded. Raises UnknownEncoder or SpaceMismatch."""
    if isinstance(side, ImageSide):
        return encoders.get(side.encoder).encoder.info.id
    id = encoders.resolve(side.encoder)
    encoders.require_space(id, side.space)
    return id


def received(encoders: Encoders, side: EmbeddingSide, name: str) -> NDArray[np.float64]:
    """The embedding a client sent, as a unit vector. Raises BadVector naming the side."""
    space = encoders.space_of(encoders.resolve(side.encoder))
    try:
        return decode(side.embedding, side.encoding, encoders.dim_of(space))
    except BadVector as error:
        raise BadVector(f"{name}: {error}") from None


def is_quick(a: Sequence[Shown], b: Sequence[Shown]) -> bool:
    """Whether ``decide`` takes so little time that the event loop can wait for it."""
    return len(a) * len(b) <= FEW


def decide(encoders: Encoders, settled: Mapping[Pair, Terms], a: Sequence[Shown], b: Sequence[Shown]) -> dict[str, Any]:
    """The answer of /v1/verify: the permitted comparison that speaks most for a match, of equal ones the first.

    Raises BadVector where sizes differ.
    """
    quick = is_quick(a, b)
    likely = product(a, b) if quick else _likely(settled, a, b)
    compared = [
        (*_compare(terms, one, other), terms, one, other)
        for one, other in likely
        if (terms := settled.get((one.encoder, other.encoder)))
    ]
    _, score, terms, one, other = min(compared, key=lambda entry: entry[0])
    rate = terms.file.certificate.fmr_at(score)
    return {
        "match": score >= terms.threshold,
        "score": score,
        "threshold": terms.threshold,
        "target_fmr": terms.target_fmr,
        "fmr_at_score": rate.fmr,
        "fmr_ci95": rate.ci95,
        "fmr_is_upper_bound": rate.is_upper_bound,
        "certificate": about(encoders, terms.file),
        "a": one.of,
        "b": other.of,
        "comparisons": len(compared) if quick else _count(settled, a, b),
    }


def left_out(shown: Sequence[Shown], permitted: set[str], refused: Mapping[str, PkdError]) -> list[dict[str, Any]]:
    """As the schema NotCompared: the templates of one side whose encoder takes part in no permitted pair."""
    counts = Counter(one.encoder for one in shown if one.encoder not in permitted)
    return [
        {"encoder": encoder, "templates": count, "reason": REASONS[type(refused[encoder])]}
        for encoder, count in counts.items()
    ]


def about(encoders: Encoders, file: CertificateFile) -> dict[str, Any]:
    """What an answer says of the certificate it rests on: as the schema CertificateAnswer."""
    c = file.certificate
    signature = None
    if signed := file.signature or file.bundle:
        covers = "certificate" if file.signature else "bundle"
        signature = {"key": signed.key, "verified": encoders.keys is not None, "covers": covers}
    return {
        "query": c.query,
        "gallery": c.gallery,
        "space": c.space,
        "identities": c.identities,
        "impostor_pairs": c.impostor_pairs,
        "data_name": c.data_name,
        "synthetic": c.synthetic,
        "created": c.created,
        "signature": signature,
    }


def rank(score: float, threshold: float, fmr: float) -> Rank:
    """Smaller speaks more for a match: one before none, then the smaller rate, then the larger margin."""
    return (score < threshold, fmr, threshold - score)


def _terms(encoders: Encoders, pair: Pair, policy: Policy | None, default_fmr: float) -> Terms:
    file = encoders.certificate_file(*pair)
    if policy is not None and policy.threshold is not None:
        return Terms(file, policy.threshold, None)
    fmr = default_fmr if policy is None or policy.target_fmr is None else policy.target_fmr
    try:
        return Terms(file, file.certificate.threshold(fmr), fmr)
    except UnsupportedFmr as error:
        points = file.certificate.points
        raise UnsupportedFmr(
            str(error), details={"smallest": points[-1].fmr, "largest": points[0].fmr, "got": fmr}
        ) from None


def _likely(settled: Mapping[Pair, Terms], a: Sequence[Shown], b: Sequence[Shown]) -> list[tuple[Shown, Shown]]:
    """The permitted comparisons of many that the one that speaks most for a match is among, in their order.

    Under one certificate the largest score speaks most: of each pair of encoders those are kept that rounding may have
    put below another one.
    """
    queries, galleries = _stacked(a), _stacked(b)
    found = []
    for query, gallery in settled:
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


def _stacked(shown: Sequence[Shown]) -> dict[str, tuple[list[int], Vectors]]:
    """Encoder → its vectors as rows, each once, and where each stands first."""
    first: dict[str, dict[bytes, int]] = defaultdict(dict)
    for place, one in enumerate(shown):
        first[one.encoder].setdefault(one.vector.tobytes(), place)
    places = {encoder: list(vectors.values()) for encoder, vectors in first.items()}
    return {encoder: (at, np.stack([shown[place].vector for place in at])) for encoder, at in places.items()}


def _count(settled: Mapping[Pair, Terms], a: Sequence[Shown], b: Sequence[Shown]) -> int:
    queries, galleries = (Counter(one.encoder for one in side) for side in (a, b))
    return sum(queries[query] * galleries[gallery] for query, gallery in settled)


def _compare(terms: Terms, a: Shown, b: Shown) -> tuple[Rank, float]:
    if len(a.vector) != len(b.vector):
        raise _sizes_differ(a.vector, b.vector)
    score = float(np.clip(np.dot(a.vector, b.vector), -1.0, 1.0))
    return rank(score, terms.threshold, terms.file.certificate.fmr_at(score).fmr), score


def _sizes_differ(a: Vectors, b: Vectors) -> BadVector:
    return BadVector(f"a has {len(a):,} numbers and b has {len(b):,}; embeddings of one space have the same size.")
