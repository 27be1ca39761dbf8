"""/healthz and /readyz: for load balancers and orchestrators, without a key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from pkd.serving.problems import documented
from pkd.serving.service import Service


def routes(service: Service) -> APIRouter:
    """Both routes."""
    router = APIRouter(tags=["operations"])

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @router.get("/readyz", responses=documented({"not-ready": {}, "draining": {}}))
    async def readyz() -> dict[str, Any]:
        """Every loaded bundle reproduces its golden embeddings; largest 1 − cosine per encoder."""
        service.state.require_ready()
        return {"status": "ready", "golden_error": service.state.proved}

    return router
