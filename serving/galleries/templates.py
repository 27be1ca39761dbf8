"""Rules that both stores share: which templates they take, what they refuse in which words, and what they keep."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pkd.serving.core.errors import (
    GalleryConflict,
    IdempotencyConflict,
    InvalidRequest,
    UnknownGallery,
    UnknownSubject,
    UnknownTemplate,
)
from pkd.serving.galleries.audit import Action
from pkd.serving.galleries.store import Enrolment, Gallery, GalleryStore, NewTemplate, Space, Subject, Template
from pkd.toolkit.core.errors import BadVector, SpaceMismatch

STORED = np.dtype("<f2")
"""Element type of a stored vector."""
TOLERANCE = 0.01
"""Largest distance of a vector's length from 1."""
Fingerprint = tuple[str, bytes]
"""Encoder, and the vector as every store keeps it, float16."""


def check_enrolment(gallery: Gallery, enrolment: Enrolment, encoders: Mapping[str, str]) -> dict[str, str]:
    """Refuse an enrolment that the gallery does not take; return the encoders that it then has, with their spaces.

    ``encoders``: those it has templates of → their space. Raises InvalidRequest, SpaceMismatch or BadVector.
    """
    if not enrolment.templates:
        raise InvalidRequest(f"subject {enrolment.subject}: no template was given. Send at least one.")
    known = dict(encoders)
    for template in enrolment.templates:
        _check_template(gallery, template, known)
        known[template.encoder] = template.space
    return known


def unit_rows(stored: bytes, count: int) -> NDArray[np.float32]:
    """Read stored vectors N×D as they are searched: what float16 took from their length is given back."""
    rows = np.frombuffer(stored, STORED).reshape(count, -1).astype(np.float64)
    norms = np.sqrt((rows * rows).sum(1, keepdims=True))  # row by row, so that it is the same for one as for many
    unit: NDArray[np.float32] = (rows / np.maximum(norms, np.finfo(np.float64).tiny)).astype(np.float32)
    return unit


def fingerprint(template: NewTemplate | Template) -> Fingerprint:
    """Return what makes two templates of a subject the same, bit for bit."""
    return template.encoder, np.asarray(template.vector, STORED).tobytes()


def fingerprints(store: GalleryStore, gallery: str, subject: str) -> set[Fingerprint]:
    """Return the fingerprints of all that a subject has; none for somebody who is not there."""
    try:
        return {fingerprint(one) for one in store.subject(gallery, subject, vectors=True).templates}
    except UnknownSubject:
        return set()


def choose_templates(gallery: str, subject: Subject, templates: Sequence[str]) -> Sequence[Template]:
    """Return a subject's templates with these ids, all for none. Raises UnknownTemplate naming the first missing."""
    there = {one.id: one for one in subject.templates}
    for id in templates:
        if id not in there:
            raise UnknownTemplate(f"subject {subject.id} of gallery {gallery} has no template {id}.")
    return [there[id] for id in dict.fromkeys(templates)] if templates else list(subject.templates)


def enrolments_again(subject: str, templates: Sequence[Template], action: Action, **more: Any) -> list[Enrolment]:
    """Make enrolments of templates that are there already, with vectors: one for each date and time of expiry."""
    groups: dict[tuple[float, float | None], list[NewTemplate]] = defaultdict(list)
    for one in templates:
        assert one.vector is not None
        groups[one.created, one.expires].append(NewTemplate(one.encoder, one.space, one.vector))
    return [
        Enrolment(subject, made, created=created, expires=expires, action=action, **more)
        for (created, expires), made in groups.items()
    ]


def move_enrolments(subject: str, into: str, templates: Sequence[Template]) -> list[Enrolment]:
    """Make the enrolments of a move, under keys by which the same move again adds nothing."""
    made = []
    for one in enrolments_again(into, templates, "move-in"):
        parts = [
            subject,
            *sorted(
                encoder + "," + hashlib.sha256(data).hexdigest() for encoder, data in map(fingerprint, one.templates)
            ),
        ]
        digest = hashlib.sha256("\n".join([*parts, f"{one.created} {one.expires}"]).encode()).hexdigest()
        made.append(replace(one, key=f"move:{digest}", digest=digest))
    return made


def check_move(gallery: str, subject: str, into: str, *, there: bool, new: bool) -> None:
    """Refuse a move to the subject themselves, to nobody, or to somebody where a new subject was asked for."""
    if subject == into:
        raise InvalidRequest(f"subject {subject}: templates cannot be moved to where they are. Name another subject.")
    if new and there:
        raise GalleryConflict(
            f"gallery {gallery} has a subject {into} already. Name a new one, or merge.",
            details={"expected": {"subject": "a new one"}, "got": {"subject": into}, "works": {"new": False}},
        )
    if not new and not there:
        raise unknown_subject(gallery, into)


def unknown_gallery(name: str) -> UnknownGallery:
    """Make the error of a gallery that is not there."""
    return UnknownGallery(f"No gallery is called {name}. PUT /v1/galleries/{name} creates it.")


def unknown_subject(gallery: str, subject: str) -> UnknownSubject:
    """Make the error of a subject who is not there."""
    return UnknownSubject(f"Gallery {gallery} has no subject {subject}.")


def other_space(name: str, there: str, asked: str) -> GalleryConflict:
    """Make the error of a gallery that is to be created and exists with another space."""
    return GalleryConflict(
        f"gallery {name} exists with space {there}. Use another name, or migrate it.",
        details={"expected": there, "got": asked},
    )


def not_migrating(name: str) -> GalleryConflict:
    """Make the error of a gallery that has one space alone."""
    return GalleryConflict(f"gallery {name} is not being migrated. Begin a migration first.")


def cannot_begin(name: str, moving_to: Space | None) -> GalleryConflict:
    """Make the error of a migration into the gallery's own space, or beside another migration."""
    state = f"moves to {moving_to.id} already" if moving_to else "has this space already"
    return GalleryConflict(f"gallery {name} {state}. End that first, or choose another.")


def left_behind(name: str, subject: str, space: str) -> GalleryConflict:
    """Make the error of a migration that would leave a subject without a template."""
    return GalleryConflict(
        f"gallery {name}: subjects would be left without a template, {subject} first. "
        f"Enrol them in space {space}, or delete them."
    )


def used_key(key: str | None) -> IdempotencyConflict:
    """Make the error of an idempotency key that another request was sent with."""
    return IdempotencyConflict(f"idempotency key {key} was used for another request. Use a new key for a new request.")


def _check_template(gallery: Gallery, template: NewTemplate, encoders: Mapping[str, str]) -> None:
    space = next((space for space in gallery.spaces if space.id == template.space), None)
    if space is None or encoders.get(template.encoder, space.id) != space.id:
        expected = [encoders[template.encoder]] if template.encoder in encoders else [s.id for s in gallery.spaces]
        raise SpaceMismatch(
            f"gallery {gallery.name} takes {template.encoder} in space {' or '.join(expected)}, not {template.space}.",
            details={"expected": expected, "got": template.space},
        )
    vector = np.asarray(template.vector)
    if vector.shape != (space.dim,):
        raise BadVector(f"the embedding has shape {vector.shape}, its space has {space.dim:,} numbers.")
    if not abs(float(np.linalg.norm(vector.astype(np.float64))) - 1) <= TOLERANCE:  # NaN fails, too
        raise BadVector("the embedding is not a unit vector.")
