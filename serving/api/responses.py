"""Write what routes answer: JSON, and streams of lines of JSON."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import orjson
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

NDJSON = "application/x-ndjson"


def json_response(answer: BaseModel, status: int = 200) -> Response:
    """Answer with a model, where a route does not return it: it chooses the status, or goes past FastAPI."""
    return Response(answer.model_dump_json(), status, media_type="application/json")


def embeddings_response(content: Mapping[str, Any]) -> Response:
    """Answer /v1/embed with JSON straight from numpy arrays, shaped as EmbedAnswer.

    No model is made, since one takes vectors as lists of Python floats: of 512 numbers that is 51 µs of CPU instead of
    10 for one face, and 2.0 ms instead of 0.34 for 32. tests/unit/serving/inference/test_embed.py reads the answers.
    """
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


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
