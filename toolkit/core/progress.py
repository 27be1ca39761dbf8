"""Say how far long steps are: as bars on a terminal, elsewhere as plain lines.

A function that takes long takes a ``Progress`` and opens a step with it::

    def embed_all(faces: FaceSet, progress: Progress = no_progress) -> Embeddings:
        with progress("embedding", len(faces)) as advance:
            for chunk in chunks(faces):
                ...
                advance(len(chunk))

A command passes ``ConsoleProgress(console)``, a library that nobody watches ``no_progress``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import rich.progress
from rich.console import Console

FIRST_SECONDS = 2.0
"""Steps that end sooner say nothing where there is no terminal."""
LINE_SECONDS = 30.0
"""Time between two lines of one step where there is no terminal."""


class Advance(Protocol):
    """Report that ``done`` more items of a step are finished; ``note`` is shown beside their number."""

    def __call__(self, done: int, note: str = "", /) -> None:
        """Report."""


class Progress(Protocol):
    """Open a step: ``label`` in a few words, ``total`` items, or None where their number is not known.

    The step ends with the context. Steps may lie within one another; ``advance`` is called by one thread at a time.
    """

    def __call__(self, label: str, total: int | None = None, /) -> AbstractContextManager[Advance]:
        """Open a step."""


@contextmanager
def no_progress(label: str, total: int | None = None, /) -> Iterator[Advance]:
    """Say nothing: the ``Progress`` of a caller whom nobody watches."""
    yield lambda done, note="", /: None


class ConsoleProgress:
    """Show steps on a console: bars on a terminal, else a line after two seconds and about every 30 s; quiet: nothing.

    ``first``, ``every``: seconds until the first line and between lines.
    """

    def __init__(self, console: Console, *, first: float = FIRST_SECONDS, every: float = LINE_SECONDS) -> None:
        self._console = console
        self._first = first
        self._every = every
        self._bars: rich.progress.Progress | None = None

    def __call__(self, label: str, total: int | None = None, /) -> AbstractContextManager[Advance]:
        """Open a step."""
        if self._console.quiet:
            return no_progress(label, total)
        return self._bar(label, total) if self._console.is_terminal else self._lines(label, total)

    @contextmanager
    def _bar(self, label: str, total: int | None) -> Iterator[Advance]:
        outer, bars = self._bars, self._bars
        if bars is None:
            bars = self._bars = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[note]}", markup=False),
                rich.progress.TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            bars.start()
        task = bars.add_task(label, total=total, note="")

        def advance(done: int, note: str = "", /) -> None:
            bars.update(task, advance=done, note=note)

        try:
            yield advance
        finally:
            bars.remove_task(task)
            if outer is None:
                bars.stop()
                self._bars = None

    @contextmanager
    def _lines(self, label: str, total: int | None) -> Iterator[Advance]:
        start = time.monotonic()
        finished, last_note = 0, ""
        said, ended = threading.Event(), threading.Event()

        def advance(done: int, note: str = "", /) -> None:
            nonlocal finished, last_note
            finished += done
            last_note = note

        def count() -> str:
            return f"{finished:,}" + (f" of {total:,}" if total is not None else "")

        def speak() -> None:
            wait = self._first
            while not ended.wait(wait):
                said.set()
                seconds = time.monotonic() - start
                left = f", {seconds * (total - finished) / finished:.0f} s left" if total and finished else ""
                where = f": {count()}{left}" if total or finished else f": {seconds:.0f} s"
                self._say(f"{label}{where}{f', {last_note}' if last_note else ''}")
                wait = self._every

        speaker = threading.Thread(target=speak, name="progress", daemon=True)
        speaker.start()
        try:
            yield advance
        finally:
            ended.set()
            speaker.join()
        if said.is_set():
            self._say(f"{label}: {f'{count()} in ' if finished else ''}{time.monotonic() - start:.0f} s")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)
