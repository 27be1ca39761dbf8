"""Work on a clock: late, stopped, done in time, cancelled by others, and one clock inside another."""

from __future__ import annotations

import asyncio

import pytest

from pkd.serving.clock import Clock


class Late(Exception):
    pass


class Inner(Exception):
    pass


def test_what_takes_too_long_ends_with_the_reason_and_the_task_goes_on():
    async def visit():
        with pytest.raises(Late), Clock(0.01, Late):
            await asyncio.sleep(20)
        await asyncio.sleep(0)  # no cancellation is left over
        return "on"

    assert asyncio.run(visit()) == "on"


@pytest.mark.parametrize("seconds", [None, 20])
def test_what_is_done_in_time_stays_done(seconds):
    async def visit():
        with Clock(seconds, Late):
            await asyncio.sleep(0)
        with pytest.raises(ValueError), Clock(seconds, Late):
            raise ValueError
        return len([task for task in asyncio.all_tasks() if task is not asyncio.current_task()])

    assert asyncio.run(visit()) == 0


def test_it_can_be_stopped_from_outside_and_the_first_reason_counts():
    async def visit():
        with pytest.raises(KeyError), Clock(20, Late) as clock:
            asyncio.get_running_loop().call_later(0.01, clock.stop, KeyError("first"))
            asyncio.get_running_loop().call_later(0.01, clock.stop, ValueError("second"))
            await asyncio.sleep(20)

    asyncio.run(visit())


def test_what_others_cancel_stays_cancelled():
    async def work():
        with Clock(20, Late):
            await asyncio.sleep(20)

    async def visit():
        task = asyncio.ensure_future(work())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(visit())


@pytest.mark.parametrize(("inner", "outer", "error"), [(0.01, 20, Inner), (20, 0.01, Late)])
def test_of_two_clocks_the_one_that_is_over_tells(inner, outer, error):
    async def visit():
        with pytest.raises(error), Clock(outer, Late), Clock(inner, Inner):
            await asyncio.sleep(20)
        await asyncio.sleep(0)

    asyncio.run(visit())


def test_no_time_at_all_still_takes_what_is_there():
    async def visit():
        there = asyncio.get_running_loop().create_future()
        there.set_result(3)
        with Clock(-1, Late):
            return await there

    assert asyncio.run(visit()) == 3
