"""Make and read short-lived tokens: a page or a device can do with one a small part of what an operator's key can.

A token is ``pkdt_PAYLOAD.MAC``, both base64url: JSON of what it allows, and its HMAC-SHA256 under a secret that is
derived from the master key of the galleries. So nothing is kept: every worker and every machine that has the galleries
reads it, also after a restart. A token is never more than the key that made it: while it is used that key must be in
the file, with the same scopes, and within its own rate. An operator ends one before its time by a line ``revoked ID``
in the file of keys, and all of a key's by taking its line out: both reach every machine as the file does.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import orjson
from pydantic import Field, ValidationError

from pkd.serving.api.problems import Forbidden, Unauthenticated
from pkd.serving.core.schemas import EmbeddingSide, Name, Sent

PREFIX = "pkdt_"
"""Beginning of every token; keys begin with ``pkd_``."""
MOST_SECONDS = 86_400
"""Longest life of a token, seconds."""
TokenScope = Literal["verify", "embed"]
ROUTES: dict[str, tuple[TokenScope | None, re.Pattern[str]]] = {
    "GET catalogue": (
        None,
        re.compile(r"/v1/(encoders(/[^/]+(/artifact)?)?|detector|devices/[^/]+/latest|spaces|certificates)"),
    ),
    "GET gallery": ("verify", re.compile(r"/v1/galleries/(?P<gallery>[^/]+)")),
    "POST verify": ("verify", re.compile(r"(/v1)?/verify|/v1/galleries/(?P<gallery>[^/]+)/identify")),
    "POST embed": ("embed", re.compile(r"(/v1)?/embed")),
}
"""Method and scope → the paths that tokens open. Any other is refused; ``gallery`` must be the token's own."""


class Token(Sent):
    """State what a token allows, and of which key it is."""

    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    key: str = Field(pattern=r"^[0-9a-f]{16}$", description="Beginning of the hash of the key that made it")
    scopes: list[TokenScope] = Field(min_length=1)
    gallery: Name
    expires: int = Field(description="Seconds since 1970")
    rate: float = Field(gt=0, description="Requests a second")

    @property
    def digest(self) -> bytes:
        """Return 32 bytes that stand for it where requests are counted."""
        return hashlib.sha256(f"token {self.id}".encode()).digest()


class TokenBody(Sent):
    """Hold the JSON body of POST /v1/tokens."""

    scopes: list[TokenScope] = Field(min_length=1, max_length=2, description="Any of those that the key has, too")
    gallery: Name = Field(description="The one gallery that it opens")
    seconds: Annotated[int, Field(ge=10, le=MOST_SECONDS)] = Field(900, description="Its life, seconds")
    rate: float = Field(10.0, gt=0, le=1000, description="Most requests a second; those of the key hold, too")


class Tokens:
    """Make and read tokens under one secret of 32 bytes. ``clock``: seconds since 1970."""

    def __init__(self, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        self._secret, self._clock = secret, clock

    def now(self) -> float:
        """Read its clock, seconds since 1970."""
        return self._clock()

    def mint(self, key: bytes, body: TokenBody) -> tuple[str, Token]:
        """Make a token of the key with this hash; who may is checked before. Returns its text, too."""
        token = Token(
            id=secrets.token_hex(8),
            key=key.hex()[:16],
            scopes=sorted(set(body.scopes)),
            gallery=body.gallery,
            expires=int(self._clock()) + body.seconds,
            rate=body.rate,
        )
        payload = _text(orjson.dumps(token.model_dump()))
        return f"{PREFIX}{payload}.{_text(self._mac(payload))}", token

    def read(self, text: str, revoked: Iterable[str] = ()) -> Token:
        """Read a token. Raises Unauthenticated: it is none of this server's, has run out, or is ``revoked``."""
        payload, _, mac = text.removeprefix(PREFIX).partition(".")
        if not hmac.compare_digest(_text(self._mac(payload)), mac):
            raise Unauthenticated("This token is none of this server's. Ask for a new one.")
        try:
            token = Token.model_validate_json(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        except (ValueError, ValidationError):
            raise Unauthenticated("This token is of another version of the server. Ask for a new one.") from None
        if self._clock() >= token.expires:
            raise Unauthenticated("This token has run out. Ask for a new one.")
        if token.id in revoked:
            raise Unauthenticated("This token was revoked. Ask for a new one.")
        return token

    def _mac(self, payload: str) -> bytes:
        return hmac.digest(self._secret, payload.encode("latin-1", "replace"), "sha256")


def require_open(token: Token, method: str, path: str) -> None:
    """Raise Forbidden where tokens, or this one, do not open a path."""
    asked = "GET" if method == "HEAD" else method
    for name, (scope, pattern) in ROUTES.items():
        found = pattern.fullmatch(path) if name.partition(" ")[0] == asked else None
        if found is None:
            continue
        if scope and scope not in token.scopes:
            raise Forbidden(f"this token lacks the scope {scope}.", details={"scope": scope, "scopes": token.scopes})
        require_gallery(token, found.groupdict().get("gallery"))
        return
    raise Forbidden(f"a token does not open {method} {path[:200]}. Use a key.", details={"scopes": token.scopes})


def require_gallery(token: Token, gallery: str | None) -> None:
    """Raise Forbidden for a gallery that is not the token's."""
    if gallery not in (None, token.gallery):
        raise Forbidden(f"this token opens the gallery {token.gallery} alone.", details={"scopes": token.scopes})


def require_embedding(token: Token | None, *sides: object) -> None:
    """Raise Forbidden where a side that a token asks about is a picture: those stay on the device."""
    if token and not all(isinstance(side, EmbeddingSide) for side in sides):
        raise Forbidden(
            "with a token the query is an embedding, and no side is a picture. Embed on the device.",
            details={"scopes": token.scopes},
        )


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
