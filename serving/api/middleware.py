"""Check every request before a route sees it, and count, log and trace it afterwards.

Checked are keys and their rates, readiness, the bounded queue and the size of bodies; a guard keeps its times.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from time import perf_counter
from urllib.parse import SplitResult, urlsplit

import orjson
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pkd.serving.api.api_keys import ANONYMOUS, IN_SCOPE, ApiKey, ApiKeys
from pkd.serving.api.pages import is_page
from pkd.serving.api.problems import ForeignOrigin, problem_response
from pkd.serving.api.request_limits import Limits, RequestGuard, too_large
from pkd.serving.api.tokens import require_open
from pkd.serving.core.errors import Overloaded, UnsupportedMedia
from pkd.serving.core.options import Settings, is_loopback
from pkd.serving.inference.thread_pool import owner
from pkd.serving.observability.logs import id_of, log_request, log_unforeseen, request_id
from pkd.serving.observability.metrics import NO_ROUTE
from pkd.serving.observability.state import State
from pkd.serving.observability.telemetry import span
from pkd.toolkit.core.errors import PkdError

METRICS = "/metrics"
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs"})
"""Paths that are answered without a key, beside pages: nothing in them depends on a person or an encoder."""
UNCOUNTED = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths that machines ask for all the time: a drain does not wait for them."""
SENDS_BODY = frozenset({"POST", "PUT", "PATCH"})
UNCODED = frozenset({b"", b"identity"})
STREAMED = re.compile(r"/v1/galleries/[^/]+/(templates:bulk|import|export)")
"""Paths whose bodies or answers are streams: ``max_stream`` is their limit, and a clock runs for each piece."""


class Middleware:
    """Wrap an ASGI application. Refusals become problems, an unforeseen error a 500 without a traceback."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        state: State,
        keys: ApiKeys | None,
        *,
        local: bool = True,
        routes: Sequence[BaseRoute] = (),
    ) -> None:
        """Wrap ``app``, which has ``routes``. ``local``: the server can be reached from this machine alone."""
        self.routes = routes
        self.app, self.settings, self.state, self.keys, self.local = app, settings, state, keys, local
        self.working: Counter[str] = Counter()
        """Requests that are worked on, by the name of their key."""
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
        scope[IN_SCOPE] = None
        self.state.metrics.in_progress += counts
        headers = dict(reversed(scope["headers"]))  # the first of each name
        request_id.set(known := id_of(headers.get(b"x-request-id", b"")))
        recorder = _ResponseRecorder(send, self.state, known)
        with span(scope) as end_span:
            try:
                await self._admit(scope, headers, receive, recorder)
            except PkdError as error:
                await self._answer(error, scope, receive, recorder)
            except ClientDisconnect:
                self.state.metrics.abandoned()
            except Exception as error:
                log_unforeseen(f"{scope['method']} {self._route_of(scope)}", error)
                await self._answer(error, scope, receive, recorder)
            finally:
                self.state.metrics.in_progress -= counts
                route = self._route_of(scope)
                if recorder.problem:
                    self.state.metrics.refusal(recorder.problem)
                if counts:
                    seconds = perf_counter() - begun
                    if recorder.status:
                        self.state.metrics.request(scope["method"], route, recorder.status, seconds)
                    key = scope[IN_SCOPE]
                    log_request(scope["method"], route, recorder.status, seconds, key and key.name, recorder.problem)
                end_span(route, recorder.status, recorder.problem)

    async def _admit(self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        works, sends_body = method not in ("GET", "HEAD"), method in SENDS_BODY
        if path not in OPEN_PATHS and not is_page(path):
            if self.keys and self.keys.open_metrics and path == METRICS:
                pass
            elif self.keys:
                sent = headers.get(b"authorization")
                scope[IN_SCOPE] = key = await self.keys.identify(None if sent is None else sent.decode("latin-1"))
                self.keys.take(key)
                if key.token:
                    require_open(key.token, method, path)
            else:
                _require_own_origin(headers, self.local)
        limits = self._streamed if STREAMED.fullmatch(path) else self._timed if works else self._untimed
        if works:
            self.state.require_ready()
            for name, value in scope["headers"]:
                if name == b"content-length" and not (value.isdigit() and int(value) <= limits.bytes):
                    raise too_large(limits.bytes)
                if name == b"content-encoding" and sends_body:
                    _require_uncoded(value)
        place = self._take_place(scope[IN_SCOPE]) if works else None
        try:
            # What is cancelled while it waits for a worker thread is never executed.
            with RequestGuard(receive, limits, sends_body) as guard:
                await self.app(scope, guard.receive, send)
        finally:
            if place is not None:
                self.working[place] -= 1
                if not self.working[place]:
                    del self.working[place]

    def _take_place(self, key: ApiKey | None) -> str:
        """Take a place in the queue, in the name that is returned.

        Raises Overloaded where it is full, unless this key has less than its share of it.

        So a key that fills the queue leaves room for the others: each may take as many places as it would have if all
        keys that ask now shared the queue evenly, and all together twice the queue.
        """
        name, places = key.name if key else ANONYMOUS, self.settings.threads + self.settings.queue
        taken, own = self.working.total(), self.working[name]
        share = places // len({name, *self.working})
        if taken >= 2 * places or (taken >= places and own >= share):
            raise Overloaded(f"{taken} requests are in progress already. Try again in a moment.")
        self.working[name] += 1
        owner.set(name)
        return name

    def _route_of(self, scope: Scope) -> str:
        """Return the template of the request's route, ``/v1/galleries/{gallery}``: a path would name subjects.

        One that was refused before the router saw it has a route, too.
        """
        if (route := scope.get("route")) is None:
            route = next((one for one in self.routes if one.matches(scope)[0] is Match.FULL), None)
        return getattr(route, "path", NO_ROUTE)

    async def _answer(self, error: Exception, scope: Scope, receive: Receive, recorder: _ResponseRecorder) -> None:
        if not recorder.status:
            await problem_response(error)(scope, receive, recorder)


class _ResponseRecorder:
    """Send messages on, and remember the status and the problem's type."""

    def __init__(self, send: Send, state: State, request: str) -> None:
        self._send, self._state, self._header = send, state, (b"x-request-id", request.encode("ascii"))
        self.status = 0
        self.problem: str | None = None
        self._is_problem = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message["headers"], self._header]
            if self._state.draining:  # the next request belongs on another connection, to another server
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
            if self.status >= 400:
                self._is_problem = Headers(raw=message["headers"]).get("content-type") == "application/problem+json"
        elif self._is_problem and self.problem is None:
            self.problem = orjson.loads(message["body"])["type"]
        await self._send(message)


def _require_own_origin(headers: Mapping[bytes, bytes], local: bool) -> None:
    """Raise ForeignOrigin for what a web page of another site had a browser send to a server without keys.

    Browsers send forms and plain POSTs anywhere without asking. ``local``: the server answers to names of this machine
    only, so that no foreign name that resolves to it makes it part of a foreign site.
    """
    host, origin, site = (
        headers.get(name, default).decode("latin-1")
        for name, default in ((b"host", b""), (b"origin", b""), (b"sec-fetch-site", b"none"))
    )
    remedy = "Use the server's own address, or start it with --api-keys."
    if local and host and not _names_this_machine(host):
        raise ForeignOrigin(f"Host {host[:80]!r} is no name of this machine. {remedy}")
    foreign = b"origin" in headers and _split(origin).netloc != host
    if foreign or site not in ("none", "same-origin"):
        raise ForeignOrigin(f"A page of {(origin or site)[:80]!r} asked for this. {remedy}")


@lru_cache(8)
def _names_this_machine(host: str) -> bool:
    """Tell whether a Host header is of the loopback; clients send the same one again and again."""
    return "@" not in host and is_loopback(_split(f"//{host}").hostname or "")


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # for example half an IPv6 address
        return urlsplit("")


def _require_uncoded(coding: bytes) -> None:
    """Raise UnsupportedMedia for a compressed body: read as it is, it would be called broken."""
    if coding.strip().lower() not in UNCODED:
        said = coding.decode("latin-1")[:80]
        raise UnsupportedMedia(f"content encoding {said!r}. Send the body as it is, without one.")
