"""Hold whether this server may answer: starting, ready, failed or draining."""

from __future__ import annotations

from dataclasses import dataclass, field

from pkd.serving.core.errors import Draining, NotReady
from pkd.serving.observability.metrics import Metrics


@dataclass
class State:
    """Hold what the self-test at start and SIGTERM set, and every request reads."""

    golden_errors: dict[str, float] | None = None
    """Encoder id → largest 1 − cosine over its golden crops; None until all are reproduced."""
    failure: str | None = None
    """Reason why the self-test failed."""
    draining: bool = False
    metrics: Metrics = field(default_factory=Metrics)

    def require_ready(self) -> None:
        """Raise Draining or NotReady unless requests may be answered."""
        if self.draining:
            raise Draining("The server is shutting down. Send the request to another one.")
        if self.failure:
            raise NotReady(f"The self-test failed: {self.failure}")
        if self.golden_errors is None:
            raise NotReady("The golden crops of the bundles are still being checked.")
