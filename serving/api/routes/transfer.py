"""Many subjects at once: bulk enrolment, export and import of a gallery. All of them stream NDJSON."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from pkd.serving.api import openapi
from pkd.serving.api.api_keys import require
from pkd.serving.api.routes.parameters import GalleryName
from pkd.serving.core.gallery_schemas import BulkItem, ExportedSubject
from pkd.serving.core.problems import Problem
from pkd.serving.core.responses import NDJSON, Stream
from pkd.serving.inference.request_images import media_type
from pkd.serving.matching.bulk import enrol_lines, read_items
from pkd.serving.matching.service import Service
from pkd.serving.matching.transfer import Import, export


def routes(service: Service) -> APIRouter:
    """Bulk enrolment, export, import."""
    router = APIRouter(tags=["transfer"])

    @router.post(
        "/v1/galleries/{gallery}/templates:bulk",
        response_class=Stream,
        responses=openapi.stream(openapi.BULK_ANSWER, openapi.NAMED, openapi.TAKEN, openapi.LINES),
        openapi_extra=openapi.lines_body(BulkItem, openapi.BULK_EXAMPLE),
    )
    async def enrol_bulk(request: Request, gallery: GalleryName) -> Response:
        """Enrol many subjects: a line per item in, a line per item out, in the same order.

        An item's line is sent once the item is durable; a refused item has a `problem` and does not stop the others.
        Items with a `key` can be sent again without harm. Read the answer while you send, or send at most 1,000 items
        at a time.
        """
        actor = require(request, "enrol")
        _require_lines(request)
        await service.stored(service.store.get, gallery)

        read = partial(read_items, service)
        return Stream(enrol_lines(service, gallery, request.stream(), actor, read))

    @router.get(
        "/v1/galleries/{gallery}/export",
        response_class=Stream,
        responses=openapi.stream(openapi.EXPORT_ANSWER, openapi.NAMED, openapi.READ),
    )
    async def export_gallery(request: Request, gallery: GalleryName) -> Response:
        """Everyone in a gallery with their vectors: a header, a line per subject, and a last line `end`.

        Without the last line the export was cut off. It is biometric data: faces can be reconstructed from it.
        """
        require(request, "admin")
        return Stream(export(service, await service.stored(service.store.get, gallery)))

    @router.post(
        "/v1/galleries/{gallery}/import",
        response_class=Stream,
        responses=openapi.stream(openapi.BULK_ANSWER, openapi.NAMED, openapi.TAKEN, openapi.LINES),
        openapi_extra=openapi.lines_body(ExportedSubject, openapi.IMPORT_EXAMPLE),
    )
    async def import_gallery(request: Request, gallery: GalleryName) -> Response:
        """Enrol everyone of an export into a gallery of the same space. Sent again, nobody is enrolled twice."""
        actor = require(request, "admin")
        _require_lines(request)
        await service.stored(service.store.get, gallery)

        async def answers() -> AsyncGenerator[bytes, None]:
            importing = Import(service)
            async for piece in enrol_lines(service, gallery, request.stream(), actor, importing.read):
                yield piece
            yield importing.end()

        return Stream(answers())

    return router


def _require_lines(request: Request) -> None:
    if media_type(request) not in (NDJSON, "application/jsonl"):
        raise Problem("unsupported-media", f"Send one JSON object a line as {NDJSON}.")
