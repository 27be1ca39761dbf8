"""Measure faces and refuse those that are not good enough, by what server, gallery and request ask for together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pkd.serving.core.errors import LowQuality
from pkd.serving.core.gallery_schemas import MeasuredQuality, QualityLimits
from pkd.serving.core.options import Settings
from pkd.serving.inference.pipeline import Embedded

AT_MOST = frozenset({"yaw", "pitch", "roll", "occlusion"})
"""Measures whose limit is the largest value, on either side of 0; of the others it is the smallest."""


def measure_quality(embedded: Embedded, face: int) -> MeasuredQuality:
    """Measure one face of an embedded image."""
    measured = vars(embedded.quality[face])
    if embedded.faces is None:
        return MeasuredQuality(**measured, detection_score=None, face_pixels=None)
    found = embedded.faces[face]
    x1, y1, x2, y2 = (float(edge) for edge in found.box)
    return MeasuredQuality(
        **measured, detection_score=round(found.score, 4), face_pixels=round(min(x2 - x1, y2 - y1), 1)
    )


def server_limits(settings: Settings) -> QualityLimits:
    """Return what the operator asks of every face that is enrolled."""
    return QualityLimits(
        detection_score=settings.enrol_detection_score,
        face_pixels=settings.enrol_face_pixels,
        sharpness=settings.enrol_sharpness,
    )


def strictest(limits: Iterable[QualityLimits]) -> QualityLimits:
    """Combine limits: a face must pass all of them."""
    given = list(limits)
    return QualityLimits(
        **{
            name: (min if name in AT_MOST else max)(getattr(one, name) for one in given)
            for name in QualityLimits.model_fields
        }
    )


def require_quality(quality: MeasuredQuality, limits: QualityLimits) -> None:
    """Raise LowQuality with what was measured and what is required, unless every value is good enough.

    What could not be measured, as the pose in a crop that was aligned elsewhere, is not asked for.
    """
    measured, required = quality.model_dump(), limits.model_dump()
    bad = [name for name, value in measured.items() if value is not None and not _passes(name, value, required[name])]
    if not bad:
        return
    said = ", ".join(f"{name} is {measured[name]:g}, {_limit(name, required)} is required" for name in bad)
    raise LowQuality(f"{said}. {_remedy(bad)}", details={"low": bad, "measured": measured, "required": required})


def _passes(name: str, value: float, limit: float) -> bool:
    return abs(value) <= limit if name in AT_MOST else value >= limit


def _limit(name: str, required: dict[str, Any]) -> str:
    side = "most ±" if name in ("yaw", "pitch", "roll") else "most " if name in AT_MOST else "least "
    return f"at {side}{required[name]:g}"


def _remedy(bad: list[str]) -> str:
    if {"yaw", "pitch", "roll"} & set(bad):
        return "Take a picture from the front."
    if bad == ["exposure"]:
        return "Take a picture in even light, neither too dark nor too bright."
    return "Take a picture that shows the whole face." if bad == ["occlusion"] else "Take a larger, sharper picture."
