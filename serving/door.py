"""Door: what every request passes before a route sees it. Keys, readiness, the bounded queue, the size of the body."""

from __future__ import annotations

import asyncio
import logging
import traceback

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pkd.serving.problems import Problem
from pkd.serving.security import IN_SCOPE, ApiKeys
from pkd.serving.settings import Settings
from pkd.serving.state import State

logger = logging.getLogger("pkd.serving")
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs"})
"""Answered without a key: nothing in them depends on a person or an encoder."""


class Door:
    """ASGI middleware. Refusals are problems; an unforeseen error becomes a 500 without a traceback."""

    def __init__(self, app: ASGIApp, settings: Settings, state: State, keys: ApiKeys | None) -> None:
        self.app, self.settings, self.state, self.keys = app, settings, state, keys
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        works = scope["method"] == "POST"
        self.inside += works
        started = False

        async def tell(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._admit(scope, works)
            await self.app(scope, self._counted(receive) if works else receive, tell)
        except Problem as problem:
            await problem.response()(scope, receive, send)
        except ClientDisconnect:
            pass  # nobody is left to answer
        except Exception as error:
            # Where it happened, but not what the values were: vectors and keys stay out of logs.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s %s: %s\n%s", scope["method"], scope["path"], type(error).__name__, frames)
            if not started:
                await Problem("internal", "The server failed; its log says where.").response()(scope, receive, send)
        finally:
            self.inside -= works

    def _admit(self, scope: Scope, works: bool) -> None:
        headers = Headers(scope=scope)
        guarded = self.keys and scope["path"] not in OPEN_PATHS
        scope[IN_SCOPE] = self.keys.check(headers.get("authorization")) if self.keys and guarded else None
        if not works:
            return
        self.state.require_ready()
        if self.inside > self.settings.threads + self.settings.queue:
            raise Problem("overloaded", f"{self.inside - 1} requests are in progress already. Try again in a moment.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.settings.max_body:
            raise self._too_large()

    def _counted(self, receive: Receive) -> Receive:
        """Counts what really arrives: a chunked body states no length, and a stated one may lie."""
        total = 0
        deadline = asyncio.get_running_loop().time() + self.settings.body_seconds
        complete = False

        async def counted() -> Message:
            nonlocal total, complete
            if complete:  # what follows the body is only the disconnect, which may take as long as it likes
                return await receive()
            left = deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.001))
            except asyncio.TimeoutError:
                raise Problem("timeout", f"The body did not arrive in {self.settings.body_seconds:g} s.") from None
            total += len(message.get("body", b""))
            if total > self.settings.max_body:
                raise self._too_large()
            complete = not message.get("more_body", False)
            return message

        return counted

    def _too_large(self) -> Problem:
        return Problem("too-large", f"The body is over {self.settings.max_body:,} bytes.", limit=self.settings.max_body)
