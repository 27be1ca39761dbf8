"""Put the routes, their error answers and the middleware around one Service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pkd import __version__
from pkd.serving.api import openapi, pages
from pkd.serving.api.api_keys import ApiKeys
from pkd.serving.api.middleware import Middleware
from pkd.serving.api.problems import TYPES, MethodNotAllowed, RouteNotFound, problem_response
from pkd.serving.api.routes import (
    audit,
    catalogue,
    galleries,
    health,
    matching,
    migrations,
    subjects,
    tokens,
    transfer,
)
from pkd.serving.api.routes.parameters import known_query, queries_of
from pkd.serving.core.errors import InvalidRequest
from pkd.serving.core.validation import invalid
from pkd.serving.matching.service import Service
from pkd.toolkit.core.errors import PkdError

DOCS = Path(__file__).with_name("docs.html")
METHODS = ("DELETE", "GET", "OPTIONS", "PATCH", "POST", "PUT")


def create_app(service: Service, keys: ApiKeys | None = None, *, local: bool = True, page: bool = True) -> Middleware:
    """Make the ASGI application around one Service. ``keys``: None leaves every route open.

    ``local``: the server can be reached from this machine alone. ``page``: browsers find the page at /.
    """
    service.state.metrics.expect_refusals(TYPES)
    api = create_api(service, keys, page=page)
    direct = _DirectRoutes(api, matching.routes(service))
    return Middleware(direct, service.settings, service.state, keys, local=local, routes=api.state.known_routes)


def create_api(service: Service, keys: ApiKeys | None = None, *, page: bool = True) -> FastAPI:
    """Make all routes and their OpenAPI document, without the middleware."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        self_test = service.start()
        yield
        service.state.draining = True
        with suppress(asyncio.CancelledError):  # a server that is told to stop does not wait for it
            await self_test
        service.close()

    app = FastAPI(
        title="pkd",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.openapi = lambda: openapi.describe(app)  # type: ignore[method-assign]
    app.add_exception_handler(PkdError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unforeseen)

    makers = [matching.routes, matching.search_routes]
    makers += [one.routes for one in (galleries, subjects, audit, transfer, migrations, catalogue)]
    routers = [*(make(service) for make in makers), tokens.routes(service, keys)]
    for router in routers:
        app.include_router(router, dependencies=[Depends(known_query)])
    operations = health.routes(service)
    opened = [operations, *([pages.routes()] if page else [])]
    for router in opened:
        app.include_router(router)  # what asks there may add parameters of its own
    app.add_route("/docs", _docs, include_in_schema=False)
    app.state.known_routes = [route for router in (*routers, *opened) for route in router.routes]
    return app


class _DirectRoutes:
    """Call the matching routes, which take the request and nothing else, without FastAPI, which has all the others.

    Most requests are for these, and FastAPI's dozen layers are dear where an inference has just swept the caches: they
    are a tenth of the server's own part of a request (benchmarks, docs/performance.md).
    """

    def __init__(self, api: ASGIApp, routes: APIRouter) -> None:
        self._api = api
        self._routes = {route.path: route for route in routes.routes if isinstance(route, APIRoute)}
        self._without_query = {path for path, route in self._routes.items() if not queries_of(route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope.get("method")
        route = self._routes.get(scope["path"]) if method == "POST" else None
        if route is None:
            await (
                answer_head(self._api, scope, receive, send) if method == "HEAD" else self._api(scope, receive, send)
            )
            return
        scope["route"] = route
        if scope["query_string"] and scope["path"] in self._without_query:
            await known_query(Request(scope))
        response = await route.endpoint(Request(scope, receive))
        await response(scope, receive, send)


class _HeadSent(Exception):
    """End a HEAD: its status and headers are sent."""


async def answer_head(api: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer as GET would up to the first piece of the body, which the server drops; no other one is made."""
    # Of a part of a file nothing is said: RFC 9110 has Range for GET alone.
    headers = [one for one in scope["headers"] if one[0] != b"range"]
    asked = {**scope, "method": "GET", "headers": headers}

    async def send_once(message: Message) -> None:
        if not message.get("more_body", False):
            await send(message)
            return
        await send({**message, "more_body": False})
        raise _HeadSent

    try:
        await api(asked, receive, send_once)
    except _HeadSent:
        pass
    finally:
        scope["route"] = asked.get("route")


async def _docs(request: Request) -> Response:
    """Show the API to people, without anything from elsewhere: servers and browsers may be offline."""
    return FileResponse(DOCS, media_type="text/html")


async def _refused(request: Request, error: Exception) -> Response:
    return problem_response(error)


async def _invalid(request: Request, error: Exception) -> Response:
    """Answer a path, a query string or a header that a route does not take."""
    assert isinstance(error, RequestValidationError)
    return problem_response(invalid([{**one, "loc": one["loc"][1:]} for one in error.errors()]))


async def _http(request: Request, error: Exception) -> Response:
    """Answer what the router itself refuses."""
    assert isinstance(error, HTTPException)
    kind = {404: RouteNotFound, 405: MethodNotAllowed}.get(error.status_code, InvalidRequest)
    detail, headers = f"{request.method} {request.url.path}: {error.detail}.", dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_methods_of(request))
        detail += f" Send {headers['Allow']}."
    response = problem_response(kind(detail))
    response.headers.update(headers)
    return response


def _methods_of(request: Request) -> list[str]:
    """List all methods that the routes of a path take together; the router knows those of the first alone."""
    path = {"type": "http", "path": request.scope["path"], "root_path": request.scope.get("root_path", "")}
    found = {
        method
        for method in METHODS
        for route in request.app.routes
        if route.matches({**path, "method": method})[0] is Match.FULL
    }
    return sorted(found | ({"HEAD"} if "GET" in found else set()))


async def _unforeseen(request: Request, error: Exception) -> Response:
    """Answer an error that nobody foresaw; it goes on to the middleware, which logs it."""
    return problem_response(error)
