"""API keys: hashed bearer keys from a file, compared in constant time. And which addresses need them."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path

from pkd.serving.problems import Problem
from pkd.toolkit.errors import InputError

HASH = re.compile(r"[0-9a-f]{64}")


class ApiKeys:
    """SHA-256 hashes of the accepted keys. Keys are long and random, so an unsalted fast hash keeps them safe."""

    def __init__(self, hashes: Sequence[str]) -> None:
        self._hashes = [bytes.fromhex(h) for h in hashes]

    @classmethod
    def read(cls, path: str | Path) -> ApiKeys:
        """Read a file with one SHA-256 (64 hex digits) at the start of each line; the rest of a line is a comment."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text file"
            raise InputError(f"{path}: {reason}. Give a file of SHA-256 hashes of keys, one a line.") from None
        hashes = []
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if not HASH.fullmatch(words[0].lower()):
                # The line is not repeated: it may be a key that was pasted in by mistake.
                raise InputError(f'{path}, line {number}: no SHA-256 hash. Make one: printf %s "$key" | sha256sum')
            hashes.append(words[0].lower())
        if not hashes:
            raise InputError(f'{path}: holds no key. Make one: printf %s "$(openssl rand -hex 32)" | sha256sum')
        return cls(hashes)

    def check(self, authorization: str | None) -> None:
        """Raise a 401 Problem unless the ``Authorization`` header carries a known key. Every hash is compared."""
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()  # the bytes that were sent
        known = [hmac.compare_digest(given, accepted) for accepted in self._hashes]
        if scheme.lower() != "bearer" or not any(known):
            raise Problem("auth", "Send `Authorization: Bearer KEY` with a key that this server knows.")


def is_loopback(host: str) -> bool:
    """True where only this machine can connect to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # another name may resolve to anything
