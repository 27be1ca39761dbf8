"""Doubt an enrolment: a face that matches another subject, or that does not match its subject's own templates.

The gallery's policy says at which rates, and whether a doubt refuses or is flagged. A search for a new face finds
somebody by chance with a false positive identification rate; that is the share of new people who are doubted wrongly.
Two requests at the same moment do not see each other: pkd-gallery review finds what slipped through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from pkd.serving.core.errors import DuplicateFace, UnknownSubject, UnlikeSubject
from pkd.serving.core.gallery_schemas import DoubtAnswer, DuplicateRule, OwnRule
from pkd.serving.galleries.mapping import replaced
from pkd.serving.galleries.store import Enrolled, Enrolment, Gallery, Template
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.identification import per_comparison
from pkd.serving.matching.service import Service
from pkd.toolkit.certificates.certificate import Certificate
from pkd.toolkit.certificates.extrapolation import Threshold, threshold_for
from pkd.toolkit.core.errors import PkdError, UnsupportedFmr


async def find_doubts(service: Service, gallery: Gallery, enrolments: Sequence[Enrolment]) -> list[list[DoubtAnswer]]:
    """List the doubts about each enrolment by the gallery's policy, also of one against the others of the list."""
    if not enrolments or (not (policy := service.policies.of(gallery.name)).duplicates and not policy.own):
        return [[] for _ in enrolments]
    return await service.stored(_find, service, gallery, enrolments)


async def replace_mapped(
    service: Service, gallery: Gallery, done: Sequence[tuple[Enrolment, Enrolled]], actor: str
) -> None:
    """Delete the mapped templates of those who were enrolled by the new teacher itself."""
    if not gallery.mapping.maps:
        return
    for enrolment, enrolled in done:
        encoders = [one.encoder for one in enrolment.templates]
        if enrolled.replayed or not any(origin.new in encoders for origin in gallery.mapping.maps.values()):
            continue
        try:
            there = await service.stored(service.store.subject, gallery.name, enrolled.subject)
            if needless := replaced(gallery.mapping, there, encoders):
                await service.written(service.store.remove_templates, gallery.name, there.id, needless, actor)
        except UnknownSubject:  # deleted at this moment
            continue


def _find(service: Service, gallery: Gallery, enrolments: Sequence[Enrolment]) -> list[list[DoubtAnswer]]:
    return [[*_duplicates(service, gallery, one, enrolments), *_unlike(service, gallery, one)] for one in enrolments]


def _duplicates(
    service: Service, gallery: Gallery, enrolment: Enrolment, beside: Sequence[Enrolment]
) -> list[DoubtAnswer]:
    rule, encoders = service.policies.of(gallery.name).duplicates, service.encoders
    if rule is None:
        return []
    others = [one for one in beside if one.subject != enrolment.subject]
    found = []
    for index, template in enumerate(enrolment.templates):
        vector = np.asarray(template.vector, np.float64)
        best: dict[str, tuple[str, float]] = {}
        searched = 0
        for encoder, count in gallery.templates.items():
            if not count or (template.encoder, encoder) not in encoders.files or encoder in gallery.mapping.staged:
                continue
            (result,) = service.store.search(gallery.name, encoder, vector.astype(np.float32)[None], 2)
            searched += result.searched
            for hit in result.hits:
                if hit.subject != enrolment.subject and hit.score > best.get(encoder, ("", -2.0))[1]:
                    best[encoder] = hit.subject, hit.score
        for one in others:
            for other in one.templates:
                if (template.encoder, other.encoder) in encoders.files and len(other.vector) == len(vector):
                    searched += 1
                    score = float(vector @ np.asarray(other.vector, np.float64))
                    if score > best.get(other.encoder, ("", -2.0))[1]:
                        best[other.encoder] = one.subject, score
        for encoder, (subject, score) in best.items():
            certificate = encoders.files[template.encoder, encoder].certificate
            needed = _threshold(certificate, per_comparison(rule.fpir, searched))
            if needed and score >= needed.score:
                found.append(_doubt("duplicate", rule, index, subject, score, needed, rule.fpir))
    return found


def _unlike(service: Service, gallery: Gallery, enrolment: Enrolment) -> list[DoubtAnswer]:
    rule, encoders = service.policies.of(gallery.name).own, service.encoders
    if rule is None:
        return []
    try:
        there: Sequence[Template] = service.store.subject(gallery.name, enrolment.subject, vectors=True).templates
    except UnknownSubject:
        there = ()
    found = []
    for index, template in enumerate(enrolment.templates):
        own = [(one.encoder, one.vector) for one in there]
        own += [(one.encoder, one.vector) for place, one in enumerate(enrolment.templates) if place != index]
        compared = _compared(encoders, template.encoder, template.vector, own, rule.fmr)
        if compared and all(score < needed.score for score, needed in compared):
            score, needed = max(compared, key=lambda one: one[0] - one[1].score)
            found.append(_doubt("unlike", rule, index, enrolment.subject, score, needed, rule.fmr))
    return found


def _doubt(
    kind: Literal["duplicate", "unlike"],
    rule: DuplicateRule | OwnRule,
    index: int,
    subject: str,
    score: float,
    needed: Threshold,
    rate: float,
) -> DoubtAnswer:
    return DoubtAnswer(
        kind=kind, action=rule.action, index=index, subject=subject, score=score,
        threshold=needed.score, rate=rate, calibrated=needed.calibrated,
    )  # fmt: skip


def _compared(
    encoders: Encoders, encoder: str, vector: Any, own: Sequence[tuple[str, Any]], fmr: float
) -> list[tuple[float, Threshold]]:
    """Score a template against others that a certificate covers it against, each with the threshold it needs."""
    query, thresholds = np.asarray(vector, np.float64), dict[str, Threshold | None]()
    found = []
    for other, stored in own:
        file = encoders.files.get((encoder, other))
        if file is None or stored is None or len(stored) != len(query):
            continue
        if other not in thresholds:
            thresholds[other] = _threshold(file.certificate, fmr)
        needed, row = thresholds[other], np.asarray(stored, np.float64)
        if needed:
            found.append((float(query @ row / (np.linalg.norm(query) * np.linalg.norm(row))), needed))
    return found


def _threshold(certificate: Certificate, fmr: float) -> Threshold | None:
    try:
        return threshold_for(certificate, fmr)
    except UnsupportedFmr:  # no tail to follow: nothing is known about such a rate
        return None


def first_refusal(doubts: Sequence[DoubtAnswer]) -> PkdError | None:
    """Make the refusal of the first doubt that refuses; None where all are flagged only."""
    doubt = next((one for one in doubts if one.action == "refuse"), None)
    if doubt is None:
        return None
    got = doubt.model_dump(include={"score", "threshold", "rate", "calibrated"})
    if doubt.kind == "duplicate":
        return DuplicateFace(
            f"the face matches subject {doubt.subject} ({doubt.score:.3f}, {doubt.threshold:.3f} is enough at FPIR "
            f"{doubt.rate:g}). Enrol it under that id, or send accept_doubts with an admin key.",
            details={
                "index": doubt.index, "expected": {"subject": doubt.subject}, "got": got,
                "works": {"subject": doubt.subject, "accept_doubts": True},
            },
        )  # fmt: skip
    return UnlikeSubject(
        f"the face does not match the templates of subject {doubt.subject} (at best {doubt.score:.3f}, "
        f"{doubt.threshold:.3f} is needed at FMR {doubt.rate:g}). Check the id and the picture, or send "
        "accept_doubts with an admin key.",
        details={
            "index": doubt.index, "expected": {"score": doubt.threshold}, "got": got, "works": {"accept_doubts": True},
        },
    )  # fmt: skip
