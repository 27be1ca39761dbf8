"""App: the routes of serving/routes around one Service. Everything they refuse is a Problem."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pkd.serving import openapi
from pkd.serving.door import Door
from pkd.serving.images import invalid
from pkd.serving.problems import Problem, from_error, internal
from pkd.serving.routes import catalogue, galleries, health, identify, matching, migrations, subjects, transfer
from pkd.serving.security import ApiKeys
from pkd.serving.service import Service
from pkd.toolkit.errors import PkdError


def create_app(service: Service, keys: ApiKeys | None = None) -> Door:
    """The ASGI application around one Service. ``keys``: None leaves every route open."""
    straight = _Straight(create_api(service), matching.routes(service))
    return Door(straight, service.settings, service.state, keys)


def create_api(service: Service) -> FastAPI:
    """All routes and their OpenAPI document, without what stands before them."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        proving = service.start()
        yield
        service.state.draining = True
        await proving
        service.close()

    app = FastAPI(
        title="pkd",
        version=version("pkd"),
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.openapi = lambda: openapi.describe(app)  # type: ignore[method-assign]
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(PkdError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unforeseen)

    for one in (matching, identify, galleries, subjects, transfer, migrations, catalogue, health):
        app.include_router(one.routes(service))
    return app


class _Straight:
    """Calls ``routes``, which take the request and nothing else, without FastAPI around them; it has all the others.

    They are what most requests are for, and its dozen layers are dear where an inference has just swept the caches.
    """

    def __init__(self, api: ASGIApp, routes: APIRouter) -> None:
        self._api = api
        self._routes = {route.path: route for route in routes.routes if isinstance(route, APIRoute)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get(scope["path"]) if scope["type"] == "http" else None
        if route is None or scope["method"] != "POST":
            await self._api(scope, receive, send)
            return
        scope["route"] = route
        response = await route.endpoint(Request(scope, receive))
        await response(scope, receive, send)


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


async def _known(request: Request, error: Exception) -> Response:
    assert isinstance(error, PkdError)
    return from_error(error).response()


async def _invalid(request: Request, error: Exception) -> Response:
    """A path, a query string or a header that a route does not take."""
    assert isinstance(error, RequestValidationError)
    return invalid([{**one, "loc": one["loc"][1:]} for one in error.errors()]).response()


async def _http(request: Request, error: Exception) -> Response:
    """What the router itself refuses."""
    assert isinstance(error, HTTPException)
    kind = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "invalid-request")
    response = Problem(kind, f"{request.method} {request.url.path}: {error.detail}.").response()
    response.headers.update(error.headers or {})
    return response


async def _unforeseen(request: Request, error: Exception) -> Response:
    """What a client is told; the error itself goes on to Door, which logs it."""
    return internal().response()
