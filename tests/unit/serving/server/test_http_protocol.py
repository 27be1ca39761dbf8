"""Headers are limited before a key is asked for, whatever their number, length and pace."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from pkd.serving.core.options import Settings
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.service import Service
from pkd.serving.server import server
from pkd.serving.server.http_protocol import MAX_HEADER_BYTES, MAX_HEADERS
from tests.support import serving_bundles as made

FIRST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
MANY = b"".join(b"a%d: 1\r\n" % number for number in range(100_000))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    service = Service(Encoders.open([made.family(tmp_path_factory.mktemp("b")).folders[0]]), Settings(threads=1))
    listener = server.listen("127.0.0.1", 0)
    ready = threading.Event()
    thread = threading.Thread(target=server.serve, args=(service, listener, None, ready.set))
    thread.start()
    assert ready.wait(20)
    yield listener.getsockname()[:2]
    service.state.draining = True
    thread.join(20)
    service.close()
    assert not thread.is_alive()


def ask(address: tuple[str, int], *pieces: bytes) -> bytes:
    """Read what the server answers until it closes, as far as it takes the request at all."""
    answer = b""
    with socket.create_connection(address, timeout=10) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
                time.sleep(0.02)
            while not answer.endswith(b"}"):
                if not (piece := client.recv(65536)):
                    break
                answer += piece
        except (BrokenPipeError, ConnectionResetError):
            pass
    return answer


@pytest.mark.parametrize(
    "pieces",
    [
        (FIRST + b"a: 1\r\n" * MAX_HEADERS + b"\r\n",),
        (FIRST + b"a: " + b"x" * MAX_HEADER_BYTES, b"\r\n\r\n"),
        (FIRST + b"a: ", *[b"x" * 10_000] * 7),
        (b"GET /" + b"x" * MAX_HEADER_BYTES + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",),
        (b"GET /", *[b"x" * 10_000] * 7),
    ],
)
def test_too_large_headers_are_answered_and_the_connection_closed(
    address: tuple[str, int], pieces: tuple[bytes, ...]
) -> None:
    head, _, body = ask(address, *pieces).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431") and b"connection: close" in head
    assert json.loads(body)["type"] == "headers-too-large"


@pytest.mark.parametrize("headers", [MANY, b"a: " + b"x" * 40_000_000])
def test_a_flood_of_headers_costs_little(address: tuple[str, int], headers: bytes) -> None:
    begun = time.process_time()
    answer = ask(address, FIRST + headers)
    assert answer[:12] in (
        b"HTTP/1.1 431",
        b"",
    )  # it may not hear it: it goes on sending after the connection is closed
    assert time.process_time() - begun < 4  # 13.6 s before


def whole(client: socket.socket) -> bytes:
    """Read an answer of JSON: its head and its body may come one after the other."""
    answer = client.recv(65536)
    while not answer.endswith(b"}"):
        more = client.recv(65536)
        assert more, answer
        answer += more
    return answer


def test_headers_below_the_limits_are_taken_again_and_again(address: tuple[str, int]) -> None:
    request = FIRST + b"a: 1\r\n" * (MAX_HEADERS - 2) + b"b: " + b"x" * 50_000 + b"\r\n\r\n"
    with socket.create_connection(address, timeout=10) as client:
        for _ in range(5):
            client.sendall(request[:100])
            time.sleep(0.02)
            client.sendall(request[100:])
            assert whole(client).startswith(b"HTTP/1.1 200")
        body = bytes(3 * MAX_HEADER_BYTES)  # a body is no header
        client.sendall(b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n")
        client.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert b"no-detector" in whole(client)
