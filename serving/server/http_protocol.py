"""Limit the headers of requests before anything else is done with them: the parser takes any number and length."""

from __future__ import annotations

import http

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pkd.serving.api.problems import HeadersTooLarge, problem_body

MAX_HEADERS = 100
"""Most header lines of one request."""
MAX_HEADER_BYTES = 64 * 1024
"""Longest request line and headers together; a header that has not ended counts as far as it has arrived."""


class LimitedHttpProtocol(HttpToolsProtocol):
    """Parse requests with httptools, and answer 431 where the headers are too large."""

    _in_headers = True
    _arrived = 0
    _refusal: HeadersTooLarge | None = None

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived, unless the headers have grown too large."""
        if self._refusal is not None:
            return
        if self._in_headers:
            self._arrived += len(data)
        super().data_received(data)
        if self._in_headers and self._refusal is None and self._arrived > MAX_HEADER_BYTES:
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """Begin to count."""
        super().on_message_begin()
        self._in_headers, self._length = True, 0

    def on_url(self, url: bytes) -> None:
        """Count the address."""
        super().on_url(url)
        self._check(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count one header line."""
        super().on_header(name, value)
        self._check(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """Stop to count."""
        self._in_headers, self._arrived = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Prepare for the next request on this connection."""
        super().on_message_complete()
        self._in_headers, self._arrived = True, 0

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or whose headers are too large, and close the connection."""
        if self._in_headers and (self._refusal or self._arrived > MAX_HEADER_BYTES):
            self._refusal = self._refusal or _too_large()
            body = orjson.dumps(problem_body(self._refusal))
            status = http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            self.transport.write(
                f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/problem+json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
                + body
            )
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _check(self, more: int) -> None:
        """Raise HeadersTooLarge, which ends the parser, where there are too many header lines or they are too long."""
        self._length += more
        if self._length > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADERS:
            self._refusal = _too_large()
            raise self._refusal


def _too_large() -> HeadersTooLarge:
    return HeadersTooLarge(
        f"The headers are over {MAX_HEADERS} lines or {MAX_HEADER_BYTES:,} bytes. Send fewer.",
        details={"lines": MAX_HEADERS, "bytes": MAX_HEADER_BYTES},
    )
