"""Decide who may do what, and how often: hashed bearer keys from a file that is read again when it changes.
One key a line: ``SHA256 NAME SCOPES [rate=N/s]``, for example ``9f86d0…  kiosk-1  embed,verify  rate=20/s``. A line
``revoked ID`` ends a token that a key has made (tokens.py).
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import mmap
import os
import re
import secrets
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from starlette.requests import HTTPConnection

from pkd.serving.api.problems import Forbidden, RateLimited, Unauthenticated
from pkd.serving.api.tokens import PREFIX, Token, Tokens
from pkd.serving.core.signed_tokens import looks_signed
from pkd.serving.core.watched_file import LOOK_SECONDS, file_stamp
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.text import read_text

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger("pkd.serving")
SCOPES = {
    "embed": "embed images",
    "verify": "compare two faces; list galleries, and search one for a face",
    "enrol": "create galleries and add templates to them",
    "delete": "delete subjects",
    "admin": "read subjects; export, import, migrate and delete galleries",
    "mint": "make short-lived tokens for pages and devices, of its own scopes embed and verify",
}
"""Scopes that a key can have. No scope contains another."""
BEFORE_SCOPES = frozenset({"embed", "verify"})
"""Scopes of a line that states none: all that there was when lines had none."""
ANONYMOUS = "anonymous"
"""Name of the actor on a server without keys."""
HASH = re.compile(r"[0-9a-f]{64}")
TOKEN_ID = re.compile(r"[0-9a-f]{16}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RATE = re.compile(r"rate=(\d{1,6}(?:\.\d{1,3})?)/s")
LINE = "Write SHA256 NAME SCOPES [rate=N/s], SCOPES from " + ",".join(SCOPES) + " or - for none"
IN_SCOPE = "pkd.key"
"""Name under which the middleware leaves the key in the ASGI scope; the key is None on a server without keys."""


@dataclass(frozen=True)
class ApiKey:
    """Hold one line of the file."""

    digest: bytes
    name: str
    """Name of its holder: the actor in logs and in the audit log. While keys are changed, two may share it."""
    scopes: frozenset[str]
    rate: float | None
    """Requests a second; None: as many as there are."""
    token: Token | None = None
    """Token of the key that a request came with, if any; ``scopes`` and ``rate`` are then the token's."""


def token_of(request: HTTPConnection) -> Token | None:
    """Return the token that a request came with; None where it came with a key, or the server has none."""
    key: ApiKey | None = request.scope[IN_SCOPE]
    return None if key is None else key.token


def require(request: HTTPConnection, *scopes: str) -> str:
    """Return the name of the key that a request came with, which is the actor of what follows.

    ``anonymous`` without keys.

    Raises Forbidden where the key has none of ``scopes``, each one of ``SCOPES``.
    """
    if not SCOPES.keys() >= set(scopes):
        raise ValueError(f"no scopes {scopes!r}")
    key: ApiKey | None = request.scope[IN_SCOPE]
    if key is None:
        return ANONYMOUS
    if key.scopes.isdisjoint(scopes):
        wanted = " or ".join(scopes)
        raise Forbidden(
            f"the key {key.name!r} lacks the scope {wanted}. Ask the operator to add it to the key's line.",
            details={"scope": scopes[0], "scopes": sorted(key.scopes)},
        )
    return key.name


def may(request: HTTPConnection, scope: str) -> bool:
    """Tell whether the key that a request came with has a scope; without keys every request may do everything."""
    key: ApiKey | None = request.scope[IN_SCOPE]
    return key is None or scope in key.scopes


class AccessTokens(Protocol):
    """Take access tokens of an issuer beside keys, as ``oidc.Oidc`` does."""

    async def check(self, token: str) -> ApiKey:
        """Return the rights of a token. Raises Unauthenticated."""


class ApiKeys:
    """Hold the accepted keys. Keys are long and random, so an unsalted fast hash keeps them safe."""

    def __init__(
        self, keys: Iterable[ApiKey], path: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path, self._clock = path, clock
        self._keys = tuple(keys)
        self._revoked: frozenset[str] = frozenset()
        self.tokens: Tokens | None = None
        """Reads and makes tokens; None: this server has no galleries, and so no tokens."""
        self.open_metrics = False
        """Whether /metrics is answered without a key, as Prometheus asks whom nobody gave one."""
        self.access_tokens: AccessTokens | None = None
        """Takes what an OpenID Connect issuer has signed; None: keys and tokens of this server alone."""
        self._buckets: dict[bytes, Bucket] = {}
        self._ends: dict[bytes, float] = {}
        """Bucket of a token → when it runs out, seconds since 1970."""
        self._stamp = file_stamp(path) if path else None
        self._looked = clock()
        self.shared: Path | None = None
        """Private folder through which several processes share one rate; None: this process is alone."""

    @classmethod
    def read(cls, path: str | Path, clock: Callable[[], float] = time.monotonic) -> ApiKeys:
        """Read a file of keys. Raises InputError that names the line, and never repeats it."""
        keys = cls((), Path(path), clock)
        keys._keys, keys._revoked = _read(Path(path))
        return keys

    async def identify(self, authorization: str | None) -> ApiKey:
        """Find whose request it is: as ``check`` does, or by an access token. Raises Unauthenticated."""
        scheme, _, sent = (authorization or "").partition(" ")
        if self.access_tokens and scheme.lower() == "bearer" and looks_signed(sent.strip()):
            return await self.access_tokens.check(sent.strip())
        return self.check(authorization)

    def check(self, authorization: str | None) -> ApiKey:
        """Find the key in the ``Authorization`` header, or the token; every hash is compared.

        Raises Unauthenticated.
        """
        if self._clock() - self._looked >= LOOK_SECONDS:
            self.reload(changed=True)
        scheme, _, sent = (authorization or "").partition(" ")
        if scheme.lower() == "bearer" and sent.strip().startswith(PREFIX) and self.tokens:
            return self._check_token(self.tokens.read(sent.strip(), self._revoked))
        given = hashlib.sha256(sent.strip().encode("latin-1", "replace")).digest()  # the bytes that were sent
        found = [key for key in self._keys if hmac.compare_digest(given, key.digest)]
        if scheme.lower() != "bearer" or not found:
            raise Unauthenticated("Send `Authorization: Bearer KEY` with a key that this server knows.")
        return found[0]

    def _check_token(self, token: Token) -> ApiKey:
        """Find the key that a token is of, and what both allow now. Raises Unauthenticated where it is gone."""
        for key in self._keys:
            if hmac.compare_digest(key.digest.hex()[:16], token.key) and "mint" in key.scopes:
                return ApiKey(token.digest, key.name, key.scopes & frozenset(token.scopes), token.rate, token)
        raise Unauthenticated("The key that made this token is no longer valid. Ask for a new one.")

    def take(self, key: ApiKey) -> None:
        """Count one request of a key; one with a token counts for both.

        Raises RateLimited with the seconds after which the next one is taken.
        """
        if key.token:
            self.take(next(one for one in self._keys if one.digest.hex()[:16] == key.token.key))
        if key.rate is not None and (wait := self._bucket(key).take(key.rate, self._clock())):
            who = "this token" if key.token else f"the key {key.name!r}"
            raise RateLimited(
                f"{who} may send {key.rate:g} requests a second. Send the next one in {wait:.2g} s.",
                details={"retry_after": math.ceil(wait)},
            )

    def reload(self, *, changed: bool = False) -> None:
        """Read the file again; with ``changed`` only if it has. One that cannot be read leaves the old keys valid."""
        self._looked = self._clock()
        if self.path is None or (changed and file_stamp(self.path) == self._stamp):
            return
        self._stamp = file_stamp(self.path)
        try:
            self._keys, self._revoked = _read(self.path)
        except InputError as error:
            logger.error("%s The keys read before stay valid.", error)
            return
        logger.info("%s: read again, %d keys.", self.path, len(self._keys))

    def _bucket(self, key: ApiKey) -> Bucket:
        if key.digest not in self._buckets:
            if key.token:
                self._forget_ended()
                self._ends[key.digest] = key.token.expires
            self._buckets[key.digest] = Bucket(self.shared / key.digest.hex()[:32] if self.shared else None)
        return self._buckets[key.digest]

    def _forget_ended(self) -> None:
        """Close the buckets of tokens that have run out: each holds a file where workers share it."""
        now = self.tokens.now() if self.tokens else math.inf
        for digest in [one for one, end in self._ends.items() if end < now]:
            del self._ends[digest]
            self._buckets.pop(digest).close()


class Bucket:
    """Keep a token bucket of one second's worth as one number: the time at which it will be full again.

    Whoever used up a slower rate waits no longer than for one token of the new one. With ``path`` the number lies in a
    file that processes share, which the `limits` package has no storage for; monotonic clocks agree within a machine.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600) if path else -1
        if path:
            os.ftruncate(self._file, 8)
        self._full = mmap.mmap(self._file, 8)

    def take(self, rate: float, now: float) -> float:
        """Take a token from a bucket that gains ``rate`` a second: 0, or the seconds until there is one."""
        if self._file >= 0:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            (full,) = struct.unpack("d", self._full[:])
            holds = max(1.0, 1 / rate)  # seconds from empty to full
            full = min(max(full, now), now + holds)
            wait: float = full + 1 / rate - now - holds
            taken = wait <= 1e-9
            self._full[:] = struct.pack("d", full + 1 / rate if taken else full)
            return 0.0 if taken else wait
        finally:
            if self._file >= 0:
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the file; other processes that share it may close it later, or never."""
        self._full.close()
        if self._file >= 0:
            os.close(self._file)


def new_key(name: str, scopes: str, rate: str | None = None) -> Mapping[str, str]:
    """Make a new random ``key``, which is shown once and kept nowhere, and the ``line`` to append to the file."""
    key = f"pkd_{secrets.token_urlsafe(32)}"
    line = " ".join([hashlib.sha256(key.encode()).hexdigest(), name, scopes, *([f"rate={rate}/s"] if rate else [])])
    if not NAME.fullmatch(name):
        raise InputError(f"--new-api-key {name}: give a name of letters, digits, dots, - and _, 64 at most.")
    if (fault := _fault(line.split())) or not RATE.fullmatch(f"rate={rate or 1}/s"):
        raise InputError(f"--new-api-key {name}: {fault or f'{rate} is no rate'}. {LINE}.")
    return {"key": key, "line": line}


def _read(path: Path) -> tuple[tuple[ApiKey, ...], frozenset[str]]:
    """Read the keys of a file, and the ids of the tokens that it revokes."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{path}: {reason}. Give a file of keys, one a line: pkd-serve --new-api-key NAME.") from None
    keys: dict[bytes, ApiKey] = {}
    revoked = set()
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if words[0] == "revoked":
            if len(words) != 2 or not TOKEN_ID.fullmatch(words[1]):
                raise InputError(
                    f"{path}, line {number}: write revoked ID, as the answer that made the token names it."
                )
            revoked.add(words[1])
            continue
        key = _parse(words, f"{path}, line {number}")
        if key.digest in keys:
            raise InputError(f"{path}, line {number}: this hash stands in an earlier line already. Keep one of them.")
        keys[key.digest] = key
    if not keys:
        raise InputError(f"{path}: holds no key. Make one: pkd-serve --new-api-key NAME.")
    return tuple(keys.values()), frozenset(revoked)


def _parse(words: list[str], where: str) -> ApiKey:
    """Read one line. It is never repeated in an error: it may hold a key that was pasted in by mistake."""
    if fault := _fault(words):
        raise InputError(f"{where}: {fault}. {LINE}; a new key: pkd-serve --new-api-key NAME.")
    digest = words[0].lower()
    # `sha256sum` writes "-" for its standard input, and a hash alone was a line before keys had names.
    name = words[1] if words[1:] and words[1] != "-" else f"key-{digest[:8]}"
    scopes = BEFORE_SCOPES
    if len(words) > 2:
        scopes = frozenset() if words[2] == "-" else frozenset(words[2].split(","))
    rate = float(RATE.fullmatch(words[3])[1]) if len(words) > 3 else None  # type: ignore[index]
    return ApiKey(bytes.fromhex(digest), name, scopes, rate)


def _fault(words: list[str]) -> str | None:
    if not HASH.fullmatch(words[0].lower()):
        return "no SHA-256 hash at its start"
    if words[1:] and words[1] != "-" and not NAME.fullmatch(words[1]):
        return "its second word is no name of letters, digits, dots, - and _"
    if words[2:] and words[2] != "-" and not set(words[2].split(",")) <= set(SCOPES):
        return "its third word is no list of scopes; a comment takes a line of its own that begins with #"
    if words[3:] and (not (rate := RATE.fullmatch(words[3])) or not float(rate[1])):
        return "its fourth word is no rate such as rate=20/s"
    if words[4:]:
        return "it has more than four words"
    return None
