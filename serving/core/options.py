"""Define the limits and defaults of a server that an operator may change. Each is a flag of pkd-serve."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from pkd.toolkit.certificates.certificate import Assurance
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.gpu import Device


def usable_cores() -> int:
    """Count the cores this process may run on, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _number(default: float, low: float, high: float, says: str) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "says": says})


@dataclass(frozen=True)
class Settings:
    """Hold limits and defaults of one server process. Raises InputError for one that is out of its range."""

    target_fmr: float = _number(1e-3, 1e-12, 1 - 1e-12, "false match rate of /verify without a policy, a fraction")
    target_fpir: float = _number(
        0.01, 1e-12, 1 - 1e-12, "share of searches for strangers that may find somebody, where none is stated"
    )
    threads: int = field(
        default_factory=usable_cores,
        metadata={
            "low": 1,
            "high": 1024,
            "says": "worker threads of a process; each decodes, detects and encodes one image at a time on one core",
        },
    )
    queue: int = _number(64, 1, 100_000, "requests that may wait for a worker thread; further ones get 429")
    max_body: int = _number(8 * 2**20, 1024, 2**30, "largest request body, bytes")
    max_stream: int = _number(4 * 2**30, 1024, 2**50, "largest body of a bulk route, bytes; it is never held whole")
    header_seconds: float = _number(10.0, 0.1, 3600, "longest time for the headers of a request to arrive, seconds")
    body_seconds: float = _number(
        30.0,
        0.1,
        3600,
        "longest time for a body, for the next piece of a bulk one, and for a client to take nothing, seconds",
    )
    request_seconds: float = _number(60.0, 0.1, 86400, "longest time until the answer, waiting included, seconds")
    drain_seconds: int = _number(30, 0, 86400, "longest time that requests in progress get after SIGTERM, seconds")
    sweep_seconds: float = _number(60.0, 0.1, 86400, "time between two sweeps of expired templates, seconds")
    detector_score: float = _number(0.5, 1e-6, 1 - 1e-6, "smallest detection score that counts as a face")

    enrol_detection_score: float = _number(0.6, 0, 1, "smallest detection score of a face that may be enrolled")
    enrol_face_pixels: float = _number(40, 0, 10_000, "shorter side of the smallest face that may be enrolled, pixels")
    enrol_sharpness: float = _number(10, 0, 1e6, "smallest sharpness of a face that may be enrolled; below is blur")

    device: Device = "cpu"
    """Device that bundles run on. On a GPU the crops of many requests are batched."""

    assurance: Assurance = "point"
    """Promise that target rates are asked with where a request states none."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.metadata:
                try:
                    check(each.name, getattr(self, each.name))
                except InputError as error:
                    raise InputError(f"{each.name} {getattr(self, each.name):g}: {error}") from None


def check(name: str, value: float) -> None:
    """Raise InputError unless ``value`` is one that the setting ``name`` may have."""
    (setting,) = (each for each in fields(Settings) if each.name == name)
    low, high = setting.metadata["low"], setting.metadata["high"]
    if not (math.isfinite(value) and low <= value <= high):
        raise InputError(f"give a number from {low:g} to {high:g}.")
