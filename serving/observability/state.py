"""State: whether this server may answer, and what it counts. Starting, ready, failed or draining."""

from __future__ import annotations

from dataclasses import dataclass, field

from pkd.serving.core.errors import Draining, NotReady
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
        """Raise Draining or NotReady unless requests may be answered."""
        if self.draining:
            raise Draining("The server is shutting down. Send the request to another one.")
        if self.failure:
            raise NotReady(f"The self-test failed: {self.failure}")
        if self.proved is None:
            raise NotReady("The golden crops of the bundles are still being checked.")
