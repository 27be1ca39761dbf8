"""Define the limits and defaults of a server that an operator may change. Each is an option of pkd-serve."""

from __future__ import annotations

import ipaddress
import os

from pydantic import Field

from pkd.toolkit.certificates.certificate import Assurance
from pkd.toolkit.core.cli_options import Options
from pkd.toolkit.core.gpu import Device


def usable_cores() -> int:
    """Count the cores this process may run on, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can connect to ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # another name may resolve to anything


class Settings(Options):
    """Hold limits and defaults of one server process."""

    device: Device = "cpu"
    """Device that encoders run on; on a GPU the crops of many requests go through together."""
    assurance: Assurance = "point"
    """Meaning of target rates, where a request states none: met on average, or kept with 95 % confidence."""
    target_fmr: float = Field(default=1e-3, ge=1e-12, lt=1)
    """False match rate of /verify without a policy, a fraction."""
    target_fpir: float = Field(default=0.01, ge=1e-12, lt=1)
    """Share of searches for strangers that may find somebody, where none is stated."""
    threads: int = Field(default_factory=usable_cores, ge=1, le=1024)
    """Worker threads of a process, each for one image at a time; by default one per core, 64 with --device cuda."""
    queue: int = Field(default=64, ge=1, le=100_000)
    """Requests that may wait for a worker thread; further ones get 429."""
    max_body: int = Field(default=8 * 2**20, ge=1024, le=2**30)
    """Largest request body, bytes."""
    max_stream: int = Field(default=4 * 2**30, ge=1024, le=2**50)
    """Largest body of a bulk route, bytes; it is never held whole."""
    header_seconds: float = Field(default=10.0, ge=0.1, le=3600)
    """Longest time for the headers of a request to arrive, seconds."""
    body_seconds: float = Field(default=30.0, ge=0.1, le=3600)
    """Longest time for a body, for the next piece of a bulk one, and for a client to take nothing, seconds."""
    request_seconds: float = Field(default=60.0, ge=0.1, le=86400)
    """Longest time until the answer, waiting included, seconds."""
    drain_seconds: int = Field(default=30, ge=0, le=86400)
    """Longest time that requests in progress get after SIGTERM, seconds."""
    sweep_seconds: float = Field(default=60.0, ge=0.1, le=86400)
    """Time between two sweeps of expired templates, seconds."""
    detector_score: float = Field(default=0.5, ge=1e-6, le=1 - 1e-6)
    """Smallest detection score that counts as a face."""
    enrol_detection_score: float = Field(default=0.6, ge=0, le=1)
    """Smallest detection score of a face that may be enrolled."""
    enrol_face_pixels: float = Field(default=40, ge=0, le=10_000)
    """Shorter side of the smallest face that may be enrolled, pixels."""
    enrol_sharpness: float = Field(default=10, ge=0, le=1e6)
    """Smallest sharpness of a face that may be enrolled; below is blur."""
