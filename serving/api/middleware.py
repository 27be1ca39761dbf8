"""Check every request before a route sees it, and count, log and trace it afterwards.

Checked are keys and their rates, readiness, the bounded queue and the size of bodies; a guard keeps its times.
"""

from __future__ import annotations

import re
from time import perf_counter

import orjson
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pkd.serving.api.api_keys import IN_SCOPE, ApiKeys
from pkd.serving.api.problems import problem_response
from pkd.serving.api.request_limits import Limits, RequestGuard, too_large
from pkd.serving.core.errors import Overloaded, UnsupportedMedia
from pkd.serving.core.options import Settings
from pkd.serving.observability.logs import log_request, log_unforeseen
from pkd.serving.observability.metrics import NO_ROUTE
from pkd.serving.observability.state import State
from pkd.serving.observability.telemetry import span
from pkd.toolkit.core.errors import PkdError

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs"})
"""Paths that are answered without a key: nothing in them depends on a person or an encoder."""
UNCOUNTED = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths that machines ask for all the time: a drain does not wait for them."""
SENDS_BODY = frozenset({"POST", "PUT", "PATCH"})
UNCODED = frozenset({b"", b"identity"})
STREAMED = re.compile(r"/v1/galleries/[^/]+/(templates:bulk|import|export)")
"""Paths whose bodies or answers are streams: ``max_stream`` is their limit, and a clock runs for each piece."""


class Middleware:
    """Wrap an ASGI application. Refusals become problems, an unforeseen error a 500 without a traceback."""

    def __init__(self, app: ASGIApp, settings: Settings, state: State, keys: ApiKeys | None) -> None:
        self.app, self.settings, self.state, self.keys = app, settings, state, keys
        self.working = 0
        self._timed = Limits(settings.max_body, settings.body_seconds, settings.request_seconds)
        self._untimed = Limits(settings.max_body, settings.body_seconds, None)
        self._streamed = Limits(settings.max_stream, settings.body_seconds, None, streams=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = perf_counter()
        counts = scope["path"] not in UNCOUNTED
        works = scope["method"] not in ("GET", "HEAD")
        scope[IN_SCOPE] = None
        self._count(counts, works)
        recorder = _ResponseRecorder(send)
        with span(scope) as end_span:
            try:
                await self._admit(scope, receive, recorder, works)
            except PkdError as error:
                await self._answer(error, scope, receive, recorder)
            except ClientDisconnect:
                self.state.metrics.abandoned()
            except Exception as error:
                log_unforeseen(f"{scope['method']} {route_of(scope)}", error)
                await self._answer(error, scope, receive, recorder)
            finally:
                self._count(counts, works, -1)
                route = route_of(scope)
                if recorder.problem:
                    self.state.metrics.refusal(recorder.problem)
                if counts:
                    seconds = perf_counter() - begun
                    if recorder.status:
                        self.state.metrics.request(scope["method"], route, recorder.status, seconds)
                    key = scope[IN_SCOPE]
                    log_request(scope["method"], route, recorder.status, seconds, key and key.name, recorder.problem)
                end_span(route, recorder.status, recorder.problem)

    async def _admit(self, scope: Scope, receive: Receive, send: Send, works: bool) -> None:
        if self.keys and scope["path"] not in OPEN_PATHS:
            scope[IN_SCOPE] = self.keys.check(Headers(scope=scope).get("authorization"))
        limits = self._streamed if STREAMED.fullmatch(scope["path"]) else self._timed if works else self._untimed
        if works:
            self.state.require_ready()
            if self.working > self.settings.threads + self.settings.queue:
                detail = f"{self.working - 1} requests are in progress already. Try again in a moment."
                raise Overloaded(detail)
            for name, value in scope["headers"]:
                if name == b"content-length" and not (value.isdigit() and int(value) <= limits.bytes):
                    raise too_large(limits.bytes)
                if name == b"content-encoding" and scope["method"] in SENDS_BODY:
                    _require_uncoded(value)
        # What is cancelled while it waits for a worker thread is never executed.
        with RequestGuard(receive, limits, scope["method"] in SENDS_BODY) as guard:
            await self.app(scope, guard.receive, send)

    def _count(self, counts: bool, works: bool, by: int = 1) -> None:
        self.working += by * works
        self.state.metrics.in_progress += by * counts

    async def _answer(self, error: Exception, scope: Scope, receive: Receive, recorder: _ResponseRecorder) -> None:
        if not recorder.status:
            await problem_response(error)(scope, receive, recorder)


class _ResponseRecorder:
    """Send messages on, and remember the status and the problem's type."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.problem: str | None = None
        self._is_problem = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.status >= 400:
                self._is_problem = Headers(raw=message["headers"]).get("content-type") == "application/problem+json"
        elif self._is_problem and self.problem is None:
            self.problem = orjson.loads(message["body"])["type"]
        await self._send(message)


def _require_uncoded(coding: bytes) -> None:
    """Raise UnsupportedMedia for a compressed body: read as it is, it would be called broken."""
    if coding.strip().lower() not in UNCODED:
        said = coding.decode("latin-1")[:80]
        raise UnsupportedMedia(f"content encoding {said!r}. Send the body as it is, without one.")


def route_of(scope: Scope) -> str:
    """Return the template of the route that took the request, ``/v1/galleries/{gallery}``.

    A path would name subjects.
    """
    return getattr(scope.get("route"), "path", NO_ROUTE)
