"""Verify: one comparison under the certificate of its ordered encoder pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pkd.serving.encoders import Encoders
from pkd.serving.problems import Problem
from pkd.serving.schemas import EmbeddingSide, Policy, Side
from pkd.serving.vectors import decode
from pkd.toolkit.certificate import Certificate
from pkd.toolkit.errors import BadVector, UnsupportedFmr
from pkd.toolkit.space import short


@dataclass(frozen=True)
class Terms:
    """What was settled before anything is embedded: the certificate and the threshold."""

    certificate: Certificate
    signature: dict[str, Any] | None
    """Who signed it, and whether that was checked; None where neither it nor its bundle is signed."""
    threshold: float
    target_fmr: float | None


def settle(encoders: Encoders, a: Side, b: Side, policy: Policy | None, default_fmr: float) -> Terms:
    """Look up the ordered pair's certificate and its threshold. Raises Problem: 404, 409 or unsupported-fmr."""
    query, gallery = (encoder_of(encoders, side) for side in (a, b))
    for side, id in ((a, query), (b, gallery)):
        known = encoders.space_of(id)
        if isinstance(side, EmbeddingSide) and side.space is not None and known is not None and side.space != known:
            raise Problem(
                "space-mismatch",
                f"the embedding is said to lie in {short(side.space)}, but {short(id)} embeds into {short(known)}.",
                expected={"space": known},
                got={"encoder": id, "space": side.space},
            )
    file = encoders.certificate_file(query, gallery)
    certificate, signature = file.certificate, None
    if signed := file.signature or file.bundle:
        covers = "certificate" if file.signature else "bundle"
        signature = {"key": signed.key, "verified": encoders.keys is not None, "covers": covers}
    if policy is not None and policy.threshold is not None:
        return Terms(certificate, signature, policy.threshold, None)
    fmr = default_fmr if policy is None or policy.target_fmr is None else policy.target_fmr
    try:
        return Terms(certificate, signature, certificate.threshold(fmr), fmr)
    except UnsupportedFmr as error:
        points = certificate.points
        raise Problem("unsupported-fmr", str(error), smallest=points[-1].fmr, largest=points[0].fmr, got=fmr) from None


def encoder_of(encoders: Encoders, side: Side) -> str:
    """Full id of the encoder behind one side; an image's must be loaded."""
    if isinstance(side, EmbeddingSide):
        return encoders.resolve(side.encoder)
    return encoders.get(side.encoder).encoder.info.id


def received(encoders: Encoders, side: EmbeddingSide, name: str) -> NDArray[np.float64]:
    """The embedding a client sent, as a unit vector. Raises BadVector naming the side."""
    space = encoders.space_of(encoders.resolve(side.encoder))
    try:
        return decode(side.embedding, side.encoding, encoders.dim_of(space))
    except BadVector as error:
        raise BadVector(f"{name}: {error}") from None


def decide(terms: Terms, a: NDArray[np.floating], b: NDArray[np.floating]) -> dict[str, Any]:
    """The answer of /v1/verify for two unit vectors. Raises BadVector where their sizes differ."""
    if len(a) != len(b):
        raise BadVector(f"a has {len(a):,} numbers and b has {len(b):,}; embeddings of one space have the same size.")
    score = float(np.clip(np.dot(a, b), -1.0, 1.0))
    rate = terms.certificate.fmr_at(score)
    c = terms.certificate
    return {
        "match": score >= terms.threshold,
        "score": score,
        "threshold": terms.threshold,
        "target_fmr": terms.target_fmr,
        "fmr_at_score": rate.fmr,
        "fmr_ci95": rate.ci95,
        "fmr_is_upper_bound": rate.is_upper_bound,
        "certificate": {
            "query": c.query,
            "gallery": c.gallery,
            "space": c.space,
            "identities": c.identities,
            "impostor_pairs": c.impostor_pairs,
            "data_name": c.data_name,
            "synthetic": c.synthetic,
            "created": c.created,
            "signature": terms.signature,
        },
    }
