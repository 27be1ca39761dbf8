"""Serve /v1/galleries/{gallery}/identify: who is this, if anybody."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from pkd.serving.api import openapi
from pkd.serving.api.api_keys import require
from pkd.serving.api.request_body import JSON, media_type, read_files, with_query
from pkd.serving.api.responses import json_response
from pkd.serving.api.routes.parameters import GalleryName
from pkd.serving.core.errors import InvalidRequest
from pkd.serving.core.gallery_schemas import IdentifyAnswer, IdentifyBody, IdentifyImage, IdentifyOptions
from pkd.serving.core.schemas import EmbeddingSide
from pkd.serving.core.validation import parse
from pkd.serving.matching.service import Photograph, Service


def routes(service: Service) -> APIRouter:
    """Make the one route."""
    router = APIRouter(tags=["matching"])

    @router.post(
        "/v1/galleries/{gallery}/identify",
        responses=openapi.responses(IdentifyAnswer, openapi.IMAGE, openapi.SEARCH, openapi.NAMED, openapi.TAKEN),
        openapi_extra=openapi.images_body(IdentifyBody, IdentifyImage, openapi.IDENTIFY_EXAMPLE),
    )
    async def identify(request: Request, gallery: GalleryName) -> Response:
        """Search a gallery for the face of an image or for an embedding.

        Templates of every encoder are searched under the certificate of the query's encoder against theirs, and ranked
        by the false match rate at their score. Where `target_fpir` asks for rates that no certificate resolves, the
        threshold is extrapolated and the answer says `calibrated: false`.
        """
        require(request, "verify")
        query: EmbeddingSide | Photograph
        kind = media_type(request)
        if kind == JSON:
            body = parse(IdentifyBody, await request.body())
            query = body.query if isinstance(body.query, EmbeddingSide) else Photograph.of(body.query)
            fields = body.model_dump(exclude={"query"}, exclude_unset=True)
            return json_response(await service.identify(gallery, query, with_query(request, IdentifyOptions, fields)))
        images, fields = await read_files(request, kind)
        if len(images) != 1:
            raise InvalidRequest(f"{len(images)} images; one is searched for at a time.")
        options = with_query(request, IdentifyImage, fields)
        query = Photograph(images[0], options.encoder, options.aligned, options.faces)
        return json_response(await service.identify(gallery, query, options))

    return router
