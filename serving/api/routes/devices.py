"""Serve /v1/devices: what a class of devices is to run now."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from pkd.serving.api import openapi
from pkd.serving.api.routes.catalogue import known_etag
from pkd.serving.core.schemas import DeviceLatest, Name, SpaceAnswer
from pkd.serving.inference.device_classes import DeviceClass
from pkd.serving.matching.service import Service

DeviceClassName = Annotated[Name, Path(description="Device class, as the operator named it")]


def routes(service: Service) -> APIRouter:
    """Make the route that any key may read: it says nothing about a person."""
    router = APIRouter(tags=["catalogue"])

    @router.get(
        "/v1/devices/{device_class}/latest",
        response_model=DeviceLatest,
        responses={
            **openapi.responses(openapi.DEVICE_CLASS, openapi.READ),
            304: {"description": "It is what it was at If-None-Match"},
        },
    )
    async def get_latest(request: Request, device_class: DeviceClassName) -> Response:
        """Say which encoder a device of this class is to run now, and the files that it needs for that.

        Each file is downloaded by `/v1/encoders/{id}/artifact?file=NAME`. The `ETag` changes with any of it;
        `If-None-Match` answers 304 to a device that is up to date. After a roll-back it names the older encoder again.
        """
        found = await run_in_threadpool(describe, service.device_classes.find(device_class))
        body = found.model_dump_json().encode()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "Cache-Control": "private, no-cache"}
        if known_etag(request, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type="application/json")

    def describe(found: DeviceClass) -> DeviceLatest:
        offer, target = found.offer, found.target
        return DeviceLatest(
            device_class=found.name,
            encoder=offer.info.id,
            space=SpaceAnswer.model_validate(offer.info.space),
            numeric_mode=offer.info.numeric_mode,
            target=target.name if target else None,
            runtime=target.runtime if target else "onnxruntime",
            golden_tolerance=target.golden_tolerance if target else offer.bundle.manifest.golden_tolerance,
            certified_against=sorted(g for q, g in service.encoders.files if q == offer.info.id),
            bundle_encoder=offer.bundle.manifest.encoder.id,
            files=service.artifacts.describe(offer.bundle, found.files),
        )

    return router
