"""Check tokens that another party has signed (JWS, RFC 7515), against the public keys that it publishes as a JWKS.

What a token may be signed with is decided by the key and never by the token: a public RSA key is no HMAC secret, and
``none`` is no algorithm. What a header says of where its key is to be found (jku, jwk, x5u) is not read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pkd.serving.core.errors import BadToken
from pkd.serving.core.options import is_loopback
from pkd.serving.core.watched_file import file_stamp
from pkd.toolkit.core.errors import InputError, MissingExtra
from pkd.toolkit.core.models import read_json

logger = logging.getLogger("pkd.serving")
ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "P-256": ("ES256",),
    "P-384": ("ES384",),
    "P-521": ("ES512",),
    "Ed25519": ("EdDSA",),
}
"""Kind or curve of a public key → algorithms that it may have signed with, the first one where the key states none."""
MIN_RSA_BITS = 2048
MAX_TOKEN = 8192
"""Longest token, characters."""
MAX_KEYS, MAX_JWKS = 100, 256 << 10
"""Most keys of a JWKS, and its largest size, bytes."""
FETCH_SECONDS = 5.0
REFRESH_SECONDS = 300.0
"""Time after which keys at an address are fetched again, and a file is looked at again a second after the last look."""
UNKNOWN_SECONDS = 10.0
"""Shortest time between two fetches because of a key id that is not known: strangers can write any."""


@dataclass(frozen=True)
class Expected:
    """Say what a token must state."""

    issuer: str
    audience: str
    leeway_seconds: float
    """Most that the issuer's clock and this one may be apart, seconds."""
    required: tuple[str, ...] = ("exp", "iat", "iss", "aud", "sub")


class KeySet:
    """Hold the public keys of an issuer, from a JWKS file or address, and follow their rotation.

    Safe to use from several threads. Keys that are gone from a JWKS are no longer trusted once it was read again; one
    that cannot be read leaves the old ones in force and is logged.
    """

    def __init__(self, source: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the keys. Raises InputError for a file or an address that holds none; MissingExtra without PyJWT."""
        try:
            import jwt  # noqa: F401
        except ImportError:
            raise MissingExtra("pyjwt", "serve") from None
        self.source, self._clock = source, clock
        self._url = urlsplit(source) if source.partition("://")[1] else None
        if self._url and self._url.scheme != "https" and not is_loopback(self._url.hostname or ""):
            raise InputError(f"jwks {source}: whoever is in between could exchange the keys. Give an https address.")
        self._reading = threading.Lock()
        self.generation = 0
        """Grows with every change of the keys: what was found by earlier ones is to be checked again."""
        self._stamp: object = None
        self._keys: Mapping[str | None, tuple[Any, tuple[str, ...]]] = {}
        self._looked = self._fetched_for_unknown = -1e9
        self._take(self._load())

    def is_due(self, kid: str | None) -> bool:
        """Tell whether the keys are to be read again before a token of this key id is checked."""
        now = self._clock()
        if now - self._looked >= (REFRESH_SECONDS if self._url else 1.0):
            return True
        return bool(self._url and kid not in self._keys and now - self._fetched_for_unknown >= UNKNOWN_SECONDS)

    def refresh(self, kid: str | None) -> None:
        """Read the keys again if they are due; it may take seconds. One thread does, the others wait for it."""
        with self._reading:
            if not self.is_due(kid):
                return
            if kid not in self._keys:
                self._fetched_for_unknown = self._clock()
            try:
                if self._url or self._file_stamp() != self._stamp:
                    self._take(self._load())
            except InputError as error:
                logger.error("%s The keys read before stay in force.", error)
            self._looked = self._clock()

    def claims(self, token: str, expected: Expected) -> dict[str, Any]:
        """Return what a token states, once signature, issuer, audience and times are checked. Raises BadToken."""
        import jwt

        head = header(token)
        if head.get("crit"):
            raise BadToken("it has critical extensions, which are not known here.")
        kid = head.get("kid")
        found = self._keys.get(kid)
        if found is None and kid is None and len(self._keys) == 1:
            (found,) = self._keys.values()
        if found is None:
            raise BadToken("it names no key that its issuer publishes." if kid else "it does not name its key (kid).")
        key, algorithms = found
        if head.get("alg") not in algorithms:
            raise BadToken(f"its algorithm is not one of its key, {' or '.join(algorithms)}.")
        options: Any = {"require": list(expected.required), "enforce_minimum_key_length": True}
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=list(algorithms),
                audience=expected.audience,
                issuer=expected.issuer,
                leeway=expected.leeway_seconds,
                options=options,
            )
        except jwt.ExpiredSignatureError:
            raise BadToken("it has expired.") from None
        except jwt.ImmatureSignatureError:
            raise BadToken("it is not valid yet: the issuer's clock and this one differ.") from None
        except jwt.MissingRequiredClaimError as error:
            raise BadToken(f"it lacks the claim {error.claim!r}.") from None
        except jwt.InvalidAudienceError:
            raise BadToken("it is meant for another audience.") from None
        except jwt.InvalidIssuerError:
            raise BadToken("it is of another issuer.") from None
        except Exception:  # PyJWT and cryptography raise several kinds for what is malformed
            raise BadToken("its signature does not fit.") from None
        return claims

    def _take(self, keys: Mapping[str | None, tuple[Any, tuple[str, ...]]]) -> None:
        self._keys = keys
        self.generation += 1
        self._looked = self._clock()

    def _load(self) -> Mapping[str | None, tuple[Any, tuple[str, ...]]]:
        self._stamp = self._file_stamp()
        text = _fetch(self.source) if self._url else _read(Path(self.source))
        try:
            listed = read_json(text, f"jwks {self.source}")["keys"]
            if not isinstance(listed, list) or not 0 < len(listed) <= MAX_KEYS:
                raise ValueError
            keys = [found for one in listed if (found := _parse(one))]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f'jwks {self.source}: no JWKS, {{"keys": […]}} of 1 to {MAX_KEYS} public keys.') from None
        if not keys:
            kinds = ", ".join(ALGORITHMS)
            raise InputError(f"jwks {self.source}: holds no public key for signatures of a kind in {kinds}.")
        if len({kid for kid, _, _ in keys}) < len(keys):
            raise InputError(f"jwks {self.source}: two keys have one id (kid), or none. Give each its own.")
        return {kid: (key, algorithms) for kid, key, algorithms in keys}

    def _file_stamp(self) -> object:
        return None if self._url else file_stamp(Path(self.source))


def header(token: str) -> dict[str, Any]:
    """Read the header of a token, of which nothing is proven yet. Raises BadToken for what is no signed token."""
    import jwt

    if len(token) > MAX_TOKEN:
        raise BadToken(f"it is longer than {MAX_TOKEN:,} characters.")
    try:
        found: dict[str, Any] = jwt.get_unverified_header(token)
    except Exception:  # as above
        raise BadToken("it is no signed token of three parts (JWS).") from None
    return found


def looks_signed(text: str) -> bool:
    """Tell whether a credential may be a signed token: three parts joined by dots, which no key of pkd has."""
    return text.count(".") == 2


def _parse(one: Any) -> tuple[str | None, Any, tuple[str, ...]] | None:
    """Read one key of a JWKS; None for one that is not for signatures, or of a kind that is not taken."""
    import jwt

    kind = one["kty"] if one["kty"] == "RSA" else one.get("crv")
    if kind not in ALGORITHMS or one.get("use", "sig") != "sig" or "verify" not in one.get("key_ops", ["verify"]):
        return None
    stated = one.get("alg")
    if stated is not None and stated not in ALGORITHMS[kind]:
        return None
    if "d" in one:
        raise ValueError  # a private key has no place here
    try:
        key = jwt.PyJWK(one, algorithm=stated or ALGORITHMS[kind][0]).key
    except jwt.exceptions.PyJWTError:
        raise ValueError from None
    if kind == "RSA" and key.key_size < MIN_RSA_BITS:
        raise ValueError
    kid = one.get("kid")
    return (None if kid is None else str(kid)), key, (stated,) if stated else ALGORITHMS[kind]


class _NoRedirect(HTTPRedirectHandler):
    """Follow nothing: the address was chosen by the operator."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse."""
        return


def _fetch(url: str) -> bytes:
    try:
        request = Request(url, headers={"Accept": "application/json"})
        with build_opener(_NoRedirect).open(request, timeout=FETCH_SECONDS) as answer:
            data: bytes = answer.read(MAX_JWKS + 1)
    except (URLError, OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise InputError(
            f"jwks {url}: cannot be fetched: {why}. Is the issuer up, and its certificate known?"
        ) from None
    if len(data) > MAX_JWKS:
        raise InputError(f"jwks {url}: is over {MAX_JWKS:,} bytes.")
    return data


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_JWKS)
    except OSError as error:
        raise InputError(
            f"jwks {path}: {error.strerror}. Give a file or an https address with the issuer's keys."
        ) from None
