"""Run jobs in worker threads; know what waits and for how long, and which job its client has given up on."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from time import perf_counter
from traceback import clear_frames
from typing import Any, TypeVar

from pkd.serving.observability.metrics import Metrics

Made = TypeVar("Made")
_Submitted = tuple["Job[Any]", float, Callable[[], Any]]
"""A job, the time at which it was submitted, and the call to make."""
_thread = threading.local()
owner: ContextVar[str] = ContextVar("owner", default="")
"""Owner of a job, the name of an API key: owners take turns."""


class Job(asyncio.Future[Made]):
    """Let the event loop await a call in a thread; remembers that it was cancelled, before or after it had begun."""

    abandoned = False

    def __init__(self, forget: Callable[[Job[Any]], None]) -> None:
        """Await nothing yet. ``forget``: called when it is cancelled."""
        super().__init__(loop=asyncio.get_running_loop())
        self._forget = forget

    def cancel(self, msg: Any | None = None) -> bool:
        """Keep it from beginning; once it has begun, ask it to stop where it waits for something."""
        self.abandoned = True
        if not self.done():
            self._forget(self)
        elif not self.cancelled():
            self.exception()  # or asyncio would complain that nobody has asked for it
        return super().cancel(msg)


class Pool:
    """Keep threads that make the calls an event loop submits.

    A job that was cancelled while it waited is never executed.

    Of the idle threads the one that was busy last gets the next job: its processor still holds what it worked with.
    The threads of a ThreadPoolExecutor take turns (docs/performance.md has the difference).
    """

    def __init__(self, threads: int, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._waiting: dict[str, deque[_Submitted]] = {}
        """Owner → what waits for it, in the order in which owners are served."""
        self._closing = False
        self._workers = [_Worker(f"pkd-worker {number}", self._take, metrics) for number in range(threads)]

    def submit(self, work: Callable[[], Made]) -> Job[Made]:
        """Call ``work`` in a worker thread; await the job for what it returns or raises."""
        job: Job[Made] = Job(self._forget)
        taken = job, perf_counter(), work
        with self._lock:
            if self._closing:
                raise RuntimeError("the pool is closed")
            worker = self._idle.pop() if self._idle else None
            if worker is None:
                self._waiting.setdefault(owner.get(), deque()).append(taken)
                self._count()
        if worker:
            worker.give(taken)
        return job

    def close(self) -> None:
        """Cancel what waits, let what has begun finish, end the threads."""
        with self._lock:
            self._closing = True
            waiting = [taken for queue in self._waiting.values() for taken in queue]
            idle = list(self._idle)
            self._idle.clear()
        for job, _, _ in waiting:
            job.cancel()
        for worker in idle:
            worker.give(None)
        for worker in self._workers:
            worker.thread.join()

    def _forget(self, job: Job[Any]) -> None:
        """Let go of a job that waits, and of the image that it holds."""
        with self._lock:
            for name, queue in list(self._waiting.items()):
                kept = deque(taken for taken in queue if taken[0] is not job)
                if kept:
                    self._waiting[name] = kept
                else:
                    del self._waiting[name]
            self._count()

    def _count(self) -> None:
        self._metrics.waiting = sum(map(len, self._waiting.values()))

    def _take(self, worker: _Worker) -> _Submitted | None:
        """Return the next job for ``worker``, which may wait for it; None: there will be none."""
        with self._lock:
            if self._waiting:
                name = next(iter(self._waiting))
                queue = self._waiting.pop(name)
                taken = queue.popleft()
                if queue:
                    self._waiting[name] = queue  # behind all others
                self._count()
                return taken
            if self._closing:
                return None
            self._idle.append(worker)
        return worker.wait()


class _Worker:
    """Run one thread, and hold the job that it is given while it is idle."""

    def __init__(self, name: str, take: Callable[[_Worker], _Submitted | None], metrics: Metrics) -> None:
        self._take, self._metrics = take, metrics
        self._given: _Submitted | None = None
        self._wake = threading.Lock()
        self._wake.acquire()
        self.thread = threading.Thread(target=self._work, name=name, daemon=True)
        self.thread.start()

    def give(self, taken: _Submitted | None) -> None:
        """End ``wait`` with this."""
        self._given = taken
        self._wake.release()

    def wait(self) -> _Submitted | None:
        """Wait for what is given next."""
        self._wake.acquire()
        taken, self._given = self._given, None
        return taken

    def _work(self) -> None:
        while taken := self._take(self):
            job, since, work = taken
            if job.abandoned:
                continue
            self._metrics.waited(perf_counter() - since)
            _thread.job = job
            try:
                made, error = work(), None
            except BaseException as raised:
                made, error = None, forget_locals(raised)
            _thread.job = None
            with suppress(RuntimeError):  # the loop was closed: nobody is left to tell
                job.get_loop().call_soon_threadsafe(_end, job, made, error)
            del taken, job, work, made, error  # an image is not kept until the next one comes


def forget_locals(error: BaseException) -> BaseException:
    """Let go of what the frames of an error's traceback hold, pixels above all; lines and names stay for the log.

    An error that crosses to another thread is remembered there, by a future and by frames that hold that future: such
    a circle would keep a photograph's pixels until Python looks for circles, which a busy server rarely does.
    """
    one: BaseException | None = error
    while one is not None:
        clear_frames(one.__traceback__)
        one = one.__cause__ or one.__context__
    return error


def current_job() -> Job[Any] | None:
    """Return the job that the calling thread executes."""
    return getattr(_thread, "job", None)


def _end(job: Job[Any], made: Any, error: BaseException | None) -> None:
    if job.done():  # cancelled meanwhile
        return
    if error is None:
        job.set_result(made)
    else:
        job.set_exception(error)
