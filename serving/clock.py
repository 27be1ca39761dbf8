"""Clock: work that may take so many seconds and can be stopped from outside, without a task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType


class Clock:
    """``with Clock(seconds, late) as clock:`` cancels what the calling task awaits in the block when the time is over.

    The block then ends with the exception ``late()``, or after ``clock.stop(why)`` with ``why``. What was done in that
    very moment stays done, and a task that somebody else cancels ends with ``CancelledError``. Like ``asyncio.timeout``
    of Python 3.11; ``asyncio.wait_for`` would start a task for every call.
    """

    def __init__(self, seconds: float | None, late: Callable[[], Exception]) -> None:
        """``seconds``: None for no limit."""
        self._seconds, self._late = seconds, late
        self._timer: asyncio.TimerHandle | None = None
        self._why: Exception | None = None

    def __enter__(self) -> Clock:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        if self._seconds is not None:
            self._timer = task.get_loop().call_later(max(self._seconds, 0.001), lambda: self.stop(self._late()))
        return self

    def stop(self, why: Exception) -> None:
        """Cancel the block; it ends with ``why``. The first reason counts."""
        if self._why is None:
            self._why = why
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._timer:
            self._timer.cancel()
        if self._why is None:
            return
        if hasattr(self._task, "uncancel"):  # since Python 3.11 a task counts who wants it cancelled
            self._task.uncancel()
        if kind is asyncio.CancelledError:
            raise self._why from None
