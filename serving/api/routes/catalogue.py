"""Serve /v1/encoders, /v1/detector, /v1/devices, /v1/spaces and /v1/certificates: what may be compared, and run."""

from __future__ import annotations

import hashlib
import re
from decimal import Decimal
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from pkd.serving.api import openapi
from pkd.serving.api.problems import RangeNotSatisfiable, problem_response
from pkd.serving.core.errors import InvalidRequest, UnknownFile
from pkd.serving.core.schemas import (
    CertificatesAnswer,
    Comparable,
    DeviceLatest,
    DriftAnswer,
    EncoderDetail,
    EncoderListed,
    EncodersAnswer,
    Name,
    SpaceAnswer,
    SpaceListed,
    SpacesAnswer,
    TargetAnswer,
)
from pkd.serving.inference.artifacts import BundledEncoder, needed
from pkd.serving.inference.device_classes import DeviceClass
from pkd.serving.matching.drift import describe
from pkd.serving.matching.service import Service
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.encoders.detector import YuNet

Spec = Annotated[str, Path(max_length=300, description="Id, short id, or a name that only one encoder has")]
RANGE = re.compile(r"([0-9]+)-([0-9]*)|-([0-9]+)")
MAX_RANGES = 100
"""Most ranges that one request is given."""


DeviceClassName = Annotated[Name, Path(description="Device class, as the operator named it")]


def routes(service: Service) -> APIRouter:
    """Make the routes that any key may read: they say nothing about a person."""
    router = APIRouter(tags=["catalogue"])
    encoders, artifacts = service.encoders, service.artifacts

    @router.get("/v1/encoders", responses=openapi.responses(openapi.READ))
    async def list_encoders() -> EncodersAnswer:
        """List the encoders that images can be sent to."""
        return EncodersAnswer(
            encoders=[listed(BundledEncoder(item, item.encoder.info)) for item in encoders.loaded.values()]
        )

    @router.get("/v1/encoders/{encoder}", responses=openapi.responses(openapi.ENCODER, openapi.READ))
    async def get_encoder(encoder: Spec) -> EncoderDetail:
        """Describe one encoder, loaded or as a target in a bundle: its certificates, and the files a device needs."""
        return await run_in_threadpool(detail, artifacts.find(encoder))

    @router.get(
        "/v1/encoders/{encoder}/artifact",
        response_class=FileResponse,
        responses=openapi.file(openapi.ENCODER, openapi.ARTIFACT, openapi.READ),
    )
    async def get_artifact(
        request: Request,
        encoder: Spec,
        target: Annotated[
            str | None, Query(max_length=100, description="Name of a target, for example `openvino-int8`")
        ] = None,
        file: Annotated[str | None, Query(max_length=400, description="A file of the bundle, or of the target")] = None,
        as_: Annotated[Literal["bundle"] | None, Query(alias="as", description="The whole bundle as a zip")] = None,
    ) -> Response:
        """Download what a device runs: `encoder.onnx`, a file of a target, or the whole bundle.

        The `ETag` is the file's SHA-256. `If-None-Match` answers 304 to a device that is up to date; `Range` and
        `If-Range` let a download that broke off go on.
        """
        offer = artifacts.find(encoder)
        stem = short(offer.info.id).replace("@", "-")
        if as_ == "bundle":
            if target is not None or file is not None:
                raise InvalidRequest("as=bundle is the whole bundle: leave out target and file.")
            chosen = await run_in_threadpool(artifacts.packed, offer.bundle)
            name, kind = f"{stem}.zip", "application/zip"
        else:
            chosen = await run_in_threadpool(artifacts.choose, offer, target, file)
            name, kind = f"{stem}-{chosen.name.replace('/', '-')}", "application/octet-stream"
        headers = {"ETag": f'"{chosen.sha256}"', "Cache-Control": "private, no-cache"}
        if known_etag(request, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        return _Download(chosen.path, headers=headers, media_type=kind, filename=name, stat_result=chosen.checked)

    @router.get(
        "/v1/detector",
        response_class=Response,
        responses=openapi.small_file({"not-found": {}}, openapi.READ),
    )
    async def get_detector(request: Request) -> Response:
        """Download the server's face detector for devices: a YuNet that takes pictures of any multiple of 32.

        The `ETag` is the file's SHA-256; `If-None-Match` answers 304 to a device that is up to date.
        """
        detector = service.pipeline.detector
        if not isinstance(detector, YuNet):
            raise UnknownFile("this server has no YuNet detector to give out. Start it with --detector yunet.onnx.")
        data = await run_in_threadpool(lambda: detector.device_file)
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Cache-Control": "private, no-cache"}
        if known_etag(request, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        headers["Content-Disposition"] = 'attachment; filename="detector.onnx"'
        return Response(data, headers=headers, media_type="application/octet-stream")

    @router.get("/v1/spaces", responses=openapi.responses(openapi.READ))
    async def list_spaces() -> SpacesAnswer:
        """List the embedding spaces of the loaded encoders."""
        found: dict[str, SpaceListed] = {}
        for id, item in encoders.loaded.items():
            space = item.encoder.info.space
            found.setdefault(space.id, SpaceListed(**space.model_dump(), encoders=[])).encoders.append(id)
        return SpacesAnswer(spaces=list(found.values()))

    @router.get("/v1/certificates", responses=openapi.responses(openapi.READ))
    async def list_certificates(
        query: Annotated[str | None, Query(max_length=300, description="Encoder of the query side")] = None,
        gallery: Annotated[str | None, Query(max_length=300, description="Encoder of the gallery side")] = None,
    ) -> CertificatesAnswer:
        """List the ordered encoder pairs that may be compared, with their thresholds and calibration."""
        wanted = [None if spec is None else encoders.resolve(spec) for spec in (query, gallery)]
        found = [
            one for one in encoders.certificates if wanted[0] in (None, one.query) and wanted[1] in (None, one.gallery)
        ]
        return CertificatesAnswer(certificates=found)

    @router.get("/v1/certificates/{id}/drift", responses=openapi.responses(openapi.CERTIFICATE, openapi.READ))
    async def get_drift(
        id: Annotated[str, Path(max_length=300, description="QUERY__GALLERY, each as name@ and ten digits of the id")],
    ) -> DriftAnswer:
        """Say whether a certificate still holds, by the impostors of searches and by refused verifications.

        No score is kept, and nothing about a person. `alarm` is false for ever with 95 % probability while the
        certificate holds, however often it is asked.
        """
        return describe(await run_in_threadpool(service.drift.find, id))

    def listed(offer: BundledEncoder) -> EncoderListed:
        default = offer.info.id == encoders.default.encoder.info.id
        return EncoderListed(**dict(offer.info), licence=offer.bundle.manifest.licence, default=default)

    def detail(offer: BundledEncoder) -> EncoderDetail:
        bundle, id = offer.bundle, offer.info.id
        return EncoderDetail(
            **dict(listed(offer)),
            loaded=id in encoders.loaded,
            certificates=Comparable(
                as_query_against=sorted(g for q, g in encoders.files if q == id),
                as_gallery_for=sorted(q for q, g in encoders.files if g == id),
            ),
            artifact=artifacts.describe(bundle, [offer.default_file])[0],
            targets=[
                TargetAnswer(
                    name=one.name,
                    runtime=one.runtime,
                    precision=one.precision,
                    golden_tolerance=one.golden_tolerance,
                    settings=one.settings,
                    files=artifacts.describe(bundle, needed(bundle, one)),
                )
                for one in offer.targets
            ],
        )

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
        found = await run_in_threadpool(describe_latest, service.device_classes.find(device_class))
        body = found.model_dump_json().encode()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "Cache-Control": "private, no-cache"}
        if known_etag(request, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type="application/json")

    def describe_latest(found: DeviceClass) -> DeviceLatest:
        offer, target = found.offer, found.target
        return DeviceLatest(
            device_class=found.name,
            encoder=offer.info.id,
            space=SpaceAnswer.model_validate(offer.info.space),
            numeric_mode=offer.info.numeric_mode,
            target=target.name if target else None,
            runtime=target.runtime if target else "onnxruntime",
            golden_tolerance=target.golden_tolerance if target else offer.bundle.manifest.golden_tolerance,
            certified_against=sorted(g for q, g in encoders.files if q == offer.info.id),
            bundle_encoder=offer.bundle.manifest.encoder.id,
            files=artifacts.describe(offer.bundle, found.files),
        )

    return router


def known_etag(request: Request, etag: str) -> bool:
    """Tell whether the client has this version already, by If-None-Match."""
    sent = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
    return etag in sent or "*" in sent


class _Download(FileResponse):
    """Send a file, or the parts of it that ``Range`` asks for.

    FileResponse alone would refuse as text, or fail at, what RFC 9110 has ignored or answered in part
    (tests/unit/serving/api/routes/test_catalogue.py).
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent, size = Headers(scope=scope), int(self.headers["content-length"])
        asked = sent.get("range")
        current = sent.get("if-range", self.headers["etag"]) in (self.headers["etag"], self.headers["last-modified"])
        found = parts(asked, size) if asked and current else None
        if asked and found == []:
            detail = f"Range {asked[:80]!r}: the file has {size:,} bytes. Send bytes=FROM-TO."
            refusal = problem_response(RangeNotSatisfiable(detail, details={"bytes": size}))
            refusal.headers["Content-Range"] = f"bytes */{size}"
            await refusal(scope, receive, send)
            return
        headers = [one for one in scope["headers"] if one[0] not in (b"range", b"if-range")]
        if found:
            headers.append((b"range", f"bytes={','.join(found)}".encode()))
        await super().__call__({**scope, "headers": headers}, receive, send)


def parts(asked: str, size: int) -> list[str] | None:
    """List the parts, each as FROM-TO, that a Range header asks of a file of ``size`` bytes.

    Perhaps none of them is there.

    None where it is to be ignored (RFC 9110, 14.2): in another unit, badly formed, or of too many parts.
    """
    unit, _, listed = asked.partition("=")
    specs = [one.strip() for one in listed.split(",") if one.strip()]
    if unit.strip().lower() != "bytes" or not 0 < len(specs) <= MAX_RANGES:
        return None
    found = []
    for spec in specs:
        match = RANGE.fullmatch(spec)
        if match is None:
            return None
        # Decimal: int refuses to read thousands of digits.
        first, last, suffix = (Decimal(digits) if digits else None for digits in match.groups())
        if suffix is not None:
            first = size - min(suffix, Decimal(size))
        if first is None or (last is not None and last < first):
            return None
        if first < size:
            found.append(f"{first}-{size - 1 if last is None else min(last, Decimal(size - 1))}")
    return found
