"""Answer errors as RFC 9457 ``application/problem+json``: which error has which ``type``, HTTP status and title."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson
from pydantic import BaseModel, Field
from starlette.responses import Response

from pkd.serving.core import errors
from pkd.toolkit.core import errors as toolkit
from pkd.toolkit.core.errors import PkdError

RETRY_SECONDS = 1
"""Sent as ``Retry-After`` where an error does not know better (its detail ``retry_after``), seconds."""


class Unauthenticated(PkdError):
    """A request came without a valid API key."""


class Forbidden(PkdError):
    """The API key may not do this."""


class ForeignOrigin(PkdError):
    """A web page of another site or a foreign host name is used to reach a server without keys."""


class RouteNotFound(PkdError):
    """No route has this path."""


class MethodNotAllowed(PkdError):
    """The route does not take this method."""


class BodyTimeout(PkdError):
    """The body took too long to arrive."""


class RangeNotSatisfiable(PkdError):
    """The file has none of the bytes that ``Range`` asks for."""


class RateLimited(PkdError):
    """The API key sends too many requests."""


class HeadersTooLarge(PkdError):
    """The headers of a request are more or longer than taken."""


class ProblemType(NamedTuple):
    """Describe one kind of refusal as clients know it."""

    slug: str
    """``type`` of the body. Part of the API: types are added, never renamed."""
    status: int
    """Status of HTTP."""
    title: str


_TOO_LARGE = ProblemType("too-large", 413, "The body or the image is too large")
_NOT_FOUND = ProblemType("not-found", 404, "There is nothing by this name")
_INVALID = ProblemType("invalid-request", 422, "The request is not what this route takes")
INTERNAL = ProblemType("internal", 500, "The server failed")

PROBLEMS: dict[type[PkdError], ProblemType] = {
    toolkit.BadImage: ProblemType("bad-image", 400, "The image cannot be decoded"),
    Unauthenticated: ProblemType("auth", 401, "A valid API key is needed"),
    Forbidden: ProblemType("forbidden", 403, "The API key may not do this"),
    ForeignOrigin: ProblemType("foreign-origin", 403, "The request comes from another site"),
    RouteNotFound: _NOT_FOUND,
    errors.UnknownFile: _NOT_FOUND,
    errors.UnknownEncoder: ProblemType("unknown-encoder", 404, "No such encoder is loaded"),
    errors.NoGalleries: ProblemType("no-galleries", 404, "This server keeps no galleries"),
    errors.UnknownGallery: ProblemType("unknown-gallery", 404, "No such gallery"),
    errors.UnknownSubject: ProblemType("unknown-subject", 404, "No such subject in this gallery"),
    errors.UnknownTemplate: ProblemType("unknown-template", 404, "The subject has no such template"),
    MethodNotAllowed: ProblemType("method-not-allowed", 405, "The route does not take this method"),
    BodyTimeout: ProblemType("timeout", 408, "The body took too long to arrive"),
    toolkit.SpaceMismatch: ProblemType("space-mismatch", 409, "The two embeddings lie in different spaces"),
    toolkit.NotCertified: ProblemType("not-certified", 409, "No certificate joins these encoders in this order"),
    errors.GalleryConflict: ProblemType("gallery-conflict", 409, "The gallery is not in a state that allows this"),
    errors.DuplicateFace: ProblemType("duplicate-face", 409, "The face matches another subject"),
    errors.UnlikeSubject: ProblemType("unlike-subject", 409, "The face does not match the subject's own templates"),
    errors.IdempotencyConflict: ProblemType(
        "idempotency-conflict", 409, "The idempotency key was used for another request"
    ),
    errors.TooLarge: _TOO_LARGE,
    toolkit.ImageTooLarge: _TOO_LARGE,
    errors.UnsupportedMedia: ProblemType("unsupported-media", 415, "The media type is not supported"),
    RangeNotSatisfiable: ProblemType("range", 416, "The file has no such bytes"),
    errors.InvalidRequest: _INVALID,
    toolkit.InputError: _INVALID,
    toolkit.NoFace: ProblemType("no-face", 422, "No face was found"),
    errors.MultipleFaces: ProblemType("multiple-faces", 422, "More than one face was found"),
    errors.TooManyFaces: ProblemType("too-many-faces", 422, "The photograph shows too many faces"),
    errors.NotAligned: ProblemType("not-aligned", 422, "The image is not an aligned crop"),
    errors.NoDetector: ProblemType("no-detector", 422, "This server has no face detector"),
    toolkit.BadVector: ProblemType("bad-vector", 422, "The embedding cannot be used"),
    toolkit.UnsupportedFmr: ProblemType("unsupported-fmr", 422, "The certificate does not cover this false match rate"),
    errors.NotLive: ProblemType("not-live", 422, "There is no proof that a living person is shown"),
    errors.LowQuality: ProblemType("low-quality", 422, "The face is not good enough to enrol"),
    errors.Overloaded: ProblemType("overloaded", 429, "The server is busy"),
    RateLimited: ProblemType("rate-limited", 429, "This API key sends too many requests"),
    HeadersTooLarge: ProblemType("headers-too-large", 431, "The headers are too large"),
    errors.ServerFault: INTERNAL,
    errors.NotReady: ProblemType("not-ready", 503, "The server is not ready"),
    errors.StoreUnavailable: ProblemType("store-unavailable", 503, "The gallery cannot be read or written"),
    errors.Draining: ProblemType("draining", 503, "The server is shutting down"),
}
"""Answer to each error; a subclass as its nearest parent here, and any other error as ``internal``."""
TYPES: dict[str, ProblemType] = {problem.slug: problem for problem in PROBLEMS.values()}
"""The same by ``type``."""


class ProblemBody(BaseModel):
    """Hold problem details as RFC 9457 has them. Some types carry further members, shown in their examples."""

    type: str = Field(description="Stable name of the problem, for programs")
    title: str
    status: int
    detail: str = Field(description="Fault of this request and what to do, for people")


def problem_type(error: Exception) -> ProblemType:
    """Look up how an error is answered."""
    return next((PROBLEMS[kind] for kind in type(error).__mro__ if kind in PROBLEMS), INTERNAL)


def problem_body(error: Exception) -> dict[str, Any]:
    """Make the JSON of an error. Of one that nobody foresaw, a client learns nothing."""
    kind = problem_type(error)
    if not isinstance(error, PkdError):
        detail, details = "The server failed; its log says where.", {}
    elif kind is INTERNAL and not isinstance(error, errors.ServerFault):
        detail, details = "The server could not do this; its log says more.", error.details
    else:
        detail, details = str(error), error.details
    return {"type": kind.slug, "title": kind.title, "status": kind.status, "detail": detail, **details}


def problem_response(error: Exception) -> Response:
    """Answer an error, with ``Retry-After`` where waiting helps."""
    body = problem_body(error)
    headers: dict[str, str] = {}
    if body["status"] in (429, 503):
        headers["Retry-After"] = str(body.get("retry_after", RETRY_SECONDS))
    if body["status"] == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(orjson.dumps(body), body["status"], headers, "application/problem+json")


def documented(examples: Mapping[str, Mapping[str, object]]) -> dict[int | str, dict[str, Any]]:
    """Make OpenAPI ``responses`` for the given problem types; each may name extra members for its example."""
    made: dict[int | str, dict[str, Any]] = {}
    for slug, members in examples.items():
        _, status, title = TYPES[slug]
        entry = made.setdefault(
            status,
            {
                "description": "",
                "content": {
                    "application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemBody"}, "examples": {}}
                },
            },
        )
        entry["description"] = f"{entry['description']} · {slug}".strip(" ·")
        value = {"type": slug, "title": title, "status": status, "detail": "…", **members}
        entry["content"]["application/problem+json"]["examples"][slug] = {"value": value}
    return made
