"""Write what routes answer: JSON, and streams of lines of JSON."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

NDJSON = "application/x-ndjson"


def json_response(content: Mapping[str, Any], status: int = 200) -> Response:
    """Answer with JSON straight from numpy arrays: five times faster than through lists of Python floats."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), status, media_type="application/json")


def line(content: Mapping[str, Any]) -> bytes:
    """Write one line of NDJSON."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


class Stream(Response):
    """Send pieces as they come, without listening for a disconnect meanwhile.

    Starlette's own would eat a body that is still arriving; sending fails where nobody is there.
    """

    media_type = NDJSON

    def __init__(self, pieces: AsyncGenerator[bytes, None], status_code: int = 200) -> None:
        self.status_code, self.background = status_code, None
        self.pieces = pieces
        self.init_headers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces, and close their generator."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self.pieces) as pieces:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
