"""Door: what every request passes before a route sees it, and what it leaves behind.

Keys and their rates, readiness, the bounded queue, the size of bodies, clocks; then counts, a line in the log, a span.
"""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from time import perf_counter

import orjson
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pkd.serving.clock import Clock
from pkd.serving.logs import log_request
from pkd.serving.metrics import NO_ROUTE
from pkd.serving.problems import Problem, from_error
from pkd.serving.security import IN_SCOPE, ApiKeys
from pkd.serving.settings import Settings
from pkd.serving.state import State
from pkd.serving.telemetry import span
from pkd.toolkit.errors import PkdError

logger = logging.getLogger("pkd.serving")
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs"})
"""Answered without a key: nothing in them depends on a person or an encoder."""
UNCOUNTED = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked for by machines all the time: no part of what a drain waits for."""
SENDS_BODY = frozenset({"POST", "PUT", "PATCH"})
STREAMED = re.compile(r"/v1/galleries/[^/]+/(templates:bulk|import|export)")
"""Paths whose bodies or answers are streams: ``max_stream`` is their limit, and a clock runs for each piece alone."""
LOOK_SECONDS = 0.05
"""How long a request is worked on before somebody watches for its client to leave, which takes a task of its own."""


class Door:
    """ASGI middleware. Refusals are problems; an unforeseen error becomes a 500 without a traceback."""

    def __init__(self, app: ASGIApp, settings: Settings, state: State, keys: ApiKeys | None) -> None:
        self.app, self.settings, self.state, self.keys = app, settings, state, keys
        self.working = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = perf_counter()
        counts = scope["path"] not in UNCOUNTED
        works = scope["method"] not in ("GET", "HEAD")
        scope[IN_SCOPE] = None
        self._count(counts, works)
        told = _Told(send)
        with span(scope) as end_span:
            try:
                await self._pass(scope, receive, told, works)
            except PkdError as error:
                await self._tell(from_error(error), scope, receive, told)
            except Problem as problem:
                await self._tell(problem, scope, receive, told)
            except ClientDisconnect:
                self.state.metrics.abandoned()
            except Exception as error:
                # Where it happened, but not what the values were: vectors and keys stay out of logs.
                frames = "".join(traceback.format_tb(error.__traceback__))
                logger.error("%s %s: %s\n%s", scope["method"], route_of(scope), type(error).__name__, frames)
                await self._tell(Problem("internal", "The server failed; its log says where."), scope, receive, told)
            finally:
                self._count(counts, works, -1)
                route = route_of(scope)
                if told.problem:
                    self.state.metrics.refusal(told.problem)
                if counts:
                    seconds = perf_counter() - begun
                    if told.status:
                        self.state.metrics.request(scope["method"], route, told.status, seconds)
                    key = scope[IN_SCOPE]
                    log_request(scope["method"], route, told.status, seconds, key and key.name, told.problem)
                end_span(route, told.status, told.problem)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, works: bool) -> None:
        headers = Headers(scope=scope)
        if self.keys and scope["path"] not in OPEN_PATHS:
            scope[IN_SCOPE] = self.keys.check(headers.get("authorization"))
        streams = STREAMED.fullmatch(scope["path"]) is not None
        limit = self.settings.max_stream if streams else self.settings.max_body
        if works:
            self.state.require_ready()
            if self.working > self.settings.threads + self.settings.queue:
                detail = f"{self.working - 1} requests are in progress already. Try again in a moment."
                raise Problem("overloaded", detail)
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > limit:
                raise _too_large(limit)
        timed = works and not streams
        # What is cancelled while it waits for a worker thread is never executed.
        with Clock(self.settings.request_seconds if timed else None, self._late) as clock:
            expected = scope["method"] in SENDS_BODY
            body = _Body(receive, clock, limit, self.settings.body_seconds, streams, expected)
            try:
                await self.app(scope, body.receive, send)
            finally:
                body.close()

    def _late(self) -> Problem:
        seconds = self.settings.request_seconds
        return Problem("overloaded", f"There was no answer in {seconds:g} s: the server is busy. Try again later.")

    def _count(self, counts: bool, works: bool, by: int = 1) -> None:
        self.working += by * works
        self.state.inside += by * counts
        if counts:
            self.state.metrics.inside.inc(by)

    async def _tell(self, problem: Problem, scope: Scope, receive: Receive, told: _Told) -> None:
        if not told.status:
            await problem.response()(scope, receive, told)


class _Told:
    """``send``, and what went through it: the status, and the problem's type as the client is told it."""

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


class _Body:
    """A request's body. Counts what really arrives: a chunked one states no length, and a stated one may lie."""

    def __init__(
        self, receive: Receive, clock: Clock, limit: int, seconds: float, streams: bool, expected: bool
    ) -> None:
        self._receive, self._clock, self._limit, self._seconds, self._streams = receive, clock, limit, seconds, streams
        self._total = 0
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + seconds
        self._complete, self._empty_told = False, expected
        self._gone = asyncio.Event()
        self._look: asyncio.TimerHandle | None = None
        self._watch: asyncio.Task[None] | None = None
        if not expected:
            self._end()

    async def receive(self) -> Message:
        """The next piece. Raises a Problem: timeout or too-large. After the last one, only that the client has left."""
        if self._complete:
            if not self._empty_told:
                self._empty_told = True
                return {"type": "http.request", "body": b"", "more_body": False}
            await self._gone.wait()
            return {"type": "http.disconnect"}
        with Clock(self._seconds if self._streams else self._deadline - self._loop.time(), self._late):
            message = await self._receive()
        self._total += len(message.get("body", b""))
        if self._total > self._limit:
            raise _too_large(self._limit)
        if not message.get("more_body", False):
            self._end()
        return message

    def close(self) -> None:
        """The request is answered."""
        if self._look:
            self._look.cancel()
        if self._watch:
            self._watch.cancel()

    def _late(self) -> Problem:
        return Problem("timeout", f"The body did not arrive in {self._seconds:g} s.")

    def _end(self) -> None:
        """All of it is here. Most requests are answered before anybody looks whether their client still waits."""
        self._complete = True
        self._look = self._loop.call_later(LOOK_SECONDS, self._start_watch)

    def _start_watch(self) -> None:
        self._watch = self._loop.create_task(self._until_left())

    async def _until_left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()
        self._clock.stop(ClientDisconnect())


def route_of(scope: Scope) -> str:
    """The template of the route that took the request, ``/v1/galleries/{gallery}``: a path would name subjects."""
    return getattr(scope.get("route"), "path", NO_ROUTE)


def _too_large(limit: int) -> Problem:
    return Problem("too-large", f"The body is over {limit:,} bytes.", limit=limit)
