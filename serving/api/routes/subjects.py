"""Serve /v1/galleries/{gallery}/subjects: enrol, list, read and delete who is in a gallery."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from pkd.serving.api import openapi
from pkd.serving.api.api_keys import require
from pkd.serving.api.request_body import JSON, media_type, read_files, with_query
from pkd.serving.api.responses import json_response
from pkd.serving.api.routes.parameters import After, GalleryName, IdempotencyKey, Limit, SubjectId
from pkd.serving.core.gallery_schemas import (
    EnrolAnswer,
    EnrolBody,
    EnrolOptions,
    ReceiptAnswer,
    SubjectAnswer,
    SubjectsAnswer,
)
from pkd.serving.core.schemas import MANY_VALUES
from pkd.serving.core.validation import parse
from pkd.serving.galleries.description import of_subject
from pkd.serving.matching.enrolment import EnrolInput, enrol
from pkd.serving.matching.service import Service


def routes(service: Service) -> APIRouter:
    """Make the routes that enrol, list, read and delete subjects."""
    router = APIRouter(tags=["galleries"])

    @router.post(
        "/v1/galleries/{gallery}/subjects/{subject}/templates",
        response_model=EnrolAnswer,
        responses={
            **openapi.responses(openapi.IMAGE, openapi.ENROLMENT, openapi.NAMED, openapi.TAKEN, description="Replayed"),
            201: {"model": EnrolAnswer, "description": "Enrolled, and durable"},
        },
        openapi_extra=openapi.images_body(EnrolBody, EnrolOptions, openapi.ENROL_EXAMPLE),
    )
    async def enrol_templates(
        request: Request, gallery: GalleryName, subject: SubjectId, idempotency_key: IdempotencyKey = None
    ) -> Response:
        """Enrol a subject by images, embeddings made elsewhere, or both: all of them or none. No image is kept."""
        actor = require(request, "enrol")
        inputs, options = await _read(request)
        if options.accept_doubts:
            require(request, "admin")
        made = await enrol(service, gallery, subject, inputs, options, idempotency_key, actor)
        return json_response(made, 200 if made.replayed else 201)

    @router.get("/v1/galleries/{gallery}/subjects", responses=openapi.responses(openapi.NAMED, openapi.READ))
    async def list_subjects(
        request: Request, gallery: GalleryName, after: After = "", limit: Limit = 100
    ) -> SubjectsAnswer:
        """List a page of the subjects' ids, in ascending order."""
        require(request, "admin")
        found = await service.stored(service.store.subjects, gallery, after=after, limit=limit + 1)
        return SubjectsAnswer(subjects=list(found[:limit]), next=found[limit - 1] if len(found) > limit else None)

    @router.get(
        "/v1/galleries/{gallery}/subjects/{subject}",
        responses=openapi.responses(openapi.SUBJECT, openapi.READ),
    )
    async def get_subject(request: Request, gallery: GalleryName, subject: SubjectId) -> SubjectAnswer:
        """Describe what is kept of a subject; vectors are given out by the export alone."""
        require(request, "admin")
        found = await service.stored(service.store.subject, gallery, subject)
        return SubjectAnswer.model_validate({"gallery": gallery, **of_subject(found)})

    @router.delete(
        "/v1/galleries/{gallery}/subjects/{subject}",
        responses=openapi.responses(openapi.SUBJECT, openapi.TAKEN),
    )
    async def delete_subject(request: Request, gallery: GalleryName, subject: SubjectId) -> ReceiptAnswer:
        """Delete a subject's templates and key. The answer is the receipt."""
        actor = require(request, "delete")
        done = await service.written(service.store.delete_subject, gallery, subject, actor)
        return ReceiptAnswer.model_validate(done)

    async def _read(request: Request) -> tuple[list[EnrolInput], EnrolOptions]:
        kind = media_type(request)
        if kind == JSON:
            body = parse(EnrolBody, await request.body(), MANY_VALUES)
            fields = body.model_dump(exclude={"inputs"}, exclude_unset=True)
            return list(body.inputs), with_query(request, EnrolOptions, fields)
        images, fields = await read_files(request, kind)
        return list(images), with_query(request, EnrolOptions, fields)

    return router
