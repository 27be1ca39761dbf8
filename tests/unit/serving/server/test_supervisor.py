"""The parent of several worker processes: whom it takes for silent. How they start and end: tests/e2e."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pkd.serving.server.config import Configuration
from pkd.serving.server.supervisor import SILENT_SECONDS, Parent, Worker, watch


class Process:
    """One that runs until it is killed, and stops the parent in its third turn."""

    def __init__(self) -> None:
        self.sentinel, self._end = multiprocessing.Pipe(duplex=False)
        self.killed = False
        self.parent: Any = None
        self.asked = 0

    def is_alive(self) -> bool:
        self.asked += 1
        self.parent.stops = self.asked >= 2 * 3
        return True

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def parent(tmp_path: Path) -> Any:
    made = Parent(Configuration(bundles=("bundle",), workers=2), SimpleNamespace(), tmp_path, quiet=True)  # type: ignore[arg-type]
    long_ago = time.monotonic() - 2 * SILENT_SECONDS
    for index in range(2):
        ours, theirs = multiprocessing.Pipe()
        process: Any = Process()
        process.parent = made
        made.workers[index] = Worker(index, process, ours, born=long_ago, ready=True, last_message=long_ago)  # type: ignore[arg-type]
        made.workers[index].theirs = theirs  # type: ignore[attr-defined]
    return made


def test_who_waited_for_the_others_is_not_silent(parent: Any) -> None:
    watch(parent, lambda: None)
    assert parent.serving
    for one in parent.workers.values():
        assert one.theirs.recv() == "go" and not one.process.killed


def test_who_says_nothing_any_more_is_killed(parent: Any) -> None:
    parent.serving = True
    parent.workers[0].theirs.send(("alive",))
    watch(parent, lambda: None)
    assert [one.process.killed for one in parent.workers.values()] == [False, True]
