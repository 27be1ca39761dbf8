"""Drain: threads that ask at the same time are answered together, by whichever of them comes first.

Nobody waits for a batch to fill: a lone request starts at once, and what arrives while it runs is the next batch.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class _Ticket(Generic[T, R]):
    def __init__(self, item: T | None, alone: Callable[[], None] | None = None) -> None:
        self.item, self.alone = item, alone
        self.done = False
        self.result: R | None = None
        self.error: BaseException | None = None


class Drain(Generic[T, R]):
    """One batch at a time, in the order of arrival, in the thread of someone who waits for it."""

    def __init__(self, work: Callable[[Sequence[T]], Sequence[R]], limit: int = 32) -> None:
        """``work`` answers up to ``limit`` items at once."""
        self._work, self._limit = work, limit
        self._waiting: deque[_Ticket[T, R]] = deque()
        self._lane = threading.Lock()

    def do(self, items: Sequence[T]) -> list[R]:
        """Answer items, together with those of others that wait."""
        tickets: list[_Ticket[T, R]] = [_Ticket(item) for item in items]
        self._waiting.extend(tickets)
        return [self._wait(ticket) for ticket in tickets]  # type: ignore[misc]

    def alone(self, change: Callable[[], None]) -> None:
        """Run ``change`` while no batch runs. It takes its turn, so that steady searching cannot keep it out."""
        ticket: _Ticket[T, R] = _Ticket(None, change)
        self._waiting.append(ticket)
        self._wait(ticket)

    def _wait(self, ticket: _Ticket[T, R]) -> R | None:
        while not ticket.done:
            with self._lane:
                if not ticket.done:
                    self._turn()
        if ticket.error:
            raise ticket.error
        return ticket.result

    def _turn(self) -> None:
        """The next batch: one change, or all searches up to the next change."""
        batch: list[_Ticket[T, R]] = []
        while self._waiting and len(batch) < self._limit and not (batch and self._waiting[0].alone):
            batch.append(self._waiting.popleft())
            if batch[0].alone:
                break
        try:
            if batch[0].alone:
                batch[0].alone()
            else:
                items = [ticket.item for ticket in batch]
                for ticket, result in zip(batch, self._work(items), strict=True):  # type: ignore[arg-type]
                    ticket.result = result
        except BaseException as error:
            for ticket in batch:
                ticket.error = error
        for ticket in batch:
            ticket.done = True
