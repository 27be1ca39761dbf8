"""Enrol many subjects in one request: lines of JSON in, a result per line out, both as they come.

What has arrived while the last batch was being stored is the next batch: one line alone is stored at once, and a flood
shares its writes to the disk. A line is answered once its subject is durable; one that is refused stops no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pkd.serving.core.errors import Draining, InvalidRequest, ServingError, TooLarge
from pkd.serving.core.gallery_schemas import DoubtAnswer
from pkd.serving.core.schemas import MANY_VALUES
from pkd.serving.core.transfer_schemas import BulkItem
from pkd.serving.core.validation import parse
from pkd.serving.galleries.store import Enrolled, Enrolment, Gallery
from pkd.serving.matching.doubts import replace_mapped
from pkd.serving.matching.enrolment import examine, explained, new_enrolment, prepare
from pkd.serving.matching.service import Service
from pkd.serving.observability.logs import log_unforeseen
from pkd.toolkit.core.errors import PkdError

BATCH = 32
"""Most lines that are embedded and stored together."""


@dataclass(frozen=True)
class BulkLine:
    """Hold one line of the body: its number, from 1, and its bytes, or why it cannot be read."""

    number: int
    content: bytes | PkdError

    @property
    def size(self) -> int:
        """Count the bytes held for it."""
        return len(self.content) if isinstance(self.content, bytes) else 0


@dataclass
class ReadLine:
    """Hold what one line asks to store, or why it is refused."""

    number: int
    subject: str | None = None
    key: str | None = None
    enrolments: Sequence[Enrolment] = ()
    error: Exception | None = None
    accept_doubts: bool = False
    previous: Enrolled | None = None
    """The result of the same line when it was sent before, under the same key."""

    def refused(self, error: Exception) -> ReadLine:
        """Return the same line with why it is refused, and nothing to store."""
        return ReadLine(self.number, self.subject, self.key, (), error)


@dataclass(frozen=True)
class LineResult:
    """Hold what became of one line: ``enrolled``, or why it was refused."""

    line: ReadLine
    enrolled: Sequence[Enrolled] = ()
    error: Exception | None = None
    doubts: Sequence[DoubtAnswer] = ()


Reader = Callable[[Gallery, Sequence[BulkLine]], Coroutine[Any, Any, Sequence[ReadLine]]]
"""Turns lines into what is to be stored, in their order; a line that needs no answer is left out."""


async def enrol_lines(
    service: Service, name: str, body: AsyncIterator[bytes], actor: str, read: Reader
) -> AsyncGenerator[list[LineResult], None]:
    """Enrol the lines of ``body`` and give their results, in order, a batch at a time."""
    arriving = _batches(body, service.settings.max_body)
    try:
        async for batch in arriving:
            if service.state.draining:
                error = Draining("The server is shutting down. Send what has no answer to another one.")
                yield [LineResult(ReadLine(batch[0].number), error=error)]
                return
            yield await _store(service, name, batch, actor, read)
    finally:
        await arriving.aclose()


async def read_items(
    service: Service, gallery: Gallery, lines: Sequence[BulkLine], *, may_accept: bool = False
) -> Sequence[ReadLine]:
    """Read lines of a bulk enrolment. What was enrolled before under the same key is not embedded again.

    ``may_accept``: the key may enrol against the gallery's policy.
    """
    parsed = [_parse(line, may_accept) for line in lines]
    keyed = [line for line, body in parsed if body and line.key]
    asked = [enrolment for line in keyed for enrolment in line.enrolments]
    answered = await service.stored(service.store.replayed, gallery.name, asked) if asked else ()
    for line, enrolment, outcome in zip(keyed, asked, answered, strict=True):
        if isinstance(outcome, PkdError):
            line.error = explained(outcome, service, gallery, enrolment)
        line.previous = outcome if isinstance(outcome, Enrolled) else None
    return await asyncio.gather(*(_embed(service, gallery, line, body) for line, body in parsed))


def _parse(line: BulkLine, may_accept: bool) -> tuple[ReadLine, BulkItem | None]:
    """Read one line; its enrolment has no templates yet. Without a body it is refused."""
    read = ReadLine(line.number)
    try:
        if isinstance(line.content, PkdError):
            return read.refused(line.content), None
        body = parse(BulkItem, line.content, MANY_VALUES)
        read = ReadLine(line.number, body.subject, body.key)
        if body.accept_doubts and not may_accept:
            return read.refused(InvalidRequest("accept_doubts: this key may not. Send it with an admin key.")), None
        asked = new_enrolment(body.subject, body.inputs, body, body.key)
        return replace(read, enrolments=(asked,), accept_doubts=body.accept_doubts), body
    except PkdError as error:
        return read.refused(error), None


async def _embed(service: Service, gallery: Gallery, line: ReadLine, body: BulkItem | None) -> ReadLine:
    """Make the templates of one line that has no result yet. What nobody foresaw concerns this line alone."""
    if body is None or line.error or line.previous:
        return replace(line, enrolments=())
    (asked,) = line.enrolments
    try:
        ready = await prepare(service, gallery, asked, body.inputs, body)
        return replace(line, enrolments=(ready.enrolment,))
    except PkdError as error:
        return line.refused(error)
    except Exception as error:
        log_unforeseen(f"line {line.number} of a bulk enrolment", error)
        return line.refused(error)


async def _store(service: Service, name: str, batch: Sequence[BulkLine], actor: str, read: Reader) -> list[LineResult]:
    try:
        gallery = await service.stored(service.store.get, name)
        lines = await read(gallery, batch)
        asked = [(enrolment, line.accept_doubts) for line in lines for enrolment in line.enrolments]
        judged = await examine(service, gallery, [one for one, _ in asked], [accept for _, accept in asked], actor)
        enrolments = [one[0] for one in judged if not isinstance(one, PkdError)]
        stored = iter(await service.written(service.store.enrol, name, enrolments, actor) if enrolments else ())
        outcomes = [one if isinstance(one, PkdError) else next(stored) for one in judged]
        doubts = [() if isinstance(one, PkdError) else one[1] for one in judged]
        done = [
            (one, outcome) for (one, _), outcome in zip(asked, outcomes, strict=True) if isinstance(outcome, Enrolled)
        ]
        await replace_mapped(service, gallery, done, actor)
    except ServingError as error:  # the store is gone, or the gallery is: every line says so and can be sent again
        return [LineResult(ReadLine(line.number), error=error) for line in batch]
    results = []
    for line in lines:
        own, outcomes = outcomes[: len(line.enrolments)], outcomes[len(line.enrolments) :]
        about, doubts = doubts[: len(line.enrolments)], doubts[len(line.enrolments) :]
        refusals = [
            explained(outcome, service, gallery, enrolment)
            for enrolment, outcome in zip(line.enrolments, own, strict=True)
            if isinstance(outcome, PkdError)
        ]
        enrolled = [outcome for outcome in own if isinstance(outcome, Enrolled)]
        results.append(
            LineResult(
                line,
                [line.previous] if line.previous else enrolled,
                line.error or next(iter(refusals), None),
                [doubt for each in about for doubt in each],
            )
        )
    return results


async def _batches(body: AsyncIterator[bytes], limit: int) -> AsyncGenerator[list[BulkLine], None]:
    """Give whatever has arrived, at most ``BATCH`` lines; the body is read on meanwhile, so far ahead and no further.

    At most about ``limit`` bytes wait, and as many are worked on: what does not fit stays in the socket.
    """
    waiting: asyncio.Queue[BulkLine | None] = asyncio.Queue(BATCH)
    room = asyncio.Event()
    room.set()
    held = 0

    async def fill() -> None:
        nonlocal held
        async for line in split_lines(body, limit):
            await room.wait()
            held += line.size
            if held >= limit:
                room.clear()
            await waiting.put(line)
        await waiting.put(None)

    filling = asyncio.create_task(fill())
    try:
        more = True
        while more:
            taken = [await waiting.get()]
            while len(taken) < BATCH and not waiting.empty():
                taken.append(waiting.get_nowait())
            more = None not in taken
            held -= sum(line.size for line in taken if line)
            room.set()
            if batch := [line for line in taken if line]:
                yield batch
    finally:
        filling.cancel()
        with suppress(asyncio.CancelledError):
            await filling


async def split_lines(body: AsyncIterator[bytes], limit: int) -> AsyncIterator[BulkLine]:
    """Split a body into lines; empty ones are counted and skipped. One that is too long is a line that cannot be read.

    The last line says why the body ended early, if it did.
    """
    number, kept, skipping = 1, bytearray(), False
    try:
        async for piece in body:
            *ended, rest = piece.split(b"\n")
            for part in ended:
                kept += part
                if skipping or len(kept) > limit:
                    yield BulkLine(number, _too_long(limit))
                elif kept.strip():
                    yield BulkLine(number, bytes(kept))
                number, kept, skipping = number + 1, bytearray(), False
            kept += rest
            if len(kept) > limit:
                kept, skipping = bytearray(), True
    except PkdError as error:
        yield BulkLine(number, error)
        return
    if skipping:
        yield BulkLine(number, _too_long(limit))
    elif kept.strip():
        yield BulkLine(number, bytes(kept))


def _too_long(limit: int) -> TooLarge:
    return TooLarge(f"the line is over {limit:,} bytes.", details={"limit": limit})
