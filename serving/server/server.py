"""Run one uvicorn process around a Service. It answers after its self-test and drains on SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import uvicorn

from pkd.serving.api.api_keys import ApiKeys
from pkd.serving.api.app import create_app
from pkd.serving.core.errors import ServingError
from pkd.serving.core.options import is_loopback
from pkd.serving.galleries.crypto import DecryptionError
from pkd.serving.galleries.store import GalleryStore
from pkd.serving.matching.service import Service
from pkd.serving.server.http_protocol import LimitedHttpProtocol
from pkd.toolkit.core.errors import BundleError, InputError, PkdError

if sys.platform != "win32":
    import fcntl
    import resource
    import termios

logger = logging.getLogger("pkd.serving")
KEEP_ALIVE_SECONDS = 75
"""Idle time of a kept connection; longer than common proxies', so that this side never closes under a request."""

FORCE_SECONDS = 3.0
"""Time after a drain, or after a second signal, in which threads must end; then the process does not wait for them."""
DESCRIPTOR_TICKS = 50
"""Ticks of a tenth of a second between two looks at how many file descriptors are left."""

GARBAGE = 10_000
"""Objects that may be new before Python looks for cycles among them; requests leave few."""


class Link:
    """Connect a worker process to its parent. A server that is alone has none, and this does nothing."""

    def ready(self, encoders: list[str]) -> None:
        """Report that the self-test is passed. ``encoders``: ids."""

    def may_serve(self) -> bool:
        """Tell whether connections may be taken: once every worker is ready."""
        return True

    def alive(self) -> None:
        """Report that the event loop turns; called ten times a second."""


def serve(
    service: Service,
    listener: socket.socket,
    keys: ApiKeys | None,
    ready: Callable[[], None],
    *,
    swept_store: GalleryStore | None = None,
    link: Link | None = None,
    page: bool = True,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is in progress. ``ready`` is called after the self-test.

    ``swept_store``: the store that this process, and no other, looks through for what has expired. ``link``: of a
    worker, which takes no connection before all workers may. ``page``: browsers find the page at /.
    Raises BundleError where a bundle does not reproduce its golden embeddings.
    """
    config = uvicorn.Config(
        create_app(service, keys, local=is_loopback(listener.getsockname()[0]), page=page),
        http=LimitedHttpProtocol,
        lifespan="on",
        ws="none",
        access_log=False,
        log_config=None,  # uvicorn's own would close the log handlers of every other library; ours is logs.py
        log_level="error",
        server_header=False,
        proxy_headers=False,  # who a client says it is decides nothing here
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=service.settings.drain_seconds,
    )
    _Server(config, service, keys, ready, swept_store, link).run(sockets=[listener])
    if service.state.failure:
        raise BundleError(service.state.failure)


def listen(host: str, port: int) -> socket.socket:
    """Bind a TCP socket. Raises InputError for an address that cannot be, PkdError for one that is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError):
        raise InputError(
            f"--host {host}: no such address. Give one of this machine's, for example 127.0.0.1."
        ) from None
    # Named as TCP, or asyncio leaves Nagle's algorithm on and every answer on a kept connection waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)  # a taken port shows here at the latest, before anything is announced
    except OSError as error:
        listener.close()
        raise PkdError(
            f"{host}:{port}: {error.strerror}. Choose another --port (0 picks a free one) or --host."
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return ``http://host:port`` of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        keys: ApiKeys | None,
        ready: Callable[[], None],
        swept_store: GalleryStore | None,
        link: Link | None,
    ) -> None:
        super().__init__(config)
        self._service, self._keys, self._ready, self._swept_store = service, keys, ready, swept_store
        self._link = link
        self._drained_by = 0.0
        self._descriptors_used_up = False
        self._tasks: list[asyncio.Task[None]] = []
        self._idle: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
        self._behind: dict[Any, tuple[int, float]] = {}
        """Connection → bytes that its client has yet to take, and the time since it is that many."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)
        if self._link is None:
            await super().startup(sockets)
            self._tasks.append(asyncio.create_task(self._announce()))
            return
        await self._announce()
        while not (self._link.may_serve() or self._service.state.draining or self.should_exit):
            await asyncio.sleep(0.01)
        self.should_exit |= self._service.state.draining
        if not self.should_exit:
            await super().startup(sockets)

    def _reload(self) -> None:
        """Read the keys again, if there are any; a signal that nobody takes would end the process."""
        if self._keys:
            self._keys.reload()

    async def _announce(self) -> None:
        await self._service.start()
        if self._service.state.failure:
            self.should_exit = True
            return
        self._service.state.metrics.ready.set(1)
        gc.collect()
        gc.freeze()  # what is here now stays: no collection needs to walk over it between two requests
        gc.set_threshold(GARBAGE)
        self._ready()
        if self._link:
            self._link.ready(list(self._service.encoders.loaded))
        if self._swept_store:
            self._tasks.append(asyncio.create_task(self._sweep(self._swept_store)))

    async def _sweep(self, store: GalleryStore) -> None:
        """Delete templates whose time is over, again and again. A store that is away now is tried again later."""
        while True:
            metrics = self._service.state.metrics
            try:
                await asyncio.to_thread(store.check)
                expired = await asyncio.to_thread(store.expire, time.time())
                metrics.galleries(await asyncio.to_thread(store.list), expired)
                metrics.store_up.set(1)
            except Exception as error:
                metrics.store_up.set(0)
                # What does not decrypt is told with its gallery's name, which is no matter for a log.
                plain = isinstance(error, ServingError) and not isinstance(error.__cause__, DecryptionError)
                why = str(error) if plain else type(error).__name__
                logger.error("retention: what has expired is not deleted, tried again later: %s", why)
            await asyncio.sleep(self._service.settings.sweep_seconds)

    async def on_tick(self, counter: int) -> bool:
        """Look after connections and a drain, ten times a second.

        A drain ends when nothing is in progress: until then /readyz can be asked why.
        """
        state = self._service.state
        state.metrics.fold()
        now = time.monotonic()
        if self._link:
            self._link.alive()
        if state.draining and (not state.metrics.in_progress or now >= self._drained_by):
            self.config.timeout_graceful_shutdown = max(1, round(self._drained_by - now))
            self.should_exit = True
        if counter % DESCRIPTOR_TICKS == 0:
            self._descriptors_used_up = warn_of_descriptors(self._descriptors_used_up)
        self._close_silent(now)
        self._drop_stalled(now)
        return await super().on_tick(counter)

    def _close_silent(self, now: float) -> None:
        """Close connections that began a request, or never did, and do not get on with its headers."""
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            kept = getattr(connection, "timeout_keep_alive_task", None)  # uvicorn itself has an eye on it
            if cycle is not None and (kept is not None or not cycle.response_complete):
                self._idle.pop(connection, None)
            elif now - self._idle.setdefault(connection, now) > self._service.settings.header_seconds:
                connection.transport.close()

    def _drop_stalled(self, now: float) -> None:
        """Drop connections whose clients take nothing of their answers for as long as a piece of a body may take.

        Otherwise an export would stay open in the store, and a drain would wait, for as long as such a client likes.
        """
        before, self._behind = self._behind, {}
        for connection in self.server_state.connections:
            if untaken := _untaken(connection.transport):
                known, since = before.get(connection, (untaken, now))
                self._behind[connection] = untaken, since if untaken == known else now
        for connection, (_, since) in self._behind.items():
            if now - since > self._service.settings.body_seconds:
                connection.transport.abort()  # a mere close waits until all is sent

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # the event loop does not end before what was written is sent, or given up

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, and do not wait at a second. Neither is raised again: draining is a clean end."""
        if self._link and sig == signal.SIGINT:
            return  # Ctrl-C reaches every process of a terminal; the parent passes it on as SIGTERM
        again, seconds = self._service.state.draining, self._service.settings.drain_seconds
        if again:
            self.force_exit = self.should_exit = True
        self._service.state.draining = True
        self._drained_by = time.monotonic() + seconds
        # A thread may never end, in a decoder or a runtime that nothing can interrupt. This one is not cancelled: the
        # interpreter waits for threads, too, after everything here is over.
        timer = threading.Timer(FORCE_SECONDS + (0 if again else seconds), _end_process)
        timer.daemon = True
        timer.start()


def _end_process() -> None:
    logger.error("a thread did not end: the process ends without it")
    os._exit(1)


def warn_of_descriptors(warned: bool) -> bool:
    """Log once that hardly any file descriptors are left: connections that find none are dropped without a word."""
    if sys.platform != "linux":
        return False
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - ten times as fast as Path.iterdir, on the event loop
    except OSError:  # not even one is left to look with
        used = limit
    if used > 0.9 * limit and not warned:
        logger.error("%d of %d file descriptors are used: further connections will fail. Raise ulimit -n.", used, limit)
    return used > (0.8 if warned else 0.9) * limit


def _untaken(transport: asyncio.WriteTransport) -> int:
    """Count the bytes that wait here and, if any do, those that wait in the system's socket.

    A socket of some megabytes takes nothing new for minutes while a slow client reads from it: only both together show
    that it does.
    """
    waiting = transport.get_write_buffer_size()
    if waiting and sys.platform == "linux":
        with suppress(OSError, ValueError):  # closed in this very moment: its number may be −1 then
            outgoing = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
            waiting += struct.unpack("i", outgoing)[0]
    return waiting
