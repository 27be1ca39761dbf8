"""The parent of several worker processes: whom it takes for silent. How they start and end: tests/e2e."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pkd.serving.server import supervisor
from pkd.serving.server.config import Configuration


class Process:
    """One that runs until it is killed."""

    def __init__(self) -> None:
        self.sentinel, self._end = multiprocessing.Pipe(duplex=False)
        self.killed = False

    def is_alive(self) -> bool:
        return True

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def parent(tmp_path: Path) -> Any:
    made = supervisor._Parent(Configuration(bundles=("bundle",), workers=2), SimpleNamespace(), tmp_path, quiet=True)  # type: ignore[arg-type]
    long_ago = time.monotonic() - 2 * supervisor.SILENT_SECONDS
    for index in range(2):
        ours, theirs = multiprocessing.Pipe()
        made.workers[index] = supervisor._Worker(
            index,
            Process(),  # type: ignore[arg-type]
            ours,
            born=long_ago,
            ready=True,
            last_message=long_ago,  # type: ignore[arg-type]
        )
        made.workers[index].theirs = theirs  # type: ignore[attr-defined]
    return made


def watch(parent: Any, turns: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many turns of the parent's loop."""
    left = iter(range(turns))
    real = supervisor._poll

    def turn(parent: Any) -> None:
        real(parent)
        parent.stops = next(left) == turns - 1

    monkeypatch.setattr(supervisor, "_poll", turn)
    supervisor._watch(parent, lambda: None)


def test_who_waited_for_the_others_is_not_silent(parent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watch(parent, 3, monkeypatch)
    assert parent.serving
    for one in parent.workers.values():
        assert one.theirs.recv() == "go" and not one.process.killed


def test_who_says_nothing_any_more_is_killed(parent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parent.serving = True
    parent.workers[0].theirs.send(("alive",))
    watch(parent, 2, monkeypatch)
    assert [one.process.killed for one in parent.workers.values()] == [False, True]
