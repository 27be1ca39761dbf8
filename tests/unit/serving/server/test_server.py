"""The server around the routes: clients that do not read what they are sent. Signals and drains: tests/e2e."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pkd.serving.api.middleware import Middleware
from pkd.serving.core.options import Settings
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.service import Service
from pkd.serving.server import server
from tests.support import serving_bundles as made
from tests.support.server_process import until

PIECE = bytes(64 * 1024)
EXPORT = b"GET /v1/galleries/g/export HTTP/1.1\r\nHost: localhost\r\n\r\n"
BULK = b"POST /v1/galleries/g/templates:bulk HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made.family(tmp_path_factory.mktemp("bundles")).folders[0]


class Endless:
    """Answers every request with pieces and no end, as far as they are taken."""

    def __init__(self, service: Any) -> None:
        self.service = service
        self.inside = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        self.inside += 1
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                for _ in range(500):  # more than sockets hold
                    await send({"type": "http.response.body", "body": PIECE, "more_body": True})
                    await asyncio.sleep(0)
                if scope["method"] == "POST":
                    await receive()
        finally:
            self.inside -= 1


@contextmanager
def endless(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[Any]:
    """Run the real server around such an application: its address, the application, and the thread that serves."""
    service = Service(Encoders.open([folder]), Settings(threads=1, **settings))
    app = Endless(service)
    monkeypatch.setattr(
        server,
        "create_app",
        lambda service, keys, local, page: Middleware(app, service.settings, service.state, keys, local=local),
    )
    listener = server.listen("127.0.0.1", 0)
    ready = threading.Event()
    thread = threading.Thread(target=server.serve, args=(service, listener, None, ready.set))
    thread.start()
    try:
        assert ready.wait(20)
        yield listener.getsockname(), app, thread
    finally:
        service.state.draining = True
        thread.join(20)
        service.close()
    assert not thread.is_alive()


def begin(address: Any, request: Any = EXPORT) -> Any:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    client.settimeout(10)
    client.connect(address)
    client.sendall(request)
    assert client.recv(12) == b"HTTP/1.1 200"
    return client


@pytest.mark.parametrize("request_", [EXPORT, BULK + b"1\r\nx\r\n"])
def test_a_client_that_does_not_read_is_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch, request_: Any) -> None:
    with endless(folder, monkeypatch, body_seconds=0.3) as (address, app, _), begin(address, request_) as client:
        assert app.inside == 1
        until(lambda: app.inside == 0, 5)
        while client.recv(2**20):
            pass


def test_a_client_that_reads_slowly_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with endless(folder, monkeypatch, body_seconds=0.6) as (address, app, _), begin(address) as client:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            assert client.recv(len(PIECE))
            time.sleep(0.05)
        assert app.inside == 1


def test_a_drain_ends_with_its_time_whoever_does_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with endless(folder, monkeypatch) as (address, app, thread), begin(address):
        app.service.state.draining = True  # as after SIGTERM, when the time of requests in progress is over
        thread.join(5)
        assert not thread.is_alive()
        assert app.inside == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_descriptors_that_run_out_are_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logged = []
    monkeypatch.setattr(server.logger, "error", lambda message, *values: logged.append(message % values))
    used = len(list(Path("/proc/self/fd").iterdir()))
    for limit, warned, warns in ((2 * used, False, False), (used, False, True), (used, True, True)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limit=limit: (limit, limit))
        assert server.warn_of_descriptors(warned) is warns
    assert len(logged) == 1 and "Raise ulimit -n" in logged[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_without_one_descriptor_left_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    logged = []
    monkeypatch.setattr(server.logger, "error", lambda message, *values: logged.append(message % values))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (60, 60))
    monkeypatch.setattr(os, "listdir", raises(OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
    assert server.warn_of_descriptors(False)
    assert logged == ["60 of 60 file descriptors are used: further connections will fail. Raise ulimit -n."]


def raises(error: OSError) -> Callable[[str], list[str]]:
    """Make a function that fails as a system call does."""

    def fail(path: str) -> list[str]:
        raise error

    return fail
