"""App: the routes. Everything they do is in Service; everything they refuse is a Problem."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import orjson
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pkd.serving import openapi
from pkd.serving.door import Door
from pkd.serving.images import media_type, parse, read_embed
from pkd.serving.problems import Problem, documented, from_error
from pkd.serving.schemas import EmbedAnswer, VerifyAnswer, VerifyBody
from pkd.serving.security import ApiKeys, require
from pkd.serving.service import Service
from pkd.toolkit.certificate import Certificate
from pkd.toolkit.errors import PkdError


def create_app(service: Service, keys: ApiKeys | None = None) -> FastAPI:
    """The ASGI application around one Service. ``keys``: None leaves every route open."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        proving = service.start()
        yield
        service.state.draining = True
        await proving
        service.close()

    app = FastAPI(title="pkd", version=version("pkd"), lifespan=lifespan, redoc_url=None)
    app.openapi = lambda: openapi.describe(app)  # type: ignore[method-assign]
    app.add_middleware(Door, settings=service.settings, state=service.state, keys=keys)
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(PkdError, _known)
    app.add_exception_handler(HTTPException, _http)

    async def embed(request: Request) -> Response:
        """Embed the faces of one or many images."""
        require(request, "embed")
        return answer(await service.embed(await read_embed(request)))

    async def verify(request: Request) -> Response:
        """Decide whether `a` (query) and `b` (gallery) show the same person."""
        require(request, "verify")
        if media_type(request) != "application/json":
            raise Problem("unsupported-media", "Send application/json with the sides `a` and `b`.")
        return answer(await service.verify(parse(VerifyBody, await request.body())))

    for prefix, shown in (("/v1", True), ("", False)):
        app.add_api_route(
            f"{prefix}/embed",
            embed,
            methods=["POST"],
            include_in_schema=shown,
            responses={200: {"model": EmbedAnswer}, **openapi.EMBED_RESPONSES},
            openapi_extra=openapi.EMBED_EXTRA,
        )
        app.add_api_route(
            f"{prefix}/verify",
            verify,
            methods=["POST"],
            include_in_schema=shown,
            responses={200: {"model": VerifyAnswer}, **openapi.VERIFY_RESPONSES},
            openapi_extra=openapi.VERIFY_EXTRA,
        )
    _add_catalogue(app, service)
    _add_health(app, service)
    return app


def _add_catalogue(app: FastAPI, service: Service) -> None:
    refused = documented({"auth": {}})

    @app.get("/v1/encoders", responses=refused)
    async def encoders() -> dict[str, Any]:
        """The encoders that images can be sent to."""
        listed = [
            {
                **item.encoder.info.model_dump(),
                "licence": item.bundle.manifest.licence,
                "default": item is service.encoders.default,
            }
            for item in service.encoders.loaded.values()
        ]
        return {"encoders": listed}

    @app.get("/v1/spaces", responses=refused)
    async def spaces() -> dict[str, Any]:
        """The embedding spaces of the loaded encoders."""
        found: dict[str, dict[str, Any]] = {}
        for id, item in service.encoders.loaded.items():
            space = item.encoder.info.space
            found.setdefault(space.id, {**space.model_dump(), "encoders": []})["encoders"].append(id)
        return {"spaces": list(found.values())}

    @app.get("/v1/certificates", responses=refused)
    async def certificates() -> dict[str, list[Certificate]]:
        """The ordered encoder pairs that may be compared, with their thresholds and calibration."""
        return {"certificates": service.encoders.certificates}


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/readyz", responses=documented({"not-ready": {}, "draining": {}}))
    async def readyz() -> dict[str, Any]:
        """Every loaded bundle reproduces its golden embeddings; largest 1 − cosine per encoder."""
        service.state.require_ready()
        return {"status": "ready", "golden_error": service.state.proved}


def answer(content: dict[str, Any]) -> Response:
    """JSON straight from numpy arrays: five times faster than through lists of Python floats."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


async def _known(request: Request, error: Exception) -> Response:
    assert isinstance(error, PkdError)
    return from_error(error).response()


async def _http(request: Request, error: Exception) -> Response:
    """What the router itself refuses."""
    assert isinstance(error, HTTPException)
    kind = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "invalid-request")
    response = Problem(kind, f"{request.method} {request.url.path}: {error.detail}.").response()
    response.headers.update(error.headers or {})
    return response
