"""Guard one request while it is worked on: its body, the times it keeps, and whether its client is still there."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from pkd.serving.api.problems import BodyTimeout
from pkd.serving.core.errors import Overloaded, TooLarge

LOOK_SECONDS = 0.25
"""Time after which a request is looked at, and from when on it is noticed that its client leaves, seconds."""


@dataclass(frozen=True)
class Limits:
    """Say how large and how long a request may be."""

    bytes: int
    """Largest body."""
    body_seconds: float
    """Longest time for the whole body; where ``streams``, for each piece."""
    seconds: float | None
    """Longest time for all of it; None: as long as it takes."""
    streams: bool = False


class RequestGuard:
    """Cancel what the calling task awaits in a ``with`` block when the request must end.

    The block then ends with BodyTimeout, Overloaded or ClientDisconnect. Cancelled by anybody else, it
    ends with CancelledError; what was done in that very moment stays done. Most requests are answered before anybody
    looks: those cost one timer, where a task for the client, one for the body and one for the clock would cost more
    than all that is asked of them.
    """

    def __init__(self, receive: Receive, limits: Limits, expected: bool = True) -> None:
        """Guard a request. ``receive``: the server's. ``expected``: whether there is a body."""
        self._receive, self._limits = receive, limits
        self._total = 0
        self._complete, self._empty_sent = not expected, expected
        self._looked = False
        self._watch: asyncio.Task[None] | None = None
        self._why: Exception | None = None

    def __enter__(self) -> RequestGuard:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._loop = task, asyncio.get_running_loop()
        self._began = self._loop.time()
        self._timer = self._loop.call_later(min([LOOK_SECONDS, *self._due()]), self._look)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._timer.cancel()
        if self._watch:
            self._watch.cancel()
        if self._why is None:
            return
        if hasattr(self._task, "uncancel"):  # since Python 3.11 a task counts who wants it cancelled
            self._task.uncancel()
        if kind is asyncio.CancelledError:
            raise self._why from None

    async def receive(self) -> Message:
        """Return the next piece of the body; after the last one, wait for the end. Raises BodyTimeout or TooLarge.

        Counts what really arrives: a chunked body states no length, and a stated one may lie.
        """
        if self._complete:
            if not self._empty_sent:
                self._empty_sent = True
                return {"type": "http.request", "body": b"", "more_body": False}
            await asyncio.shield(self._watching())
            return {"type": "http.disconnect"}
        message = await (self._piece() if self._limits.streams else self._receive())
        self._total += len(message.get("body", b""))
        if self._total > self._limits.bytes:
            raise too_large(self._limits.bytes)
        if not message.get("more_body", False):
            self._complete = True
            if self._looked:
                self._look_in(LOOK_SECONDS)
        return message

    async def _piece(self) -> Message:
        try:
            return await asyncio.wait_for(self._receive(), self._limits.body_seconds)
        except asyncio.TimeoutError:
            raise self._slow() from None

    def _due(self) -> list[float]:
        """List when it must have ended, seconds from its beginning."""
        limits = self._limits
        body = [] if self._complete or limits.streams else [limits.body_seconds]
        return body if limits.seconds is None else [*body, limits.seconds]

    def _look(self) -> None:
        self._looked = True
        passed, due = self._loop.time() - self._began, self._due()
        if self._limits.seconds is not None and passed >= self._limits.seconds:
            self._stop(self._busy())
        elif due and passed >= min(due):
            self._stop(self._slow())
        else:
            if due:
                self._look_in(max(min(due) - passed, 0.001))
            if self._complete:
                self._watching()

    def _look_in(self, seconds: float) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._look)

    def _watching(self) -> asyncio.Task[None]:
        if self._watch is None:
            self._watch = self._loop.create_task(self._until_left())
        return self._watch

    async def _until_left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._stop(ClientDisconnect())

    def _stop(self, why: Exception) -> None:
        if self._why is None:
            self._why = why
            self._task.cancel()

    def _slow(self) -> BodyTimeout:
        return BodyTimeout(f"The body did not arrive in {self._limits.body_seconds:g} s.")

    def _busy(self) -> Overloaded:
        seconds = self._limits.seconds
        return Overloaded(f"There was no answer in {seconds:g} s: the server is busy. Try again later.")


def too_large(limit: int) -> TooLarge:
    """Make the refusal of a body over ``limit`` bytes."""
    return TooLarge(f"The body is over {limit:,} bytes.", details={"limit": limit})
