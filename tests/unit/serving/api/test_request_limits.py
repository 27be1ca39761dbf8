"""A request on its clocks: bodies that come slowly, in pieces or never; work that takes long; clients that leave."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from pkd.serving.api import request_limits
from pkd.serving.api.problems import BodyTimeout
from pkd.serving.api.request_limits import Limits, RequestGuard
from pkd.serving.core.errors import Overloaded, TooLarge
from pkd.toolkit.core.errors import PkdError

LIMITS = Limits(bytes=10, body_seconds=20, seconds=20)
LAST = {"type": "http.request", "body": b"12", "more_body": False}
PIECE = {"type": "http.request", "body": b"345", "more_body": True}
LEFT = {"type": "http.disconnect"}


class Client:
    """What an ASGI server would receive: messages and the seconds before each; then nothing more."""

    def __init__(self, *script: Any) -> None:
        self._script = list(script)
        self.asked = 0

    async def receive(self) -> Any:
        self.asked += 1
        if not self._script:
            await asyncio.sleep(60)
        seconds, message = self._script.pop(0)
        if seconds:
            await asyncio.sleep(seconds)
        return message


def run(client: Client, limits: Any, work: Any, expected: Any = True) -> Any:
    """Return what ``work(receive)`` gives, and how many tasks it left."""

    async def main() -> Any:
        try:
            with RequestGuard(client.receive, limits, expected) as visited:
                return await work(visited.receive)
        finally:
            await asyncio.sleep(0)  # no cancellation is left over, and what was cancelled ends
            assert asyncio.all_tasks() == {asyncio.current_task()}

    return asyncio.run(main())


async def read(receive: Any) -> Any:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body, more = body + message["body"], message["more_body"]
    return body


def then(seconds: float) -> Any:
    async def work(receive: Any) -> Any:
        body = await read(receive)
        await asyncio.sleep(seconds)
        return body

    return work


def refusal(*arguments: Any) -> Any:
    with pytest.raises(PkdError) as refused:
        run(*arguments)
    return refused.value


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("seconds", [0, 2.5 * request_limits.LOOK_SECONDS])
def test_a_body_comes_whole_however_slowly(seconds: float, streams: Any) -> None:
    client = Client((0, PIECE), (seconds, PIECE), (seconds, LAST))
    assert run(client, replace(LIMITS, streams=streams), read) == b"34534512"


def test_a_body_is_counted_as_it_comes() -> None:
    problem = refusal(Client((0, PIECE), (0, PIECE), (0, PIECE), (0, PIECE)), LIMITS, read)
    assert isinstance(problem, TooLarge) and problem.details["limit"] == 10


def test_a_body_that_comes_too_slowly_is_refused() -> None:
    slow = Client((0.04, PIECE), (0.04, PIECE), (0.04, LAST))
    problem = refusal(slow, replace(LIMITS, body_seconds=0.1), read)
    assert isinstance(problem, BodyTimeout) and "0.1 s" in str(problem)


def test_a_stream_may_take_its_time_but_no_piece_of_it() -> None:
    limits = replace(LIMITS, body_seconds=0.1, streams=True, seconds=None)
    assert run(Client((0.06, PIECE), (0.06, PIECE), (0.06, LAST)), limits, read) == b"34534512"
    assert isinstance(refusal(Client((0, PIECE), (0.5, LAST)), limits, read), BodyTimeout)


@pytest.mark.parametrize("seconds", [0.01, 0.12])
def test_work_that_takes_too_long_is_refused(seconds: float) -> None:
    problem = refusal(Client((0, LAST)), replace(LIMITS, seconds=seconds), then(20))
    assert isinstance(problem, Overloaded) and f"{seconds:g} s" in str(problem)


def test_of_two_times_the_first_that_is_over_is_named() -> None:
    never = Client((0, PIECE))
    assert isinstance(refusal(never, replace(LIMITS, body_seconds=0.1, seconds=0.2), read), BodyTimeout)
    assert isinstance(refusal(Client((0, PIECE)), replace(LIMITS, body_seconds=0.2, seconds=0.1), read), Overloaded)


@pytest.mark.parametrize("after", [0, request_limits.LOOK_SECONDS / 2, 3 * request_limits.LOOK_SECONDS])
@pytest.mark.parametrize("body", [0, 2 * request_limits.LOOK_SECONDS])
def test_a_client_that_leaves_ends_the_work(after: Any, body: Any) -> None:
    with pytest.raises(ClientDisconnect):
        run(Client((body, LAST), (after, LEFT)), LIMITS, then(20))


def test_nobody_watches_what_is_answered_at_once() -> None:
    client = Client((0, LAST), (0, LEFT))
    assert run(client, LIMITS, then(0)) == b"12"
    assert client.asked == 1


def test_who_has_no_body_is_told_so_once_and_then_only_that_the_client_left() -> None:
    async def work(receive: Any) -> Any:
        assert await receive() == {"type": "http.request", "body": b"", "more_body": False}
        return await receive()

    client = Client((0.01, LEFT))
    with pytest.raises(ClientDisconnect):
        run(client, replace(LIMITS, seconds=None), work, False)
    assert client.asked == 1


def test_an_error_of_the_work_is_its_own() -> None:
    async def work(receive: Any) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run(Client((0, LAST)), LIMITS, work)


def test_what_others_cancel_stays_cancelled() -> None:
    async def work() -> None:
        with RequestGuard(Client((0, LAST)).receive, LIMITS) as visited:
            await then(20)(visited.receive)

    async def main() -> None:
        task = asyncio.ensure_future(work())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_what_was_done_in_time_stays_done_though_it_was_stopped() -> None:
    async def stubborn(receive: Any) -> Any:
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            return "done"

    assert run(Client(), replace(LIMITS, seconds=0.01), stubborn) == "done"
