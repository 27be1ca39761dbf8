"""Work in threads whose results are taken in order, with a bounded number of them waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Iterable[T], *, workers: int, ahead: int | None = None) -> Iterator[R]:
    """Map items in ``workers`` threads. At most ``ahead`` results (by default two a thread) are made before their turn.

    An error is raised at the turn of its item; then, or when the caller stops, what has not begun is not begun.
    """
    limit = ahead or 2 * workers
    with ThreadPoolExecutor(workers, thread_name_prefix="pkd") as pool:
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > limit:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
