"""Measure a face before it is enrolled, and refuse one that is not good enough.

A bad probe costs one search; a bad template costs every search after it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pkd.serving.core.errors import LowQuality
from pkd.serving.core.options import Settings
from pkd.serving.inference.pipeline import Embedded


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


def measure(embedded: Embedded, face: int) -> Quality:
    """Measure one face of an embedded image."""
    sharpness = round(embedded.sharpness[face], 2)
    if embedded.faces is None:
        return Quality(None, None, sharpness)
    found = embedded.faces[face]
    x1, y1, x2, y2 = (float(edge) for edge in found.box)
    return Quality(round(found.score, 4), round(min(x2 - x1, y2 - y1), 1), sharpness)


def require(quality: Quality, minimum: MinimumQuality) -> None:
    """Raise LowQuality with what was measured and what is required, unless every value is enough."""
    measured, required = asdict(quality), asdict(minimum)
    low = [name for name, value in measured.items() if value is not None and value < required[name]]
    if low:
        said = ", ".join(f"{name} is {measured[name]:g}, at least {required[name]:g} is required" for name in low)
        raise LowQuality(
            f"{said}. Take a larger, sharper picture.", details={"low": low, "measured": measured, "required": required}
        )
