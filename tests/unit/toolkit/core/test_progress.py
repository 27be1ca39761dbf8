"""Progress: silent where nobody reads, lines without a terminal, bars on one."""

from __future__ import annotations

import io
import re
import threading
import time

from rich.console import Console

from pkd.toolkit.core.progress import ConsoleProgress, Progress, no_progress


def wait_for(text: str, shown: io.StringIO) -> None:
    until = time.monotonic() + 10
    while not re.search(text, shown.getvalue()):
        assert time.monotonic() < until, f"{text!r} does not come: {shown.getvalue()!r}"
        time.sleep(0.005)


def test_without_a_terminal_a_long_step_says_where_it_is_and_when_it_ends() -> None:
    shown = io.StringIO()
    progress: Progress = ConsoleProgress(Console(file=shown, width=40), first=0.01, every=0.02)
    with progress("embedding with [student]", 5000) as advance:
        wait_for(r"embedding with \[student\]: 0 of 5,000\n", shown)  # before anything is done
        advance(1200, "loss 2.3")
        wait_for(r"embedding with \[student\]: 1,200 of 5,000, \d+ s left, loss 2\.3\n", shown)
        advance(3800)
    assert re.search(r"embedding with \[student\]: 5,000 of 5,000 in \d+ s\n$", shown.getvalue())


def test_a_step_of_unknown_length_says_its_seconds() -> None:
    shown = io.StringIO()
    with ConsoleProgress(Console(file=shown), first=0.01, every=0.02)("building"):
        wait_for(r"building: \d+ s\nbuilding: \d+ s\n", shown)


def test_a_short_step_says_nothing_without_a_terminal() -> None:
    shown = io.StringIO()
    before = threading.active_count()
    with ConsoleProgress(Console(file=shown))("aligning", 3) as advance:
        advance(3)
    assert shown.getvalue() == "" and threading.active_count() == before


def test_a_step_that_fails_ends_with_its_error() -> None:
    shown = io.StringIO()
    try:
        with ConsoleProgress(Console(file=shown), first=0.01, every=9)("aligning", 3):
            wait_for("aligning", shown)
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert shown.getvalue() == "aligning: 0 of 3\n"


def test_a_quiet_console_and_no_progress_say_nothing() -> None:
    shown = io.StringIO()
    quiet: Progress = ConsoleProgress(Console(file=shown, quiet=True), first=0, every=0.001)
    for progress in (quiet, no_progress):
        with progress("aligning", 3) as advance:
            time.sleep(0.01)
            advance(1, "note")
    assert shown.getvalue() == ""


def test_steps_lie_within_one_another_on_a_terminal() -> None:
    shown = io.StringIO()
    progress = ConsoleProgress(Console(file=shown, force_terminal=True, width=100))
    with progress("outer", 2) as outer:
        with progress("inner [x]", 1) as inner:
            inner(1, "nearly")
            wait_for("nearly", shown)
        outer(1)
    assert "outer" in shown.getvalue() and "inner [x]" in shown.getvalue()
    with progress("again", 1):  # the display of the first steps was closed
        wait_for("again", shown)
