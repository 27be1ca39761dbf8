"""Settings: what an operator may change about a server, and its defaults."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field

from pkd.toolkit.errors import InputError


def usable_cores() -> int:
    """Cores this process may run on, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Floor:
    """Smallest values of a face that may be enrolled; 0 takes anything."""

    detection_score: float = 0.6
    """Of the detector, 0 to 1."""
    face_pixels: float = 40.0
    """Shorter side of the face's box in the photograph, pixels: a smaller face is a crop that was blown up."""
    sharpness: float = 10.0
    """Variance of the Laplacian of the grey crop, squared grey levels (0–255): below it, blur or a blank picture."""

    def stricter(self, other: Floor) -> Floor:
        """The larger of each value."""
        return Floor(**{name: max(value, getattr(other, name)) for name, value in asdict(self).items()})


@dataclass(frozen=True)
class Settings:
    """Limits and defaults of one server process."""

    target_fmr: float = 1e-3
    """False match rate that /verify aims at when a request states no policy, a fraction."""
    threads: int = field(default_factory=usable_cores)
    """Worker threads; each decodes, detects and encodes one image at a time on one core."""
    queue: int = 64
    """Requests that may wait for a worker; further ones get 429."""
    max_body: int = 8 * 1024 * 1024
    """Largest request body, bytes."""
    body_seconds: float = 30.0
    """Longest time in which a request's body must arrive, seconds."""
    drain_seconds: int = 30
    """Longest time that requests in progress get to finish after SIGTERM, seconds."""
    detector_score: float = 0.5
    """Smallest detection score that counts as a face, 0 to 1."""
    quality: Floor = field(default_factory=Floor)
    """What a face must have to be enrolled; a request can only ask for more."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.target_fmr) and 0 < self.target_fmr < 1):
            raise InputError(f"target FMR {self.target_fmr:g}: give a fraction between 0 and 1, for example 1e-3.")
        if self.threads < 1:
            raise InputError(f"{self.threads} threads: give 1 or more.")
        if self.queue < 1:
            raise InputError(f"queue of {self.queue}: give 1 or more.")
        if not 0 < self.detector_score < 1:
            raise InputError(f"detector score {self.detector_score:g}: give a number between 0 and 1.")
