"""Serve /healthz, /readyz and /metrics, for those who run servers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from pkd.serving.api.problems import documented
from pkd.serving.matching.service import Service
from pkd.serving.observability import metrics


def routes(service: Service) -> APIRouter:
    """Make the three routes."""
    router = APIRouter(tags=["operations"])

    @router.get("/healthz", openapi_extra={"security": []})
    async def healthz() -> dict[str, str]:
        """Say that the process is alive."""
        return {"status": "ok"}

    @router.get("/readyz", responses=documented({"not-ready": {}, "draining": {}}), openapi_extra={"security": []})
    async def readyz() -> dict[str, Any]:
        """Say whether every loaded bundle reproduces its golden embeddings; largest 1 − cosine per encoder."""
        service.state.require_ready()
        return {"status": "ready", "golden_error": service.state.golden_errors}

    @router.get("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        """Give counts and durations in Prometheus' text format. Any key will do."""
        return Response(service.state.metrics.page(), media_type=metrics.CONTENT_TYPE)

    return router
