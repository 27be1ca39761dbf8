"""Galleries and subjects as JSON: the same in answers, in exports by the API and in those to files."""

from __future__ import annotations

import base64
from datetime import datetime, timezone
from typing import Any, overload

from pkd.serving.galleries.store import Gallery, Space, Subject, Template
from pkd.serving.galleries.templates import fingerprint

FORMAT = "pkd-gallery-1"
"""Name of the format, which the first line of an export states."""
Json = dict[str, Any]


@overload
def utc(seconds: float) -> datetime: ...
@overload
def utc(seconds: None) -> None: ...
def utc(seconds: float | None) -> datetime | None:
    """Turn seconds since 1970 into a moment in UTC, which JSON shows as ISO 8601."""
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)


def of_gallery(gallery: Gallery) -> Json:
    """Describe a gallery, as the first line of an export does."""
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
    """Describe a subject; vectors only where the store was asked for them."""
    consent = subject.consent
    return {
        "subject": subject.id,
        "attributes": dict(subject.attributes),
        "consent": consent and {"basis": consent.basis, "reference": consent.reference, "given": consent.given},
        "templates": [_template(one) for one in subject.templates],
    }


def _template(one: Template) -> Json:
    described: Json = {
        "id": one.id,
        "encoder": one.encoder,
        "space": one.space,
        "created": utc(one.created),
        "expires": utc(one.expires),
    }
    if one.vector is not None:
        described |= {"embedding": base64.b64encode(fingerprint(one)[1]).decode(), "encoding": "b64_f16"}
    return described


def _space(space: Space) -> Json:
    return {"id": space.id, "dim": space.dim, "metric": "cosine"}
