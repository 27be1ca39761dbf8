"""Serve bulk enrolment, export and import of a gallery: many subjects at once, as streams of lines of JSON."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from pkd.serving.api import openapi
from pkd.serving.api.api_keys import may, require
from pkd.serving.api.problems import problem_body, problem_type
from pkd.serving.api.request_body import media_type
from pkd.serving.api.responses import NDJSON, Stream, line
from pkd.serving.api.routes.parameters import GalleryName
from pkd.serving.core.errors import ServingError, UnsupportedMedia
from pkd.serving.core.transfer_schemas import BulkAnswer, BulkItem, ExportedSubject
from pkd.serving.matching.bulk import LineResult, enrol_lines, read_items
from pkd.serving.matching.service import Service
from pkd.serving.matching.transfer import Import, export


def routes(service: Service) -> APIRouter:
    """Make the routes of bulk enrolment, export and import."""
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

        read = partial(read_items, service, may_accept=may(request, "admin"))
        results = enrol_lines(service, gallery, request.stream(), actor, read)
        return Stream(answer_lines(results))

    @router.get(
        "/v1/galleries/{gallery}/export",
        response_class=Stream,
        responses=openapi.stream(openapi.EXPORT_ANSWER, openapi.NAMED, openapi.READ),
    )
    async def export_gallery(request: Request, gallery: GalleryName) -> Response:
        """Export everyone in a gallery with their vectors: a header, a line per subject, and a last line `end`.

        Without the last line the export was cut off. It is biometric data: faces can be reconstructed from it.
        """
        require(request, "admin")
        lines = export(service, await service.stored(service.store.get, gallery))

        async def answers() -> AsyncGenerator[bytes, None]:
            try:
                async with aclosing(lines):
                    async for some in lines:
                        yield b"".join(map(line, some))
            except ServingError as error:  # too late for a status: no last line, and the reason in its place
                yield line({"problem": problem_body(error)})

        return Stream(answers())

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
            results = enrol_lines(service, gallery, request.stream(), actor, importing.read)
            async with aclosing(answer_lines(results)) as pieces:
                async for piece in pieces:
                    yield piece
            if error := importing.end():
                yield line({"line": None, "problem": problem_body(error)})

        return Stream(answers())

    async def answer_lines(results: AsyncGenerator[list[LineResult], None]) -> AsyncGenerator[bytes, None]:
        """Write results as lines of JSON, and count the refusals among them."""
        async with aclosing(results):
            async for some in results:
                for one in some:
                    if one.error:
                        service.state.metrics.refusal(problem_type(one.error).slug)
                yield b"".join(line(bulk_answer(one).model_dump(exclude_unset=True)) for one in some)

    return router


def bulk_answer(result: LineResult) -> BulkAnswer:
    """Describe what became of one line."""
    of = result.line
    if result.error:
        return BulkAnswer(line=of.number, subject=of.subject, key=of.key, problem=problem_body(result.error))
    return BulkAnswer(
        line=of.number,
        subject=of.subject,
        key=of.key,
        templates=[id for one in result.enrolled for id in one.templates],
        sequence=max((one.sequence for one in result.enrolled), default=None),
        replayed=all(one.replayed for one in result.enrolled),
        doubts=list(result.doubts),
    )


def _require_lines(request: Request) -> None:
    if media_type(request) not in (NDJSON, "application/jsonl"):
        raise UnsupportedMedia(f"Send one JSON object a line as {NDJSON}.")
