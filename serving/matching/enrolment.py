"""Make templates that a store keeps out of the images and embeddings of a request."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
import orjson

from pkd.serving.core.embedding_codec import decode
from pkd.serving.core.errors import GalleryConflict, IdempotencyConflict, InvalidRequest, LowQuality, ServingError
from pkd.serving.core.gallery_schemas import ConsentBody, EnrolOptions
from pkd.serving.core.options import Settings
from pkd.serving.core.schemas import EmbeddingSide, ImageInput
from pkd.serving.galleries.store import Consent, Enrolled, Enrolment, Gallery, NewTemplate
from pkd.serving.inference.pipeline import Embedded
from pkd.serving.matching.admission import check_encoder_allowed, encoder_to_enrol, searchable
from pkd.serving.matching.service import Service
from pkd.toolkit.core.errors import NotCertified, PkdError, SpaceMismatch

EnrolInput = bytes | ImageInput | EmbeddingSide
"""One input of an enrolment: a file's bytes, the same as base64, or an embedding made elsewhere."""


@dataclass(frozen=True)
class Ready:
    """Hold what can be stored, and what was measured of each of its templates."""

    enrolment: Enrolment
    qualities: Sequence[Quality | None]


@dataclass(frozen=True)
class MinimumQuality:
    """Hold the smallest values of a face that may be enrolled; 0 takes anything."""

    detection_score: float
    """Score of the detector, 0 to 1."""
    face_pixels: float
    """Shorter side of the face's box in the photograph, pixels: a smaller face is a crop that was blown up."""
    sharpness: float
    """Variance of the Laplacian of the grey crop, squared grey levels (0–255): below it, blur or a blank picture."""

    @classmethod
    def of(cls, settings: Settings, asked: MinimumQuality) -> MinimumQuality:
        """Take the larger of what the operator and a request ask for."""
        return cls(
            max(settings.enrol_detection_score, asked.detection_score),
            max(settings.enrol_face_pixels, asked.face_pixels),
            max(settings.enrol_sharpness, asked.sharpness),
        )


@dataclass(frozen=True)
class Quality:
    """Hold what was measured of one face; None where nothing was detected because the image was a crop already."""

    detection_score: float | None
    face_pixels: float | None
    sharpness: float


def measure_quality(embedded: Embedded, face: int) -> Quality:
    """Measure one face of an embedded image."""
    sharpness = round(embedded.sharpness[face], 2)
    if embedded.faces is None:
        return Quality(None, None, sharpness)
    found = embedded.faces[face]
    x1, y1, x2, y2 = (float(edge) for edge in found.box)
    return Quality(round(found.score, 4), round(min(x2 - x1, y2 - y1), 1), sharpness)


def require_quality(quality: Quality, minimum: MinimumQuality) -> None:
    """Raise LowQuality with what was measured and what is required, unless every value is enough."""
    measured, required = asdict(quality), asdict(minimum)
    low = [name for name, value in measured.items() if value is not None and value < required[name]]
    if low:
        said = ", ".join(f"{name} is {measured[name]:g}, at least {required[name]:g} is required" for name in low)
        raise LowQuality(
            f"{said}. Take a larger, sharper picture.", details={"low": low, "measured": measured, "required": required}
        )


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
    made: dict[int, tuple[NewTemplate, Quality | None]] = {}
    images: dict[int, bytes | str] = {}
    for index, item in enumerate(inputs):
        if isinstance(item, EmbeddingSide):
            made[index] = _received(service, gallery, item, index), None
        else:
            images[index] = item if isinstance(item, bytes) else item.image_b64
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
) -> dict[str, Any]:
    """Answer POST …/templates. All inputs are enrolled, or none."""
    gallery = await service.stored(service.store.get, name)
    ready = await prepare(service, gallery, new_enrolment(subject, inputs, options, key), inputs, options)
    (outcome,) = await service.written(service.store.enrol, name, [ready.enrolment], actor)
    if isinstance(outcome, PkdError):
        raise explained(outcome, service, gallery, ready.enrolment)
    if outcome.replayed:  # what is there may be of another encoder than one would take today
        ready = await _as_stored(service, name, ready, outcome)
    return describe_enrolment(name, ready, outcome)


def describe_enrolment(gallery: str, ready: Ready, enrolled: Enrolled) -> dict[str, Any]:
    """Describe an enrolment, as the schema EnrolAnswer."""
    parts = zip(enrolled.templates, ready.enrolment.templates, ready.qualities, strict=True)
    return {
        "gallery": gallery,
        "subject": enrolled.subject,
        "templates": [
            {"id": id, "encoder": one.encoder, "space": one.space, "quality": quality and asdict(quality)}
            for id, one, quality in parts
        ],
        "sequence": enrolled.sequence,
        "replayed": enrolled.replayed,
    }


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
) -> dict[int, tuple[NewTemplate, Quality | None]]:
    loaded = encoder_to_enrol(service.encoders, gallery, options.encoder)
    encoder = loaded.encoder.info.id
    space = check_encoder_allowed(service.encoders, gallery, encoder)
    minimum = MinimumQuality.of(service.settings, MinimumQuality(**options.quality.model_dump()))
    places = list(images)
    try:
        done = await service.embed_all(list(images.values()), loaded, options.faces, options.aligned)
    except PkdError as error:
        error.details["index"] = places[error.details.get("index", 0)]
        raise
    made: dict[int, tuple[NewTemplate, Quality | None]] = {}
    for index, embedded in zip(places, done, strict=True):
        quality = measure_quality(embedded, 0)
        try:
            require_quality(quality, minimum)
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
    asked = [subject, parts, options.model_dump(mode="json", include=set(EnrolOptions.model_fields))]
    return hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).hexdigest()
