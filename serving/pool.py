"""Pool: the worker threads. Knows what waits and for how long, and which job its client has given up on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any, TypeVar

from pkd.serving.metrics import Metrics

Made = TypeVar("Made")
_thread = threading.local()


class Job(asyncio.Future[Made]):
    """What the event loop awaits. Remembers that it was cancelled, before or after it had begun."""

    abandoned = False

    def cancel(self, msg: Any | None = None) -> bool:
        """Keep it from beginning; once it has begun, ask it to stop where it waits for something."""
        self.abandoned = True
        if self.done() and not self.cancelled():
            self.exception()  # or asyncio would complain that nobody has asked for it
        return super().cancel(msg)


class Pool:
    """Threads that do what an event loop submits. A job that was cancelled while it waited is never executed.

    A ThreadPoolExecutor does this too, through three futures and five locks a job.
    """

    def __init__(self, threads: int, metrics: Metrics) -> None:
        self._metrics = metrics
        self._waiting: SimpleQueue[tuple[Job[Any], float, Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"pkd-worker {number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], Made]) -> Job[Made]:
        """Call ``work`` in a worker thread; await the job for what it returns or raises."""
        job: Job[Made] = Job(loop=asyncio.get_running_loop())
        self._metrics.waiting.inc()
        self._waiting.put((job, perf_counter(), work))
        return job

    def close(self) -> None:
        """Cancel what waits, let what has begun finish, end the threads."""
        with suppress(Empty):
            while True:
                if waiting := self._waiting.get_nowait():
                    self._metrics.waiting.dec()
                    waiting[0].cancel()
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while taken := self._waiting.get():
            job, since, work = taken
            self._metrics.waiting.dec()
            if job.abandoned:
                continue
            self._metrics.waited.observe(perf_counter() - since)
            _thread.job = job
            try:
                made, error = work(), None
            except BaseException as raised:
                made, error = None, raised
            _thread.job = None
            with suppress(RuntimeError):  # the loop was closed: nobody is left to tell
                job.get_loop().call_soon_threadsafe(_end, job, made, error)
            del taken, job, work, made, error  # an image is not kept until the next one comes


def current_job() -> Job[Any] | None:
    """The job that the calling thread executes."""
    return getattr(_thread, "job", None)


def _end(job: Job[Any], made: Any, error: BaseException | None) -> None:
    if job.done():  # cancelled meanwhile
        return
    if error is None:
        job.set_result(made)
    else:
        job.set_exception(error)
