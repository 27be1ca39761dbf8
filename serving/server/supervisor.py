"""Run several worker processes behind one listening socket: start, watch, replace and stop them.

The parent opens no encoder and no gallery. A worker that dies is replaced, later and later the more often that happens.
Nothing is accepted before all of them are ready; then one that is replaced joins when it is.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from pkd.serving.observability import logs
from pkd.serving.observability.metrics import SHARED
from pkd.serving.server.config import Configuration
from pkd.toolkit.core.errors import GateFailed, InputError, PkdError, TargetUnavailable

logger = logging.getLogger("pkd.serving")
SILENT_SECONDS = 30.0
"""Time after which a worker whose event loop does not turn is killed and replaced."""
CALM_SECONDS = 60.0
"""Life after which a worker has not failed at its start: the next wait is short again."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Waits before a worker is replaced, seconds; doubled each time."""
BY_EXIT_CODE: dict[int, type[PkdError]] = {2: InputError, 3: TargetUnavailable, 4: GateFailed}


class PipeLink:
    """Speak for a worker through its pipe, as ``server.Link``."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._go = threading.Event()
        self._last_alive = 0.0
        threading.Thread(target=self._receive, daemon=True, name="pkd-parent").start()

    def ready(self, encoders: list[str]) -> None:
        """Report that the self-test is passed."""
        self._send(("ready", encoders))

    def may_serve(self) -> bool:
        """Tell whether all workers are ready."""
        return self._go.is_set()

    def alive(self) -> None:
        """Report that the event loop turns, once a second."""
        if time.monotonic() - self._last_alive > 1:
            self._last_alive = time.monotonic()
            self._send(("alive",))

    def failed(self, error: PkdError) -> None:
        """Report that this worker cannot start, and another one could not either."""
        self._send(("failed", str(error), error.exit_code))

    def _send(self, message: object) -> None:
        with suppress(OSError):  # the parent is gone, which the other direction notices
            self._pipe.send(message)

    def _receive(self) -> None:
        with suppress(EOFError, OSError):
            while self._pipe.recv() == "go":
                self._go.set()
        os.kill(os.getpid(), signal.SIGTERM)  # without a parent nobody would ever stop it


@dataclass
class Worker:
    """Hold one worker process, and what it has said."""

    index: int
    process: SpawnProcess
    pipe: Connection
    born: float
    ready: bool = False
    last_message: float = 0.0
    failure: tuple[str, int] | None = None


@dataclass
class Parent:
    """Hold the workers that there are, and those that are to be replaced."""

    configuration: Configuration
    listener: socket.socket
    folder: Path
    quiet: bool
    workers: dict[int, Worker] = field(default_factory=dict)
    due: dict[int, float] = field(default_factory=dict)
    """Index of a worker that is to be replaced → the time for it."""
    waits: dict[int, float] = field(default_factory=dict)
    serving: bool = False
    encoders: list[str] = field(default_factory=list)
    stops: int = 0
    """Number of signals to stop so far."""
    reload: bool = False

    def start(self, index: int) -> None:
        """Start a worker."""
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (self.configuration, self.listener, index, theirs, self.folder, self.quiet or self.serving)
        process = context.Process(target=_work, args=arguments, name=f"pkd-serve {index}", daemon=False)
        process.start()
        theirs.close()
        self.workers[index] = Worker(index, process, ours, time.monotonic())

    def receive(self, worker: Worker) -> None:
        """Take in what a worker has sent."""
        with suppress(EOFError, OSError):
            while worker.pipe.poll():
                message: Any = worker.pipe.recv()
                worker.last_message = time.monotonic()
                if message[0] == "ready":
                    worker.ready, self.encoders = True, message[1]
                elif message[0] == "failed":
                    worker.failure = message[1:]

    def reap(self, worker: Worker) -> None:
        """Clear up after a dead worker: drop its gauges, keep its counts, and have a successor started."""
        from prometheus_client.multiprocess import mark_process_dead

        worker.process.join()
        self.receive(worker)
        worker.pipe.close()
        mark_process_dead(worker.process.pid, str(self.folder))  # type: ignore[no-untyped-call]
        del self.workers[worker.index]
        if self.stops:
            return
        code = worker.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        said = f"worker {worker.index} (process {worker.process.pid}) {how}"
        message, exit_code = worker.failure or (f"{said} before it was ready.", 1)
        if not self.serving:
            raise BY_EXIT_CODE.get(exit_code, PkdError)(message)
        calm = time.monotonic() - worker.born > CALM_SECONDS
        pause = FIRST_WAIT if calm else self.waits.get(worker.index, FIRST_WAIT)
        self.waits[worker.index] = min(2 * pause, LONGEST_WAIT)
        self.due[worker.index] = time.monotonic() + pause
        reason = f": {worker.failure[0]}" if worker.failure else ""
        logger.error("%s%s; another one starts in %g s", said, reason, pause)

    def signal_all(self, number: int) -> None:
        """Send a signal to every worker."""
        for worker in self.workers.values():
            # One that is not ready has not set its handlers yet: SIGHUP would end it, and it reads the keys anyway.
            if worker.process.pid and (worker.ready or number != signal.SIGHUP):
                with suppress(ProcessLookupError):
                    os.kill(worker.process.pid, number)


def supervise(
    configuration: Configuration, listener: socket.socket, ready: Callable[[], None], *, quiet: bool = False
) -> list[str]:
    """Serve with ``configuration.workers`` processes until SIGTERM or SIGINT. ``ready``: called when all of them are.

    SIGHUP has them read their keys again, if they have any. A second signal to stop does not wait. Returns the ids of
    the encoders; raises what keeps a worker from starting.
    """
    logs.set_up(configuration.log, configuration.log_requests)
    with TemporaryDirectory(prefix="pkd-serve-") as folder:
        os.environ[SHARED] = folder
        parent = Parent(configuration, listener, Path(folder), quiet)
        with _signals(parent):
            try:
                for index in range(configuration.workers):
                    parent.start(index)
                watch(parent, ready)
            finally:
                del os.environ[SHARED]
                _end(parent)
    return parent.encoders


def watch(parent: Parent, ready: Callable[[], None]) -> None:
    """Replace workers that die or fall silent until the parent is told to stop. ``ready``: called when all are."""
    while not parent.stops:
        _poll(parent)
        now = time.monotonic()
        for worker in list(parent.workers.values()):
            if parent.serving and worker.ready and now - worker.last_message > SILENT_SECONDS:
                logger.error("worker %d has been silent for %g s and is killed", worker.index, SILENT_SECONDS)
                worker.process.kill()
        for index in [index for index, when in parent.due.items() if now >= when]:
            del parent.due[index]
            parent.start(index)
        if parent.reload:
            parent.reload = False
            parent.signal_all(signal.SIGHUP)
        if not parent.serving and all(worker.ready for worker in parent.workers.values()):
            parent.serving = True
            for worker in parent.workers.values():
                _go(worker)
            ready()


def _poll(parent: Parent) -> None:
    """Wait a little for messages or ends of workers, and handle them."""
    watched: list[Any] = [worker.process.sentinel for worker in parent.workers.values()]
    watched += [worker.pipe for worker in parent.workers.values() if worker.process.is_alive()]
    wait(watched, timeout=0.1)
    for worker in list(parent.workers.values()):
        was = worker.ready
        parent.receive(worker)
        if parent.serving and worker.ready and not was:
            _go(worker)
        if not worker.process.is_alive():
            parent.reap(worker)


def _end(parent: Parent) -> None:
    """Drain: SIGTERM to all, once more for every further signal, and SIGKILL when their time is over."""
    sent, parent.stops = 0, max(1, parent.stops)
    parent.listener.close()
    over = time.monotonic() + parent.configuration.settings.drain_seconds + 5
    while parent.workers:
        if sent < parent.stops:
            sent += 1
            parent.signal_all(signal.SIGTERM)
        if time.monotonic() > over:
            parent.signal_all(signal.SIGKILL)
        _poll(parent)


def _go(worker: Worker) -> None:
    worker.last_message = time.monotonic()  # until now it had nothing to say: others may have taken long to be ready
    with suppress(OSError):
        worker.pipe.send("go")


@contextmanager
def _signals(parent: Parent) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        parent.stops += 1

    def reload(number: int, frame: FrameType | None) -> None:
        parent.reload = True

    handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: reload}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _work(
    configuration: Configuration, listener: socket.socket, index: int, pipe: Connection, folder: Path, quiet: bool
) -> None:
    """Run a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server has a handler: a terminal's reaches everyone
    link = PipeLink(pipe)
    try:
        from pkd.serving.server.process import run_worker

        run_worker(configuration, listener, index, link, folder, quiet)  # type: ignore[arg-type]
    except PkdError as error:
        link.failed(error)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        logs.log_unforeseen("start of a worker", error)
        raise SystemExit(1) from None
