"""Serve /v1/embed and /v1/verify, also without the prefix, and /v1/galleries/{gallery}/identify."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from pkd.serving.api import openapi
from pkd.serving.api.api_keys import require, token_of
from pkd.serving.api.request_body import (
    FORM,
    JSON,
    media_type,
    read_embed,
    read_files,
    read_pair,
    require_json,
    with_query,
)
from pkd.serving.api.responses import embeddings_response, json_response
from pkd.serving.api.routes.parameters import GalleryName
from pkd.serving.api.tokens import require_embedding, require_gallery
from pkd.serving.core.errors import InvalidRequest
from pkd.serving.core.gallery_schemas import IdentifyAnswer, IdentifyBody, IdentifyImage, IdentifyOptions
from pkd.serving.core.schemas import (
    EmbedAnswer,
    EmbedBody,
    EmbeddingSide,
    EmbedOptions,
    SubjectSide,
    VerifyAnswer,
    VerifyBody,
    VerifyFiles,
)
from pkd.serving.core.validation import parse, validated
from pkd.serving.matching.service import Photograph, Service


def routes(service: Service) -> APIRouter:
    """Make both routes, twice: the bare aliases are not in the OpenAPI document."""
    router = APIRouter(tags=["matching"])

    async def embed(request: Request) -> Response:
        """Embed the faces of one or many images."""
        require(request, "embed")
        return embeddings_response(await service.embed(*await read_embed(request)))

    async def verify(request: Request) -> Response:
        """Decide whether `a` (query) and `b` (gallery) show the same person: images, embeddings or subjects."""
        require(request, "verify")
        if media_type(request) == FORM:
            files, fields = await read_pair(request)
            body = validated(VerifyFiles, fields).body(files)
        else:
            require_json(request)
            body = parse(VerifyBody, await request.body())
        if token := token_of(request):
            require_embedding(token, body.a)
            if isinstance(body.b, SubjectSide):
                require_gallery(token, body.b.gallery)
            else:
                require_embedding(token, body.b)
        return json_response(await service.verify(body))

    for prefix, shown in (("/v1", True), ("", False)):
        router.add_api_route(
            f"{prefix}/embed",
            embed,
            methods=["POST"],
            include_in_schema=shown,
            response_model=EmbedAnswer,
            responses=openapi.responses(openapi.IMAGE, openapi.TAKEN),
            openapi_extra=openapi.images_body(EmbedBody, EmbedOptions, openapi.EMBED_EXAMPLE),
        )
        router.add_api_route(
            f"{prefix}/verify",
            verify,
            methods=["POST"],
            include_in_schema=shown,
            response_model=VerifyAnswer,
            responses=openapi.responses(openapi.IMAGE, openapi.PAIR, openapi.SUBJECT, openapi.TAKEN),
            openapi_extra=openapi.pair_body(VerifyBody, VerifyFiles, openapi.VERIFY_EXAMPLE),
        )
    return router


def search_routes(service: Service) -> APIRouter:
    """Make the route that searches a gallery."""
    router = APIRouter(tags=["matching"])

    @router.post(
        "/v1/galleries/{gallery}/identify",
        responses=openapi.responses(openapi.IMAGE, openapi.SEARCH, openapi.NAMED, openapi.TAKEN),
        openapi_extra=openapi.images_body(IdentifyBody, IdentifyImage, openapi.IDENTIFY_EXAMPLE),
    )
    async def identify(request: Request, gallery: GalleryName) -> IdentifyAnswer:
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
            require_embedding(token_of(request), body.query)
            query = body.query if isinstance(body.query, EmbeddingSide) else Photograph.of(body.query)
            fields = body.model_dump(exclude={"query"}, exclude_unset=True)
            return await service.identify(gallery, query, with_query(request, IdentifyOptions, fields))
        require_embedding(token_of(request), None)
        images, fields = await read_files(request, kind)
        if len(images) != 1:
            raise InvalidRequest(f"{len(images)} images; one is searched for at a time.")
        options = with_query(request, IdentifyImage, fields)
        query = Photograph(images[0], options.encoder, options.aligned, options.faces)
        return await service.identify(gallery, query, options)

    return router
