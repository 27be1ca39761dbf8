"""CombiningQueue: what arrives while a batch runs is answered together, and changes take their turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from pkd.serving.galleries.index.combining_queue import CombiningQueue


class Slow:
    """Doubles numbers, once ``go`` is set; notes its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()

    def __call__(self, items: Sequence[int]) -> Sequence[int]:
        self.batches.append(list(items))
        assert self.go.wait(10)
        if -1 in items:
            raise ValueError("no")
        return [2 * item for item in items]


def started(*work: object) -> list[threading.Thread]:
    """Threads that arrive one after the other."""
    threads = []
    for one in work:
        threads.append(threading.Thread(target=one))  # type: ignore[arg-type]
        threads[-1].start()
        time.sleep(0.02)
    return threads


def test_those_who_wait_are_answered_together_and_each_with_their_own() -> None:
    slow = Slow()
    queue = CombiningQueue[int, int](slow, limit=4)
    answers: dict[int, Sequence[int]] = {}

    def ask(*items: int) -> None:
        answers[items[0]] = queue.do(items)

    threads = started(*(lambda items=items: ask(*items) for items in ((1,), (2,), (3, 4), (5,), (6,))))
    slow.go.set()
    for thread in threads:
        thread.join(10)
    assert slow.batches == [[1], [2, 3, 4, 5], [6]]
    assert answers == {1: [2], 2: [4], 3: [6, 8], 5: [10], 6: [12]}


def test_a_change_runs_alone_and_in_its_turn() -> None:
    slow = Slow()
    queue = CombiningQueue[int, int](slow)
    order: list[str] = []
    threads = started(
        lambda: queue.do([1]),
        lambda: queue.do([2]),
        lambda: queue.alone(lambda: order.append(f"change after {len(slow.batches)}")),
        lambda: queue.do([3]),
    )
    slow.go.set()
    for thread in threads:
        thread.join(10)
    assert slow.batches == [[1], [2], [3]]
    assert order == ["change after 2"]


def test_an_error_is_raised_to_those_who_asked_and_the_next_are_answered() -> None:
    slow = Slow()
    slow.go.set()
    queue = CombiningQueue[int, int](slow)
    with pytest.raises(ValueError, match="no"):
        queue.do([-1])
    with pytest.raises(ZeroDivisionError):
        queue.alone(lambda: print(1 // 0))
    assert queue.do([4]) == [8]


def test_steady_searching_does_not_keep_a_change_out() -> None:
    stop = threading.Event()
    searches: list[Any] = []

    def work(items: Sequence[int]) -> Sequence[int]:
        time.sleep(0.001)
        return items

    queue = CombiningQueue[int, int](work, limit=2)

    def search() -> None:
        while not stop.is_set():
            searches.extend(queue.do([1]))

    threads = [threading.Thread(target=search) for _ in range(6)]
    for thread in threads:
        thread.start()
    waited = []
    for _ in range(20):
        began = len(searches)
        queue.alone(lambda: None)
        waited.append(len(searches) - began)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert max(waited) <= 12  # those in line before it, and what was on its way
