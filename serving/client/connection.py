"""Send requests to one server, again when it is busy or silent, and raise its refusals as errors."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from pkd.serving.core.transfer_schemas import BulkAnswer
from pkd.toolkit.core.errors import MissingExtra, PkdError

try:
    import httpx
except ModuleNotFoundError:
    raise MissingExtra("httpx", "client") from None

Of = TypeVar("Of")
BUSY = (429, 503)
LONGEST_WAIT = 30.0
"""Longest wait that one Retry-After is believed, seconds."""
CHUNK_LINES, CHUNK_BYTES = 500, 4 * 2**20
"""Largest request of many lines: its answers must fit into the sockets' buffers while it is being sent."""


class Refused(PkdError):
    """The server has refused a request; ``problem`` is what it said (RFC 9457)."""

    def __init__(self, status: int, problem: Mapping[str, Any], retry_after: float | None = None) -> None:
        self.status, self.problem, self.retry_after = status, problem, retry_after
        self.type = str(problem.get("type", "unknown"))
        self.exit_code = 2 if status < 500 and status not in BUSY else 1
        works = f" What works: {json.dumps(problem['works'])}" if problem.get("works") else ""
        super().__init__(f"{self.type} ({status}): {problem.get('detail', 'no detail')}{works}")


class Unreachable(PkdError):
    """The server gave no answer."""


class Connection:
    """Send requests to one server, as patiently as asked."""

    def __init__(
        self, url: str, key: str | None, timeout: float, retries: int, transport: httpx.BaseTransport | None
    ) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url, self.retries = url.rstrip("/"), retries
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, transport=transport)
        except httpx.InvalidURL as error:
            raise PkdError(f"{url}: no URL: {error}. Give one such as http://127.0.0.1:8000.") from None

    def close(self) -> None:
        """Close the sockets."""
        self._http.close()

    def send(self, method: str, path: str, *, safe: bool = True, **request: Any) -> httpx.Response:
        """Send a request and return its answer, below 400.

        ``safe``: may be sent again where nobody knows whether it arrived.

        Raises Refused or Unreachable.
        """
        for attempt in range(self.retries + 1):
            final = attempt == self.retries
            try:
                response = self._http.request(method, path, **request)
            except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
                if final or not (safe or isinstance(error, httpx.ConnectError)):
                    raise self._unreachable(error) from None
                self._wait(attempt, None)
                continue
            if response.status_code < 400:
                return response
            refused = _refused(response)
            if final or refused.status not in BUSY:
                raise refused
            self._wait(attempt, refused.retry_after)
        raise AssertionError("the last attempt returns or raises")

    def send_lines(
        self, path: str, lines: Iterable[tuple[Of, bytes]], *, closed: bool = False
    ) -> Iterator[tuple[Of, BulkAnswer]]:
        """Send many lines, each of which may be sent again; gives each with its answer, in no particular order.

        ``closed``: end every request as an export ends. Raises Refused where the whole is refused, Unreachable.
        """
        for chunk in _chunks(lines):
            left: Sequence[tuple[Of, bytes]] = chunk
            for attempt in range(self.retries + 1):
                answered: set[int] = set()
                failure = yield from self._send_once(path, left, closed, attempt == self.retries, answered)
                left = [one for place, one in enumerate(left) if place not in answered]
                if not left:
                    break
                if attempt == self.retries:
                    raise failure or Unreachable(f"{self.url}: {len(left)} lines have no answer. Try again.")
                self._wait(attempt, failure.retry_after if isinstance(failure, Refused) else None)

    @contextmanager
    def stream(self, method: str, path: str, **request: Any) -> Iterator[httpx.Response]:
        """Open an answer that is read as it comes. Raises as ``send``, without trying again."""
        try:
            with self._http.stream(method, path, **request) as response:
                if response.status_code >= 400:
                    response.read()
                    raise _refused(response)
                yield response
        except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
            raise self._unreachable(error) from None

    def _send_once(
        self, path: str, lines: Sequence[tuple[Of, bytes]], closed: bool, final: bool, answered: set[int]
    ) -> Generator[tuple[Of, BulkAnswer], None, PkdError | None]:
        """Add to ``answered`` whatever waiting will not change; returns what kept the others from an answer."""
        content = b"".join(line for _, line in lines)
        if closed:
            content += json.dumps({"end": True, "subjects": len(lines)}).encode() + b"\n"
        headers = {"content-type": "application/x-ndjson"}
        try:
            with self.stream("POST", path, content=content, headers=headers) as response:
                for line in lines_of(response):
                    answer = BulkAnswer.model_validate_json(line)
                    place = (answer.line or 0) - 1
                    busy = answer.problem is not None and answer.problem.get("status") in BUSY
                    if 0 <= place < len(lines) and (final or not busy):
                        answered.add(place)
                        yield lines[place][0], answer
        except Unreachable as error:
            return error
        except Refused as refused:
            if refused.status not in BUSY:
                raise
            return refused
        return None

    def _wait(self, attempt: int, stated: float | None) -> None:
        """Wait as long as the server said, or twice as long each time.

        Spread, so that clients do not come back together.
        """
        seconds = min(0.2 * 2**attempt if stated is None else stated, LONGEST_WAIT)
        time.sleep(seconds * (1 + random.random() / 4))

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(f"{self.url}: {type(error).__name__}: {error or 'no answer'}. Is pkd-serve running there?")


def lines_of(response: httpx.Response) -> Iterator[bytes]:
    """Give lines of NDJSON as they come. httpx's own ``iter_lines`` also ends them at U+2028, which JSON may hold."""
    kept = b""
    for piece in response.iter_bytes():
        *whole, kept = (kept + piece).split(b"\n")
        yield from filter(None, whole)
    if kept:
        yield kept


def _refused(response: httpx.Response) -> Refused:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):  # a proxy's page, for example
        problem = {"type": "unknown", "detail": response.text[:200]}
    stated = response.headers.get("retry-after", "")
    return Refused(response.status_code, problem, float(stated) if stated.isdecimal() else None)


def _chunks(lines: Iterable[tuple[Of, bytes]]) -> Iterator[list[tuple[Of, bytes]]]:
    chunk: list[tuple[Of, bytes]] = []
    size = 0
    for one in lines:
        if chunk and (len(chunk) == CHUNK_LINES or size + len(one[1]) > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(one)
        size += len(one[1])
    if chunk:
        yield chunk
