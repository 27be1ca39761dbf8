"""Serve /v1/galleries and /v1/galleries/{gallery}."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from pkd.serving.api import openapi
from pkd.serving.api.api_keys import require
from pkd.serving.api.request_body import require_json
from pkd.serving.api.responses import json_response
from pkd.serving.api.routes.parameters import GalleryName
from pkd.serving.core.errors import GalleryConflict
from pkd.serving.core.gallery_schemas import (
    GalleriesAnswer,
    GalleryAnswer,
    GalleryBody,
    MapOriginAnswer,
    ReceiptAnswer,
)
from pkd.serving.core.schemas import SpaceAnswer
from pkd.serving.core.validation import parse
from pkd.serving.galleries.description import utc
from pkd.serving.galleries.store import Gallery
from pkd.serving.matching.admission import find_space
from pkd.serving.matching.service import Service


def routes(service: Service) -> APIRouter:
    """Make the routes that create, list, read and delete galleries."""
    router = APIRouter(tags=["galleries"])

    @router.put(
        "/v1/galleries/{gallery}",
        response_model=GalleryAnswer,
        responses={
            **openapi.responses(openapi.CREATION, openapi.NAMED, openapi.TAKEN),
            201: {"model": GalleryAnswer, "description": "Created"},
        },
        openapi_extra=openapi.json_body(GalleryBody, openapi.GALLERY_EXAMPLE, required=False),
    )
    async def create_gallery(request: Request, gallery: GalleryName) -> Response:
        """Create a gallery and pin its space. The same again is no error; another space or retention is."""
        actor = require(request, "enrol")
        sent = await request.body()
        if sent:
            require_json(request)
        body = parse(GalleryBody, sent or b"{}")
        there = {one.name for one in await service.stored(service.store.list)}
        space = find_space(service.encoders, body.space)
        try:
            made = await service.written(service.store.create, gallery, space, body.retention_seconds, actor)
        except GalleryConflict as conflict:
            pinned = (await service.stored(service.store.get, gallery)).space.id
            conflict.details.update(expected={"space": pinned}, got={"space": space.id}, works={"spaces": [pinned]})
            raise
        if body.retention_seconds not in (None, made.retention):
            raise GalleryConflict(
                f"the gallery {gallery!r} has another retention. Leave it out, or delete the gallery first.",
                details={
                    "expected": {"retention_seconds": made.retention},
                    "got": {"retention_seconds": body.retention_seconds},
                    "works": {"retention_seconds": [made.retention]},
                },
            )
        return json_response(describe_gallery(made, service), 200 if gallery in there else 201)

    @router.get("/v1/galleries", responses=openapi.responses(openapi.NO_STORE, openapi.READ))
    async def list_galleries(request: Request) -> GalleriesAnswer:
        """List all galleries, by name."""
        require(request, "verify")
        found = await service.stored(service.store.list)
        return GalleriesAnswer(galleries=[describe_gallery(one, service) for one in found])

    @router.get("/v1/galleries/{gallery}", responses=openapi.responses(openapi.NAMED, openapi.READ))
    async def get_gallery(request: Request, gallery: GalleryName) -> GalleryAnswer:
        """Describe one gallery: its space, and how many templates each encoder made."""
        require(request, "verify", "enrol")
        return describe_gallery(await service.stored(service.store.get, gallery), service)

    @router.delete("/v1/galleries/{gallery}", responses=openapi.responses(openapi.NAMED, openapi.TAKEN))
    async def delete_gallery(request: Request, gallery: GalleryName) -> ReceiptAnswer:
        """Delete a gallery with everyone in it, and its key. The answer is the receipt."""
        actor = require(request, "admin")
        return await service.written(service.store.delete, gallery, actor)

    return router


def describe_gallery(gallery: Gallery, service: Service) -> GalleryAnswer:
    """Describe a gallery with what the operator demands of it."""
    return GalleryAnswer(
        name=gallery.name,
        space=SpaceAnswer.model_validate(gallery.space),
        moving_to=SpaceAnswer.model_validate(gallery.moving_to) if gallery.moving_to else None,
        created=utc(gallery.created),
        retention_seconds=gallery.retention,
        subjects=gallery.subjects,
        templates=dict(gallery.templates),
        policy=service.policies.of(gallery.name),
        maps={id: MapOriginAnswer.model_validate(one) for id, one in gallery.mapping.maps.items()},
        staged=list(gallery.mapping.staged),
    )
