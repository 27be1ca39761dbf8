"""Take access tokens of the operator's own OpenID Connect issuer beside keys.

A token is checked as RFC 9068 and RFC 8725 have it: signature by a key that the issuer publishes, with an algorithm of
that key, issuer, audience and times. Its scopes are mapped to those of pkd by the operator's file; what is not mapped
allows nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from pkd.serving.api.api_keys import SCOPES, ApiKey
from pkd.serving.api.problems import Unauthenticated
from pkd.serving.core.errors import BadToken
from pkd.serving.core.schemas import Number, Sent
from pkd.serving.core.signed_tokens import Expected, KeySet, header
from pkd.serving.core.watched_file import read_json_file
from pkd.serving.matching.liveness import REMEDY

REMEMBERED = 1024
"""Most tokens whose signature is not checked again until they expire, or keys change."""
MAPPABLE = frozenset(SCOPES) - {"mint"}
"""Scopes that an issuer's may be mapped to. Tokens of this server belong to a key in its file, so none is made here."""
PLAIN = re.compile(r"[A-Za-z0-9._-]{1,56}")
TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})
"""Header ``typ`` of tokens that are taken; one without is taken, too."""


class OidcConfig(Sent):
    """Hold the file of --oidc."""

    issuer: str = Field(min_length=1)
    audience: str = Field(min_length=1)
    jwks: str = Field(min_length=1)
    """File, relative to this one, or https address of the issuer's public keys (``jwks_uri`` of its configuration)."""
    scopes: dict[str, list[str]] = Field(min_length=1)
    """Scope of the issuer → scopes of pkd."""
    scope_claim: str = Field(default="scope", min_length=1)
    """Claim that holds the scopes: text with spaces between them, or a list."""
    name_claim: str = Field(default="sub", min_length=1)
    """Claim whose value names the holder in logs and in the audit log."""
    leeway_seconds: Number = Field(default=30, ge=0, le=300)
    """Most that the issuer's clock and this one may be apart, seconds."""
    rate: Number | None = Field(default=None, gt=0, le=1e6)
    """Requests a second of each holder; null: any number."""
    require_type: Literal["at+jwt"] | None = None
    """Take access tokens that call themselves so alone (RFC 9068): ID tokens are not for APIs."""

    @field_validator("scopes")
    @classmethod
    def _known(cls, scopes: dict[str, list[str]]) -> dict[str, list[str]]:
        for name, mapped in scopes.items():
            if unknown := set(mapped) - MAPPABLE:
                raise ValueError(f"{name!r} is mapped to {sorted(unknown)[0]!r}; give {', '.join(sorted(MAPPABLE))}")
        return scopes


class Oidc:
    """Check access tokens, and turn each into what a key of the same rights would be."""

    def __init__(self, config: OidcConfig, keys: KeySet, clock: Callable[[], float] = time.time) -> None:
        self.config, self._keys, self._clock = config, keys, clock
        self._expected = Expected(config.issuer, config.audience, config.leeway_seconds)
        self._seen: OrderedDict[bytes, tuple[int, float, ApiKey]] = OrderedDict()

    @classmethod
    def read(cls, path: Path) -> Oidc:
        """Read the file of --oidc. Raises InputError that names what is wrong with it."""
        config = read_json_file(path, OidcConfig.model_validate, REMEDY)
        return cls(config, KeySet(config.jwks if "://" in config.jwks else str(path.parent / config.jwks)))

    async def check(self, token: str) -> ApiKey:
        """Return the rights of a token. Raises Unauthenticated that says what is wrong, and never repeats the token."""
        try:
            kid = header(token).get("kid")
            if self._keys.is_due(kid):
                await asyncio.to_thread(self._keys.refresh, kid)
            return self._remembered(token)
        except BadToken as error:
            raise Unauthenticated(f"The access token is not believed: {error}") from None

    def _remembered(self, token: str) -> ApiKey:
        place = hashlib.sha256(token.encode()).digest()
        known = self._seen.get(place)
        if known and known[0] == self._keys.generation and self._clock() < known[1]:
            self._seen.move_to_end(place)
            return known[2]
        generation = self._keys.generation
        kind = header(token).get("typ")
        wanted = frozenset({"at+jwt", "application/at+jwt"}) if self.config.require_type else TYPES
        if (kind is not None or self.config.require_type) and str(kind).lower() not in wanted:
            raise BadToken(f"its type is not {' or '.join(sorted(wanted))}.")
        claims = self._keys.claims(token, self._expected)
        key = self._key(claims)
        self._seen[place] = generation, claims["exp"] + self.config.leeway_seconds, key
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return key

    def _key(self, claims: dict[str, Any]) -> ApiKey:
        given = claims.get(self.config.scope_claim) or ()
        listed = given.split() if isinstance(given, str) else given if isinstance(given, list) else ()
        scopes = frozenset(one for name in listed for one in self.config.scopes.get(str(name), ()))
        holder = str(claims.get(self.config.name_claim) or claims["sub"])
        name = holder if PLAIN.fullmatch(holder) else hashlib.sha256(holder.encode()).hexdigest()[:16]
        digest = hashlib.sha256(f"{self.config.issuer}\n{claims['sub']}".encode()).digest()
        return ApiKey(digest, f"oidc.{name}", scopes, self.config.rate)
