"""Pool: the worker threads. Knows what waits and for how long, and which job its client has given up on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Any, TypeVar

from pkd.serving.metrics import Metrics

Made = TypeVar("Made")
_thread = threading.local()


class Job(Future[Made]):
    """A future that remembers that it was cancelled after it had begun."""

    abandoned = False

    def cancel(self) -> bool:
        """Keep it from beginning; once it has begun, ask it to stop where it waits for something."""
        self.abandoned = True
        return super().cancel()


class Pool(ThreadPoolExecutor):
    """A ThreadPoolExecutor whose jobs are ``Job``. One that was cancelled while it waited is never executed."""

    def __init__(self, threads: int, metrics: Metrics) -> None:
        super().__init__(threads, thread_name_prefix="pkd-worker")
        self._metrics = metrics

    def submit(self, work: Callable[..., Made], /, *args: Any, **options: Any) -> Job[Made]:
        """As of any executor."""
        job: Job[Made] = Job()
        self._metrics.waiting.inc()
        super().submit(self._begin, job, perf_counter(), work, args, options).add_done_callback(
            lambda begun: job.cancel() if begun.cancelled() else None
        )
        return job

    def _begin(self, job: Job[Made], since: float, work: Callable[..., Made], args: Any, options: Any) -> None:
        self._metrics.waiting.dec()
        if not job.set_running_or_notify_cancel():
            return
        self._metrics.waited.observe(perf_counter() - since)
        _thread.job = job
        try:
            job.set_result(work(*args, **options))
        except BaseException as error:
            job.set_exception(error)
        finally:
            _thread.job = None


def current_job() -> Job[Any] | None:
    """The job that the calling thread executes."""
    return getattr(_thread, "job", None)
