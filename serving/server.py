"""Server: one uvicorn process around a Service. Answers after its self-test, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from pkd.serving.app import create_app
from pkd.serving.security import ApiKeys
from pkd.serving.service import Service
from pkd.toolkit.errors import BundleError, InputError, PkdError

KEEP_ALIVE_SECONDS = 75
"""Longer than the idle time of common proxies, so that it is never this side that closes under a request."""


def serve(service: Service, listener: socket.socket, keys: ApiKeys | None, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is in progress. ``ready`` is called after the self-test.

    Raises BundleError where a bundle does not reproduce its golden embeddings.
    """
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a stranger's broken form is no news
    config = uvicorn.Config(
        create_app(service, keys),
        lifespan="on",
        ws="none",
        access_log=False,
        log_level="error",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=service.settings.drain_seconds,
    )
    _Server(config, service, ready).run(sockets=[listener])
    if service.state.failure:
        raise BundleError(service.state.failure)


def listen(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises InputError for an address that cannot be, PkdError for one that is taken."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}: give a number from 0 to 65535; 0 picks a free port.")
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
    """``http://host:port`` of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._ready = service, ready
        self._proving: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._proving = asyncio.create_task(self._announce())

    async def _announce(self) -> None:
        await self._service.start()
        if self._service.state.failure:
            self.should_exit = True
        else:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, a second one does not wait. Neither is raised again: draining is a clean end."""
        self._service.state.draining = True
        self.force_exit = self.should_exit
        self.should_exit = True
