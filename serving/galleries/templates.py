"""What every store demands of a template, and the form in which it keeps one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pkd.serving.core.errors import UnknownGallery
from pkd.serving.galleries.store import Gallery, NewTemplate
from pkd.toolkit.core.errors import BadVector, SpaceMismatch

STORED = np.dtype("<f2")
"""Element type of a stored vector."""
TOLERANCE = 0.01
"""Largest distance of a vector's length from 1."""


def unknown_gallery(name: str) -> UnknownGallery:
    """Make the error of a gallery that is not there."""
    return UnknownGallery(f"No gallery is called {name}. PUT /v1/galleries/{name} creates it.")


def check(gallery: Gallery, template: NewTemplate, encoders: dict[str, str]) -> None:
    """Raise SpaceMismatch or BadVector unless the gallery takes this template.

    ``encoders``: those it has templates of → their space.
    """
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


def unit_rows(stored: bytes, count: int) -> NDArray[np.float32]:
    """Vectors N×D as they are searched: what float16 took from their length is given back."""
    rows = np.frombuffer(stored, STORED).reshape(count, -1).astype(np.float64)
    norms = np.sqrt((rows * rows).sum(1, keepdims=True))  # row by row, so that it is the same for one as for many
    unit: NDArray[np.float32] = (rows / np.maximum(norms, np.finfo(np.float64).tiny)).astype(np.float32)
    return unit
