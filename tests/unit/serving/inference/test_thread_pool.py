"""The worker threads: what they make and raise comes back; what nobody wants any more is not done."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from pkd.serving.inference.thread_pool import Pool, current_job, owner
from pkd.serving.observability.metrics import Metrics


@pytest.fixture
def metrics() -> Any:
    return Metrics()


@pytest.fixture
def pool(metrics: Any) -> Iterator[Any]:
    pool = Pool(1, metrics)
    yield pool
    pool.close()


def test_what_a_job_returns_or_raises_is_awaited(pool: Any) -> None:
    async def visit() -> None:
        assert await pool.submit(lambda: threading.current_thread().name) == "pkd-worker 0"
        with pytest.raises(ValueError, match="seven"):
            await pool.submit(partial(fail, ValueError("seven")))
        job = pool.submit(current_job)
        assert await job is job

    asyncio.run(visit())
    assert current_job() is None


def test_jobs_of_one_thread_keep_their_order_and_threads_share_them(metrics: Any) -> None:
    async def visit(pool: Any) -> Any:
        return await asyncio.gather(*(pool.submit(partial(lambda n: n, n)) for n in range(200)))

    for threads in (1, 7):
        pool = Pool(threads, metrics)
        assert asyncio.run(visit(pool)) == list(range(200))
        pool.close()
    assert b"pkd_queue_seconds_count 400.0" in metrics.page()


def test_what_was_cancelled_while_it_waited_is_never_executed(pool: Any, metrics: Any) -> None:
    gate = threading.Event()
    ran: list[Any] = []

    async def visit() -> None:
        busy = pool.submit(partial(gate.wait, 20))
        until(lambda: b"pkd_queue_depth 0.0" in metrics.page())
        kept, dropped = (pool.submit(partial(ran.append, name)) for name in ("kept", "dropped"))
        assert b"pkd_queue_depth 2.0" in metrics.page()
        image = weakref.ref(held := np.zeros(10))
        late = pool.submit(partial(ran.append, held))
        del held
        assert dropped.cancel() and dropped.abandoned and late.cancel()
        assert b"pkd_queue_depth 1.0" in metrics.page() and image() is None
        gate.set()
        assert await busy
        await kept

    asyncio.run(visit())
    until(lambda: b"pkd_queue_depth 0.0" in metrics.page())
    assert ran == ["kept"]
    assert b"pkd_queue_seconds_count 2.0" in metrics.page()


def test_a_job_that_has_begun_can_see_that_nobody_waits(pool: Any) -> None:
    begun, seen = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        until(lambda: current_job().abandoned)  # type: ignore[union-attr]
        seen.set()
        raise ValueError("told to nobody")

    async def visit() -> None:
        task = asyncio.ensure_future(pool.submit(work))
        await asyncio.to_thread(begun.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await pool.submit(lambda: 5) == 5

    asyncio.run(visit())
    assert seen.is_set()


def test_a_pool_that_closes_cancels_what_waits_and_finishes_what_runs(metrics: Any) -> None:
    gate, pool = threading.Event(), Pool(1, metrics)

    async def visit() -> None:
        busy, late = pool.submit(partial(gate.wait, 20)), pool.submit(print)
        until(lambda: b"pkd_queue_depth 1.0" in metrics.page())
        threading.Timer(0.05, gate.set).start()
        pool.close()
        assert late.cancelled()
        assert await busy

    asyncio.run(visit())
    assert b"pkd_queue_depth 0.0" in metrics.page()


def test_a_closed_pool_takes_nothing(metrics: Any) -> None:
    async def visit() -> None:
        with pytest.raises(RuntimeError):
            pool.submit(print)  # type: ignore[attr-defined]

    pool = Pool(1, metrics)
    pool.close()
    asyncio.run(visit())


def test_a_job_outlives_its_event_loop(pool: Any) -> None:
    gate = threading.Event()

    async def leave() -> None:
        pool.submit(partial(gate.wait, 20))

    async def visit() -> Any:
        return await pool.submit(lambda: 5)

    asyncio.run(leave())
    gate.set()  # its loop is closed
    assert asyncio.run(visit()) == 5


def test_a_failure_that_is_dropped_on_purpose_is_no_news(pool: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def visit() -> None:
        job = pool.submit(partial(fail, ValueError("dropped")))
        await pool.submit(lambda: None)
        await asyncio.sleep(0)
        assert not job.cancel() and job.done()

    with caplog.at_level(logging.ERROR):
        asyncio.run(visit())
        gc.collect()
    assert not caplog.records


def fail(error: Any) -> None:
    raise error


def until(true: Any) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_owners_take_turns(pool: Any, metrics: Any) -> None:
    """Whoever submits many jobs does not keep another one's few waiting until all of them are done."""
    gate = threading.Event()
    done: list[Any] = []

    async def visit() -> None:
        busy = pool.submit(partial(gate.wait, 20))
        until(lambda: b"pkd_queue_depth 0.0" in metrics.page())
        jobs = []
        for name, count in (("many", 5), ("few", 2), ("one", 1)):
            owner.set(name)
            jobs += [pool.submit(partial(done.append, f"{name} {number}")) for number in range(count)]
        assert b"pkd_queue_depth 8.0" in metrics.page()
        jobs.pop(1).cancel()
        gate.set()
        await busy
        await asyncio.gather(*jobs)

    asyncio.run(visit())
    assert done == ["many 0", "few 0", "one 0", "many 2", "few 1", "many 3", "many 4"]
