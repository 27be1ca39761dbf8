"""Merge: which templates a subject has already, bit for bit, so that an import run again enrols nobody twice."""

from __future__ import annotations

import numpy as np

from pkd.serving.core.errors import UnknownSubject
from pkd.serving.galleries.store import GalleryStore, NewTemplate, Template

Print = tuple[str, bytes]
"""Encoder, and the vector as every store keeps it, float16."""


def print_of(template: NewTemplate | Template) -> Print:
    """What makes two templates of a subject the same."""
    return template.encoder, np.asarray(template.vector, "<f2").tobytes()


def prints(store: GalleryStore, gallery: str, subject: str) -> set[Print]:
    """Of all that a subject has; of somebody who is not there, none."""
    try:
        return {print_of(one) for one in store.subject(gallery, subject, vectors=True).templates}
    except UnknownSubject:
        return set()
