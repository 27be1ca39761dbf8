"""A combining queue: threads that ask at the same time are answered together, by one of them.

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
    """Hold what one thread waits for: answers to items, or that a change was made."""

    def __init__(self, items: Sequence[T], change: Callable[[], None] | None = None) -> None:
        self.items, self.change = items, change
        self.called = threading.Event()
        """Set when it is done, or when its thread is to run the next batches."""
        self.done = False
        self.results: Sequence[R] = ()
        self.error: BaseException | None = None


class CombiningQueue(Generic[T, R]):
    """Run one batch at a time, in the order of arrival, in the thread of someone who waits for it."""

    def __init__(self, work: Callable[[Sequence[T]], Sequence[R]], limit: int = 32) -> None:
        """Begin empty. ``work`` answers several items; ``limit``: no further request joins a batch of that many."""
        self._work, self._limit = work, limit
        self._waiting: deque[_Ticket[T, R]] = deque()
        self._mutex = threading.Lock()
        self._running = False

    def do(self, items: Sequence[T]) -> Sequence[R]:
        """Answer items, together with those of others that wait."""
        return self._through(_Ticket(items))

    def alone(self, change: Callable[[], None]) -> None:
        """Run ``change`` while no batch runs. It takes its turn, so that steady searching cannot keep it out."""
        self._through(_Ticket((), change))

    def _through(self, ticket: _Ticket[T, R]) -> Sequence[R]:
        with self._mutex:
            self._waiting.append(ticket)
            leads, self._running = not self._running, True
        if not leads:
            ticket.called.wait()
        if not ticket.done:
            while not ticket.done:
                self._turn()
            with self._mutex:
                if self._waiting:
                    self._waiting[0].called.set()  # leads from here on
                else:
                    self._running = False
        if ticket.error:
            raise ticket.error
        return ticket.results

    def _turn(self) -> None:
        """Run the next batch: one change, or all that is asked up to the next change."""
        batch = [self._waiting.popleft()]
        if batch[0].change is None:
            while (
                self._waiting
                and self._waiting[0].change is None
                and sum(len(ticket.items) for ticket in batch) < self._limit
            ):
                batch.append(self._waiting.popleft())
        try:
            if batch[0].change:
                batch[0].change()
            else:
                results = self._work([item for ticket in batch for item in ticket.items])
                for ticket in batch:
                    ticket.results, results = results[: len(ticket.items)], results[len(ticket.items) :]
        except BaseException as error:
            for ticket in batch:
                ticket.error = error
        for ticket in batch:
            ticket.done = True
            ticket.called.set()
