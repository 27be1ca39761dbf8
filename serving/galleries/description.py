"""Description: a gallery and its subjects as JSON, the same in answers, in exports by the API and in those to files."""

from __future__ import annotations

import base64
from datetime import datetime, timezone
from typing import Any, overload

import numpy as np

from pkd.serving.galleries.store import Gallery, Space, Subject, Template

FORMAT = "pkd-gallery-1"
"""Of an exported gallery; its first line says so."""
Json = dict[str, Any]


@overload
def utc(seconds: float) -> datetime: ...
@overload
def utc(seconds: None) -> None: ...
def utc(seconds: float | None) -> datetime | None:
    """Turn seconds since 1970 into a moment in UTC, which JSON shows as ISO 8601."""
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)


def of_gallery(gallery: Gallery) -> Json:
    """The first line of an export."""
    retention = {} if gallery.retention is None else {"retention_seconds": gallery.retention}
    return {
        "format": FORMAT,
        "gallery": gallery.name,
        "space": _space(gallery.space),
        "moving_to": gallery.moving_to and _space(gallery.moving_to),
        **retention,
        "subjects": gallery.subjects,
    }


def of_subject(subject: Subject) -> Json:
    """A subject; vectors only where the store was asked for them."""
    consent = subject.consent
    return {
        "subject": subject.id,
        "attributes": dict(subject.attributes),
        "consent": consent and {"basis": consent.basis, "reference": consent.reference, "given": consent.given},
        "templates": [_template(one) for one in subject.templates],
    }


def _template(one: Template) -> Json:
    told: Json = {
        "id": one.id,
        "encoder": one.encoder,
        "space": one.space,
        "created": utc(one.created),
        "expires": utc(one.expires),
    }
    if one.vector is not None:
        stored = np.asarray(one.vector, "<f2").tobytes()
        told |= {"embedding": base64.b64encode(stored).decode(), "encoding": "b64_f16"}
    return told


def _space(space: Space) -> Json:
    return {"id": space.id, "dim": space.dim, "metric": "cosine"}
