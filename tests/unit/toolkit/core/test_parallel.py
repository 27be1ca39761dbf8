"""in_order: order, bounded waiting, and errors at their turn."""

from __future__ import annotations

import threading
import time

import pytest

from pkd.toolkit.core.parallel import in_order


@pytest.mark.parametrize("workers", [1, 4])
def test_results_come_in_order_whatever_finishes_first(workers: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3 == 0))
        return item * item

    assert list(in_order(work, range(40), workers=workers)) == [i * i for i in range(40)]


def test_no_more_is_begun_than_was_allowed() -> None:
    begun: list[int] = []
    results = in_order(lambda item: begun.append(item) or item, iter(range(100)), workers=2, ahead=3)  # type: ignore[func-returns-value]
    assert next(results) == 0
    time.sleep(0.05)
    assert len(begun) <= 5
    results.close()  # type: ignore[attr-defined]
    assert len(begun) <= 5


def test_an_error_waits_for_its_turn_and_ends_the_work() -> None:
    begun = threading.Semaphore(0)

    def work(item: int) -> int:
        begun.release()
        if item == 3:
            raise ValueError("three")
        return item

    got = []
    with pytest.raises(ValueError, match="three"):
        for result in in_order(work, range(1000), workers=2):
            got.append(result)
    assert got == [0, 1, 2]
