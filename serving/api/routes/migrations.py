"""Serve /v1/galleries/{gallery}/migrations: move a gallery to another space, subject by subject, while it answers.

No image is kept, so clients enrol everyone once more, with an encoder of the second space.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from pkd.serving.api import openapi
from pkd.serving.api.api_keys import require
from pkd.serving.api.request_body import require_json
from pkd.serving.api.routes.parameters import After, GalleryName, Limit
from pkd.serving.core.errors import GalleryConflict
from pkd.serving.core.gallery_schemas import MigrationAnswer, MigrationBody, MovedAnswer
from pkd.serving.core.schemas import SpaceAnswer
from pkd.serving.core.validation import parse
from pkd.serving.galleries.store import Gallery
from pkd.serving.matching.admission import find_space, spaces_of
from pkd.serving.matching.service import Service


def routes(service: Service) -> APIRouter:
    """Make the routes that begin, watch, finish and abandon a migration."""
    router = APIRouter(tags=["migrations"])

    @router.post(
        "/v1/galleries/{gallery}/migrations",
        responses=openapi.responses(openapi.MIGRATION, openapi.NAMED, openapi.TAKEN),
        openapi_extra=openapi.json_body(MigrationBody, openapi.MIGRATION_EXAMPLE),
    )
    async def begin_migration(request: Request, gallery: GalleryName) -> MigrationAnswer:
        """Take templates of a second space, too. The same again is no error: a migration is resumable."""
        actor = require(request, "admin")
        require_json(request)
        wanted = find_space(service.encoders, parse(MigrationBody, await request.body()).space)
        try:
            begun = await service.written(service.store.begin_migration, gallery, wanted, actor)
        except GalleryConflict as conflict:
            raise await explained(conflict, gallery, {"space": wanted.id}) from None
        return await describe(begun, "", 100)

    @router.get("/v1/galleries/{gallery}/migrations", responses=openapi.responses(openapi.NAMED, openapi.READ))
    async def get_migration(
        request: Request, gallery: GalleryName, after: After = "", limit: Limit = 100
    ) -> MigrationAnswer:
        """Count the subjects that are moved, and list a page of those that are not."""
        require(request, "admin")
        return await describe(await service.stored(service.store.get, gallery), after, limit)

    @router.post(
        "/v1/galleries/{gallery}/migrations/finish",
        responses=openapi.responses(openapi.MIGRATION, openapi.NAMED, openapi.TAKEN),
    )
    async def finish_migration(request: Request, gallery: GalleryName) -> MovedAnswer:
        """Keep the second space alone. Refused while somebody would be left without a template."""
        return await end(gallery, require(request, "admin"), abandon=False)

    @router.post(
        "/v1/galleries/{gallery}/migrations/abandon",
        responses=openapi.responses(openapi.MIGRATION, openapi.NAMED, openapi.TAKEN),
    )
    async def abandon_migration(request: Request, gallery: GalleryName) -> MovedAnswer:
        """Keep the first space alone. Refused while somebody is enrolled in the second one only."""
        return await end(gallery, require(request, "admin"), abandon=True)

    async def describe(one: Gallery, after: str, limit: int) -> MigrationAnswer:
        moving = one.moving_to is not None
        found = await service.stored(service.store.unmoved, one.name, after=after, limit=limit + 1) if moving else []
        return MigrationAnswer(
            gallery=one.name,
            space=SpaceAnswer.model_validate(one.space),
            moving_to=SpaceAnswer.model_validate(one.moving_to) if one.moving_to else None,
            moved=one.moved,
            total=one.subjects,
            unmoved=list(found[:limit]),
            next=found[limit - 1] if len(found) > limit else None,
        )

    async def end(gallery: str, actor: str, *, abandon: bool) -> MovedAnswer:
        try:
            moved = await service.written(service.store.end_migration, gallery, actor, abandon=abandon)
        except GalleryConflict as conflict:
            raise await explained(conflict, gallery, {}, back=abandon) from None
        left = await service.stored(service.store.get, gallery)
        return MovedAnswer(
            gallery=gallery,
            space=SpaceAnswer.model_validate(left.space),
            templates=moved.templates,
            receipt=moved.receipt,
        )

    async def explained(
        conflict: GalleryConflict, gallery: str, asked: dict[str, Any], *, back: bool = False
    ) -> GalleryConflict:
        """Add the state that the gallery is in and what could be done in it."""
        now = await service.stored(service.store.get, gallery)
        state = await describe(now, "", 100)
        others = [id for id in spaces_of(service.encoders) if id != now.space.id]
        moving = now.moving_to is not None
        behind = state.unmoved
        if moving and back:  # an abandoned migration leaves those with nothing who are in the second space alone
            behind = list(await service.stored(service.store.unmoved, gallery, limit=100, back=True))
        return conflict.explain(
            expected={"moving_to": now.moving_to.id} if now.moving_to else {"spaces": others},
            got={**asked, **state.model_dump(include={"moving_to", "unmoved"})},
            works={"enrol_or_delete": behind} if moving else {"spaces": others},
        )

    return router
