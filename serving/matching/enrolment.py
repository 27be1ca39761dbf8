"""Make templates that a store keeps out of the images and embeddings of a request."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import numpy as np
import orjson

from pkd.serving.core.embedding_codec import decode
from pkd.serving.core.errors import GalleryConflict, IdempotencyConflict, InvalidRequest, LowQuality, ServingError
from pkd.serving.core.gallery_schemas import (
    ConsentBody,
    DoubtAnswer,
    EnrolAnswer,
    EnrolledTemplate,
    EnrolOptions,
    MeasuredQuality,
    QualityLimits,
)
from pkd.serving.core.schemas import EmbeddingSide, ImageInput
from pkd.serving.galleries.store import Consent, Enrolled, Enrolment, Gallery, NewTemplate
from pkd.serving.matching.admission import check_encoder_allowed, encoder_to_enrol, searchable
from pkd.serving.matching.doubts import find_doubts, first_refusal, replace_mapped
from pkd.serving.matching.quality import measure_quality, require_quality, server_limits, strictest
from pkd.serving.matching.service import Photograph, Service
from pkd.toolkit.core.errors import NotCertified, PkdError, SpaceMismatch

FIRST_LIMITS = frozenset({"detection_score", "face_pixels", "sharpness"})
"""Limits of quality that the digests of requests have held from the beginning, stated or not."""
EnrolInput = bytes | ImageInput | EmbeddingSide
"""One input of an enrolment: a file's bytes, the same as base64, or an embedding made elsewhere."""


@dataclass(frozen=True)
class Ready:
    """Hold what can be stored, and what was measured of each of its templates."""

    enrolment: Enrolment
    qualities: Sequence[MeasuredQuality | None]


def new_enrolment(subject: str, inputs: Sequence[EnrolInput], options: EnrolOptions, key: str | None) -> Enrolment:
    """Describe what one subject is to be enrolled with, its templates yet to be made. Raises InvalidRequest."""
    expires = options.expires.timestamp() if options.expires else None
    if expires is not None and expires <= datetime.now(timezone.utc).timestamp():
        raise InvalidRequest(f"expires: {options.expires} is past.", details={"got": str(options.expires)})
    return Enrolment(
        subject=subject,
        templates=(),
        attributes=options.attributes,
        consent=consent_of(options.consent),
        expires=expires,
        key=key,
        digest=_digest(subject, inputs, options) if key else "",
    )


async def prepare(
    service: Service, gallery: Gallery, asked: Enrolment, inputs: Sequence[EnrolInput], options: EnrolOptions
) -> Ready:
    """Embed, measure and check everything that one subject is enrolled with.

    Cheap refusals come before any image is decoded. The detail ``index`` of an error says which input it is about.
    """
    made: dict[int, tuple[NewTemplate, MeasuredQuality | None]] = {}
    images: dict[int, bytes | str] = {}
    for index, item in enumerate(inputs):
        if isinstance(item, EmbeddingSide):
            made[index] = _received(service, gallery, item, index), None
        else:
            images[index] = item if isinstance(item, bytes) else item.image_b64
    demand = service.policies.of(gallery.name).liveness
    photographs = [Photograph(one, options.encoder, options.aligned, options.faces) for one in images.values()]
    demands = [(gallery.name, demand)] if demand.enrol else []
    await service.prove_live(options.liveness, inputs, demands, photographs)
    if images:
        made |= await _embedded(service, gallery, images, options)
    templates, qualities = zip(*(made[index] for index in range(len(inputs))), strict=True)
    return Ready(replace(asked, templates=templates), qualities)


async def enrol(
    service: Service,
    name: str,
    subject: str,
    inputs: Sequence[EnrolInput],
    options: EnrolOptions,
    key: str | None,
    actor: str,
) -> EnrolAnswer:
    """Answer POST …/templates. All inputs are enrolled, or none."""
    gallery = await service.stored(service.store.get, name)
    ready = await prepare(service, gallery, new_enrolment(subject, inputs, options, key), inputs, options)
    ready, doubts = await _examined(service, gallery, ready, options, actor)
    (outcome,) = await service.written(service.store.enrol, name, [ready.enrolment], actor)
    if isinstance(outcome, PkdError):
        raise explained(outcome, service, gallery, ready.enrolment)
    await replace_mapped(service, gallery, [(ready.enrolment, outcome)], actor)
    if outcome.replayed:  # what is there may be of another encoder than one would take today
        ready = await _as_stored(service, name, ready, outcome)
    parts = zip(outcome.templates, ready.enrolment.templates, ready.qualities, strict=True)
    return EnrolAnswer(
        gallery=name,
        subject=outcome.subject,
        templates=[
            EnrolledTemplate(id=id, encoder=one.encoder, space=one.space, quality=quality) for id, one, quality in parts
        ],
        sequence=outcome.sequence,
        replayed=outcome.replayed,
        doubts=list(doubts),
    )


async def examine(
    service: Service, gallery: Gallery, enrolments: Sequence[Enrolment], accept: Sequence[bool], actor: str
) -> list[tuple[Enrolment, Sequence[DoubtAnswer]] | PkdError]:
    """Judge enrolments by the gallery's policy: each as it is to be stored, with its doubts, or why it is refused.

    What was enrolled before under the same idempotency key is answered as then. Refusals are recorded.
    """
    policy = service.policies.of(gallery.name)
    if not policy.duplicates and not policy.own:
        return [(one, ()) for one in enrolments]
    known = await service.stored(service.store.replayed, gallery.name, enrolments)
    judged: list[tuple[Enrolment, Sequence[DoubtAnswer]] | PkdError] = []
    found = await find_doubts(service, gallery, enrolments)
    for one, before, doubts, accepted in zip(enrolments, known, found, accept, strict=True):
        refusal = None if accepted or before else first_refusal(doubts)
        if refusal:
            await service.written(service.store.note, gallery.name, "refuse", one.subject, actor)
            judged.append(refusal)
        elif before or not doubts:
            judged.append((one, ()))
        else:
            judged.append((replace(one, action="enrol-doubtful"), doubts))
    return judged


async def _examined(
    service: Service, gallery: Gallery, ready: Ready, options: EnrolOptions, actor: str
) -> tuple[Ready, Sequence[DoubtAnswer]]:
    (judged,) = await examine(service, gallery, [ready.enrolment], [options.accept_doubts], actor)
    if isinstance(judged, PkdError):
        raise judged
    return replace(ready, enrolment=judged[0]), judged[1]


def explained(error: PkdError, service: Service, gallery: Gallery, enrolment: Enrolment) -> PkdError:
    """Add to what the store refused what would have worked."""
    if isinstance(error, IdempotencyConflict):
        return error.explain(
            expected={"key": enrolment.key, "request": "the one first sent under this key, for the same subject"},
            got={"key": enrolment.key, "digest": enrolment.digest},
            works={"key": "a new one for a new request"},
        )
    if isinstance(error, (SpaceMismatch, NotCertified, GalleryConflict)):
        spaces = [one.id for one in gallery.spaces]
        encoders = sorted({one.encoder for one in enrolment.templates})
        works = {"galleries": searchable(service.encoders, spaces)}
        return error.explain(expected={"spaces": spaces}, got={"encoders": encoders}, works=works)
    return error


def consent_of(body: ConsentBody | None) -> Consent | None:
    """Make a consent as the store keeps it."""
    return Consent(**body.model_dump()) if body else None


def _received(service: Service, gallery: Gallery, side: EmbeddingSide, index: int) -> NewTemplate:
    encoders = service.encoders
    encoder = encoders.resolve(side.encoder)
    try:
        space = check_encoder_allowed(encoders, gallery, encoder, side.space)
        dim = next(one.dim for one in gallery.spaces if one.id == space)
        return NewTemplate(encoder, space, decode(side.embedding, side.encoding, dim).astype(np.float32))
    except PkdError as error:
        error.details["index"] = index
        raise


async def _embedded(
    service: Service, gallery: Gallery, images: dict[int, bytes | str], options: EnrolOptions
) -> dict[int, tuple[NewTemplate, MeasuredQuality | None]]:
    loaded = encoder_to_enrol(service.encoders, gallery, options.encoder)
    encoder = loaded.encoder.info.id
    space = check_encoder_allowed(service.encoders, gallery, encoder)
    limits = strictest([server_limits(service.settings), service.policies.of(gallery.name).quality, options.quality])
    places = list(images)
    try:
        done = await service.embed_all(list(images.values()), loaded, options.faces, options.aligned)
    except PkdError as error:
        error.details["index"] = places[error.details.get("index", 0)]
        raise
    made: dict[int, tuple[NewTemplate, MeasuredQuality | None]] = {}
    for index, embedded in zip(places, done, strict=True):
        quality = measure_quality(embedded, 0)
        try:
            require_quality(quality, limits)
        except LowQuality as error:
            error.details["index"] = index
            raise
        made[index] = NewTemplate(encoder, space, embedded.vectors[0]), quality
    return made


async def _as_stored(service: Service, gallery: str, ready: Ready, enrolled: Enrolled) -> Ready:
    try:
        there = await service.stored(service.store.subject, gallery, enrolled.subject)
    except ServingError:  # deleted in this very moment
        return ready
    stored = {one.id: one for one in there.templates}
    templates = [
        replace(made, encoder=stored[id].encoder, space=stored[id].space) if id in stored else made
        for id, made in zip(enrolled.templates, ready.enrolment.templates, strict=True)
    ]
    return replace(ready, enrolment=replace(ready.enrolment, templates=templates))


def _digest(subject: str, inputs: Sequence[EnrolInput], options: EnrolOptions) -> str:
    """Hash what was asked (SHA-256), however its bytes were framed: a multipart boundary differs every time."""
    parts = [
        hashlib.sha256(item).hexdigest() if isinstance(item, bytes) else item.model_dump(mode="json") for item in inputs
    ]
    stated = options.model_dump(mode="json", include=set(EnrolOptions.model_fields) - {"liveness"})
    for name, field in QualityLimits.model_fields.items():
        if name not in FIRST_LIMITS and stated["quality"][name] == field.default:
            del stated["quality"][name]  # so that keys of before it existed are known again
    asked = [subject, parts, stated]
    return hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).hexdigest()
