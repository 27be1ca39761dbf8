"""Problem: every refusal as RFC 9457 ``application/problem+json`` with a stable ``type``, and never a traceback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import BaseModel, Field
from starlette.responses import Response

from pkd.toolkit.core import errors

PROBLEMS: dict[str, tuple[int, str]] = {
    "bad-image": (400, "The image cannot be decoded"),
    "auth": (401, "A valid API key is needed"),
    "forbidden": (403, "The API key may not do this"),
    "not-found": (404, "No such route"),
    "unknown-encoder": (404, "No such encoder is loaded"),
    "no-galleries": (404, "This server keeps no galleries"),
    "unknown-gallery": (404, "No such gallery"),
    "unknown-subject": (404, "No such subject in this gallery"),
    "method-not-allowed": (405, "The route does not take this method"),
    "timeout": (408, "The body took too long to arrive"),
    "space-mismatch": (409, "The two embeddings lie in different spaces"),
    "not-certified": (409, "No certificate joins these encoders in this order"),
    "gallery-conflict": (409, "The gallery is not in a state that allows this"),
    "idempotency-conflict": (409, "The idempotency key was used for another request"),
    "too-large": (413, "The body or the image is too large"),
    "unsupported-media": (415, "The media type is not supported"),
    "range": (416, "The file has no such bytes"),
    "invalid-request": (422, "The request is not what this route takes"),
    "no-face": (422, "No face was found"),
    "multiple-faces": (422, "More than one face was found"),
    "not-aligned": (422, "The image is not an aligned crop"),
    "no-detector": (422, "This server has no face detector"),
    "bad-vector": (422, "The embedding cannot be used"),
    "unsupported-fmr": (422, "The certificate does not cover this false match rate"),
    "low-quality": (422, "The face is not good enough to enrol"),
    "overloaded": (429, "The server is busy"),
    "rate-limited": (429, "This API key sends too many requests"),
    "internal": (500, "The server failed"),
    "not-ready": (503, "The server is not ready"),
    "store-unavailable": (503, "The gallery cannot be read or written"),
    "draining": (503, "The server is shutting down"),
}
"""``type`` → HTTP status and title. Types are part of the API: they are added, never renamed."""

OF_ERROR: dict[type[errors.PkdError], str] = {
    errors.ImageTooLarge: "too-large",
    errors.BadImage: "bad-image",
    errors.NoFace: "no-face",
    errors.BadVector: "bad-vector",
    errors.UnsupportedFmr: "unsupported-fmr",
    errors.SpaceMismatch: "space-mismatch",
    errors.NotCertified: "not-certified",
    errors.InputError: "invalid-request",
}

RETRY_SECONDS = 1
"""Where a problem does not know better (its member ``retry_after``), seconds."""


class Problem(Exception):
    """A refusal. ``members`` are the extra fields of the body: expected, got, what would work."""

    def __init__(self, type: str, detail: str, **members: object) -> None:
        super().__init__(detail)
        self.type = type
        self.status, self.title = PROBLEMS[type]
        self.detail = detail
        self.members = members

    def explain(self, **members: object) -> Problem:
        """The same with those ``members`` that it has not got: whoever caught it may know more than who raised it."""
        self.members = {**members, **self.members}
        return self

    def body(self) -> dict[str, object]:
        """Its JSON."""
        return {"type": self.type, "title": self.title, "status": self.status, "detail": self.detail, **self.members}

    def response(self) -> Response:
        """The problem as an HTTP response, with ``Retry-After`` where waiting helps."""
        headers: dict[str, str] = {}
        if self.status in (429, 503):
            headers["Retry-After"] = str(self.members.get("retry_after", RETRY_SECONDS))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(orjson.dumps(self.body()), self.status, headers, "application/problem+json")


class ProblemBody(BaseModel):
    """RFC 9457 problem details. Some types carry further members, shown in their examples."""

    type: str = Field(description="Stable name of the problem, for programs")
    title: str
    status: int
    detail: str = Field(description="What was wrong with this request and what to do, for people")


def from_error(error: errors.PkdError) -> Problem:
    """The problem that a toolkit error is to a client."""
    for kind in type(error).__mro__:
        if kind in OF_ERROR:
            return Problem(OF_ERROR[kind], str(error))
    return Problem("internal", "The server could not do this; its log says more.")


def internal() -> Problem:
    """The problem that an unforeseen error is to a client, who learns nothing of it."""
    return Problem("internal", "The server failed; its log says where.")


def documented(examples: Mapping[str, Mapping[str, object]]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI ``responses`` for the given problem types; each may name extra members for its example."""
    made: dict[int | str, dict[str, Any]] = {}
    for type, members in examples.items():
        status, title = PROBLEMS[type]
        entry = made.setdefault(
            status,
            {
                "description": "",
                "content": {
                    "application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemBody"}, "examples": {}}
                },
            },
        )
        entry["description"] = f"{entry['description']} · {type}".strip(" ·")
        value = {"type": type, "title": title, "status": status, "detail": "…", **members}
        entry["content"]["application/problem+json"]["examples"][type] = {"value": value}
    return made
