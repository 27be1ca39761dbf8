"""Serve /v1/galleries/{gallery}/subjects and …/review: people are enrolled, listed, deleted, and put right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from pkd.serving.api import openapi
from pkd.serving.api.api_keys import require
from pkd.serving.api.request_body import JSON, media_type, read_files, require_json, with_query
from pkd.serving.api.responses import json_response
from pkd.serving.api.routes.parameters import After, GalleryName, IdempotencyKey, Limit, SubjectId
from pkd.serving.core.errors import TooLarge
from pkd.serving.core.gallery_schemas import (
    EnrolAnswer,
    EnrolBody,
    EnrolOptions,
    MoveAnswer,
    MoveBody,
    ReceiptAnswer,
    Review,
    ReviewAnswer,
    SubjectAnswer,
    SubjectsAnswer,
)
from pkd.serving.core.schemas import MANY_VALUES
from pkd.serving.core.validation import parse
from pkd.serving.galleries.description import of_subject
from pkd.serving.galleries.review import review
from pkd.serving.galleries.store import Subject
from pkd.serving.matching.enrolment import EnrolInput, enrol
from pkd.serving.matching.service import Service

MOST_REVIEWED = 20_000
"""Templates of a gallery that is reviewed within a request; more take longer than a client waits."""


def routes(service: Service) -> APIRouter:
    """Make the routes that enrol, list, read, move and delete subjects, and look for who is enrolled wrongly."""
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
        return await service.written(service.store.delete_subject, gallery, subject, actor)

    @router.get(
        "/v1/galleries/{gallery}/review",
        responses=openapi.responses(openapi.NAMED, openapi.READ, openapi.REVIEW),
    )
    async def review_gallery(
        request: Request,
        gallery: GalleryName,
        expected_false: Annotated[
            float, Query(gt=0, le=1e6, description="Pairs of different people that the list may hold by chance")
        ] = 1.0,
        own_fmr: Annotated[
            float, Query(gt=0, lt=1, description="False match rate of the threshold for a subject's own templates")
        ] = 1e-3,
        limit: Annotated[int, Query(ge=1, le=1000, description="Most pairs, and most outliers")] = 100,
    ) -> ReviewAnswer:
        """List subjects who may be one person, and templates that match none of their subject's others.

        Everybody is compared with everybody, which takes about a second for 5,000 templates. A gallery of more than
        20,000 is reviewed by `pkd-gallery review`.
        """
        require(request, "admin")
        found = await service.stored(look, gallery, expected_false, own_fmr)
        shown = {"pairs": found.pairs[:limit], "outliers": found.outliers[:limit]}
        return ReviewAnswer.model_validate({**dict(found), **shown, "gallery": gallery})

    @router.post(
        "/v1/galleries/{gallery}/subjects/{subject}/move",
        responses=openapi.responses(openapi.MOVED, openapi.SUBJECT, openapi.TAKEN),
        openapi_extra=openapi.json_body(MoveBody, openapi.MOVE_EXAMPLE),
    )
    async def move_templates(request: Request, gallery: GalleryName, subject: SubjectId) -> MoveAnswer:
        """Move templates to another subject: all of them to merge the two, some to take one apart.

        Attributes and consent stay with whom they were given for, dates with the templates.
        """
        actor = require(request, "admin")
        require_json(request)
        body = parse(MoveBody, await request.body())
        return await service.written(
            service.store.move, gallery, subject, body.into, actor, templates=body.templates, new=body.new
        )

    def look(gallery: str, expected_false: float, own_fmr: float) -> Review:
        count = sum(service.store.get(gallery).templates.values())
        if count > MOST_REVIEWED:
            raise TooLarge(
                f"gallery {gallery} has {count:,} templates, over {MOST_REVIEWED:,}. Run pkd-gallery review.",
                details={"limit": MOST_REVIEWED},
            )
        subjects: Iterator[Subject] = service.store.export(gallery)
        certificates = {pair: file.certificate for pair, file in service.encoders.files.items()}
        return review(subjects, certificates, expected_false=expected_false, own_fmr=own_fmr)

    async def _read(request: Request) -> tuple[list[EnrolInput], EnrolOptions]:
        kind = media_type(request)
        if kind == JSON:
            body = parse(EnrolBody, await request.body(), MANY_VALUES)
            fields = body.model_dump(exclude={"inputs"}, exclude_unset=True)
            return list(body.inputs), with_query(request, EnrolOptions, fields)
        images, fields = await read_files(request, kind)
        return list(images), with_query(request, EnrolOptions, fields)

    return router
