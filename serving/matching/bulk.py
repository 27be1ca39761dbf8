"""Bulk: many enrolments in one request. NDJSON in, NDJSON out, both streamed; an item is answered once it is durable.

What has arrived while the last batch was being stored is the next batch: one item alone is stored at once, and a flood
shares its writes to the disk. An item that is refused does not stop the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pkd.serving.core.gallery_schemas import BulkItem
from pkd.serving.core.problems import Problem, from_error, internal
from pkd.serving.core.responses import line
from pkd.serving.core.schemas import MANY_VALUES
from pkd.serving.galleries.store import Enrolled, Enrolment, Gallery
from pkd.serving.inference.request_images import parse
from pkd.serving.matching.enrolment import ask, explained, prepare
from pkd.serving.observability.logs import log_unforeseen
from pkd.toolkit.core.errors import PkdError

if TYPE_CHECKING:
    from pkd.serving.matching.service import Service

BATCH = 32
"""Most items that are embedded and stored together."""


@dataclass(frozen=True)
class Item:
    """One line of the body: its number, from 1, and its bytes, or why it cannot be read."""

    number: int
    content: bytes | Problem

    @property
    def size(self) -> int:
        """Bytes held for it."""
        return len(self.content) if isinstance(self.content, bytes) else 0


@dataclass
class Answer:
    """What will be said of an item, and what is to be stored for it before."""

    number: int
    subject: str | None = None
    key: str | None = None
    enrolments: Sequence[Enrolment] = ()
    problem: Problem | None = None
    before: Enrolled | None = None
    """What was answered when it was sent before, under the same key."""

    def refused(self, problem: Problem) -> Answer:
        """The same item with its problem, and nothing to store."""
        return Answer(self.number, self.subject, self.key, (), problem)


Read = Callable[[Gallery, Sequence[Item]], Coroutine[Any, Any, Sequence[Answer]]]
"""Turns lines into what is to be stored, in their order; a line that needs no answer has none."""


async def enrol_lines(
    service: Service, name: str, body: AsyncIterator[bytes], actor: str, read: Read
) -> AsyncGenerator[bytes, None]:
    """Answers to the lines of ``body``, in order, a batch at a time."""
    arriving = _batches(body, service.settings.max_body)
    try:
        async for batch in arriving:
            if service.state.draining:
                problem = Problem("draining", "The server is shutting down. Send what has no answer to another one.")
                yield line(_told(Answer(batch[0].number, problem=problem), ()))
                return
            told = await _store(service, name, batch, actor, read)
            for one in told:
                if "problem" in one:
                    service.state.metrics.refusal(one["problem"]["type"])
            yield b"".join(map(line, told))
    finally:
        await arriving.aclose()


async def read_items(service: Service, gallery: Gallery, items: Sequence[Item]) -> Sequence[Answer]:
    """Lines of a bulk enrolment. What was enrolled before under the same key is not embedded again."""
    read = [_ask(item) for item in items]
    keyed = [answer for answer, body in read if body and answer.key]
    asked = [enrolment for answer in keyed for enrolment in answer.enrolments]
    before = await service.stored(service.store.answered, gallery.name, asked) if asked else ()
    for answer, enrolment, outcome in zip(keyed, asked, before, strict=True):
        if isinstance(outcome, Problem):
            answer.problem = explained(outcome, service, gallery, enrolment)
        answer.before = outcome if isinstance(outcome, Enrolled) else None
    return await asyncio.gather(*(_embed(service, gallery, answer, body) for answer, body in read))


def _ask(item: Item) -> tuple[Answer, BulkItem | None]:
    """One line, read: its enrolment has no templates yet. Without a body it is refused."""
    answer = Answer(item.number)
    try:
        if isinstance(item.content, Problem):
            return answer.refused(item.content), None
        body = parse(BulkItem, item.content, MANY_VALUES)
        answer = Answer(item.number, body.subject, body.key)
        return replace(answer, enrolments=(ask(body.subject, body.inputs, body, body.key),)), body
    except Problem as problem:
        return answer.refused(problem), None


async def _embed(service: Service, gallery: Gallery, answer: Answer, body: BulkItem | None) -> Answer:
    """The templates of one line that has not been answered yet. What nobody foresaw concerns this line alone."""
    if body is None or answer.problem or answer.before:
        return replace(answer, enrolments=())
    (asked,) = answer.enrolments
    try:
        ready = await prepare(service, gallery, asked, body.inputs, body)
        return replace(answer, enrolments=(ready.enrolment,))
    except Problem as problem:
        return answer.refused(problem)
    except PkdError as error:
        return answer.refused(from_error(error))
    except Exception as error:
        log_unforeseen(f"line {answer.number} of a bulk enrolment", error)
        return answer.refused(internal())


async def _store(service: Service, name: str, batch: Sequence[Item], actor: str, read: Read) -> list[dict[str, Any]]:
    try:
        gallery = await service.stored(service.store.get, name)
        answers = await read(gallery, batch)
        enrolments = [enrolment for one in answers for enrolment in one.enrolments]
        outcomes = list(await service.stored(service.store.enrol, name, enrolments, actor)) if enrolments else []
    except Problem as problem:  # the store is gone, or the gallery is: every item hears of it and can be sent again
        return [_told(Answer(item.number, problem=problem), ()) for item in batch]
    told = []
    for one in answers:
        own, outcomes = outcomes[: len(one.enrolments)], outcomes[len(one.enrolments) :]
        for enrolment, outcome in zip(one.enrolments, own, strict=True):
            if isinstance(outcome, Problem):
                explained(outcome, service, gallery, enrolment)
        told.append(_told(one, [one.before] if one.before else own))
    return told


def _told(answer: Answer, outcomes: Sequence[Enrolled | Problem]) -> dict[str, Any]:
    """As the schema BulkAnswer."""
    said: dict[str, Any] = {"line": answer.number, "subject": answer.subject, "key": answer.key}
    problem = answer.problem or next((one for one in outcomes if isinstance(one, Problem)), None)
    if problem:
        return {**said, "problem": problem.body()}
    done = [one for one in outcomes if isinstance(one, Enrolled)]
    return {
        **said,
        "templates": [id for one in done for id in one.templates],
        "sequence": max((one.sequence for one in done), default=None),
        "replayed": all(one.replayed for one in done),
    }


async def _batches(body: AsyncIterator[bytes], limit: int) -> AsyncGenerator[list[Item], None]:
    """Whatever has arrived, at most ``BATCH`` items; the body is read on meanwhile, so far ahead and no further.

    At most about ``limit`` bytes wait, and as many are worked on: what does not fit stays in the socket.
    """
    waiting: asyncio.Queue[Item | None] = asyncio.Queue(BATCH)
    room = asyncio.Event()
    room.set()
    held = 0

    async def fill() -> None:
        nonlocal held
        async for item in _items(body, limit):
            await room.wait()
            held += item.size
            if held >= limit:
                room.clear()
            await waiting.put(item)
        await waiting.put(None)

    filling = asyncio.create_task(fill())
    try:
        more = True
        while more:
            taken = [await waiting.get()]
            while len(taken) < BATCH and not waiting.empty():
                taken.append(waiting.get_nowait())
            more = None not in taken
            held -= sum(item.size for item in taken if item)
            room.set()
            if batch := [item for item in taken if item]:
                yield batch
    finally:
        filling.cancel()
        with suppress(asyncio.CancelledError):
            await filling


async def _items(body: AsyncIterator[bytes], limit: int) -> AsyncIterator[Item]:
    """Lines of a body; empty ones are counted and skipped. One that is too long is an item that cannot be read.

    The last item says why the body ended early, if it did.
    """
    number, kept, skipping = 1, bytearray(), False
    try:
        async for piece in body:
            *ended, rest = piece.split(b"\n")
            for part in ended:
                kept += part
                if skipping or len(kept) > limit:
                    yield Item(number, _too_long(limit))
                elif kept.strip():
                    yield Item(number, bytes(kept))
                number, kept, skipping = number + 1, bytearray(), False
            kept += rest
            if len(kept) > limit:
                kept, skipping = bytearray(), True
    except Problem as problem:
        yield Item(number, problem)
        return
    if skipping:
        yield Item(number, _too_long(limit))
    elif kept.strip():
        yield Item(number, bytes(kept))


def _too_long(limit: int) -> Problem:
    return Problem("too-large", f"the line is over {limit:,} bytes.", limit=limit)
