"""Serve …/review and …/move: people under two names or two under one are found, and put right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Query, Request

from pkd.serving.api import openapi
from pkd.serving.api.api_keys import require
from pkd.serving.api.request_body import require_json
from pkd.serving.api.routes.parameters import GalleryName, SubjectId
from pkd.serving.core.errors import TooLarge
from pkd.serving.core.gallery_schemas import MoveBody
from pkd.serving.core.review_schemas import MoveAnswer, Review, ReviewAnswer
from pkd.serving.core.validation import parse
from pkd.serving.galleries.review import review
from pkd.serving.galleries.store import Subject
from pkd.serving.matching.service import Service

MOST_REVIEWED = 20_000
"""Templates of a gallery that is reviewed within a request; more take longer than a client waits."""


def routes(service: Service) -> APIRouter:
    """Make the routes that look for people who are enrolled wrongly, and put them right."""
    router = APIRouter(tags=["galleries"])

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
        done = await service.written(
            service.store.move, gallery, subject, body.into, actor, templates=body.templates, new=body.new
        )
        return MoveAnswer.model_validate(done)

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

    return router
