"""Certify: a certificate is what report.json says of one ordered pair of encoders, and nothing else.

So it can be made again from report.json, and a number that was changed in either shows.
"""

from __future__ import annotations

from pkd.toolkit.certificates.certificate import Certificate
from pkd.toolkit.evaluation.results.schema import Comparison, Evaluation

INTERVALS = (
    "bootstrap over identities, pairs between copies of one identity left out: percentiles for true accept rates, "
    "log-normal with the noise of pairs counted once for false match rates"
)
"""What bootstrap.py does, in words."""


def certify(comparison: Comparison, evaluation: Evaluation) -> Certificate:
    """The certificate of a comparison that has operating points, of teacher and student in one space."""
    encoders = {e.id: e for e in (evaluation.teacher, evaluation.student) if e}
    query, gallery = encoders[comparison.query], encoders[comparison.gallery]
    data, scores = evaluation.data, comparison.calibration.score
    return Certificate(
        query=query.id,
        query_role=query.role,
        gallery=gallery.id,
        gallery_role=gallery.role,
        space=gallery.space.id,
        protocol=evaluation.protocol,
        points=comparison.points,
        calibration=comparison.calibration,
        resolved_scores=(scores[0], scores[-1]),
        min_fmr=comparison.min_fmr,
        identities=data.identities,
        genuine_identities=comparison.genuine_identities,
        identity_pairs=comparison.identity_pairs,
        images=data.images,
        genuine_pairs=comparison.genuine_pairs,
        impostor_pairs=comparison.impostor_pairs,
        demographics=comparison.demographics,
        labels_digest=evaluation.labels.sha256 if evaluation.labels else None,
        data_name=data.name,
        data_digest=data.content_digest,
        synthetic=evaluation.synthetic,
        intervals=INTERVALS,
        resamples=evaluation.resamples,
        seed=evaluation.seed,
        tool=evaluation.tool,
        created=evaluation.created,
    )
