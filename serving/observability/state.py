"""State: whether this server may answer, and what it counts. Starting, ready, failed or draining."""

from __future__ import annotations

from dataclasses import dataclass, field

from pkd.serving.core.problems import Problem
from pkd.serving.observability.metrics import Metrics


@dataclass
class State:
    """Set by the self-test at start and by SIGTERM; read by every request."""

    proved: dict[str, float] | None = None
    """Encoder id → largest 1 − cosine over its golden crops; None until all are reproduced."""
    failure: str | None = None
    """Why the self-test failed."""
    draining: bool = False
    metrics: Metrics = field(default_factory=Metrics)

    def require_ready(self) -> None:
        """Raise a 503 Problem unless requests may be answered."""
        if self.draining:
            raise Problem("draining", "The server is shutting down. Send the request to another one.")
        if self.failure:
            raise Problem("not-ready", f"The self-test failed: {self.failure}")
        if self.proved is None:
            raise Problem("not-ready", "The golden crops of the bundles are still being checked.")
