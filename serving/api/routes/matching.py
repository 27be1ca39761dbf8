"""Serve /v1/embed and /v1/verify, also without the prefix."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from pkd.serving.api import openapi
from pkd.serving.api.api_keys import require
from pkd.serving.api.request_body import read_embed, require_json
from pkd.serving.api.responses import json_response
from pkd.serving.core.schemas import EmbedAnswer, EmbedBody, EmbedOptions, VerifyAnswer, VerifyBody
from pkd.serving.core.validation import parse
from pkd.serving.matching.service import Service


def routes(service: Service) -> APIRouter:
    """Make both routes, twice: the bare aliases are not in the OpenAPI document."""
    router = APIRouter(tags=["matching"])

    async def embed(request: Request) -> Response:
        """Embed the faces of one or many images."""
        require(request, "embed")
        return json_response(await service.embed(*await read_embed(request)))

    async def verify(request: Request) -> Response:
        """Decide whether `a` (query) and `b` (gallery) show the same person: images, embeddings or subjects."""
        require(request, "verify")
        require_json(request)
        return json_response(await service.verify(parse(VerifyBody, await request.body())))

    for prefix, shown in (("/v1", True), ("", False)):
        router.add_api_route(
            f"{prefix}/embed",
            embed,
            methods=["POST"],
            include_in_schema=shown,
            responses=openapi.responses(EmbedAnswer, openapi.IMAGE, openapi.TAKEN),
            openapi_extra=openapi.images_body(EmbedBody, EmbedOptions, openapi.EMBED_EXAMPLE),
        )
        router.add_api_route(
            f"{prefix}/verify",
            verify,
            methods=["POST"],
            include_in_schema=shown,
            responses=openapi.responses(VerifyAnswer, openapi.IMAGE, openapi.PAIR, openapi.SUBJECT, openapi.TAKEN),
            openapi_extra=openapi.json_body(VerifyBody, openapi.VERIFY_EXAMPLE),
        )
    return router
