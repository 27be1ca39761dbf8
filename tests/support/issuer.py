"""A party that signs tokens, with real keys, as detectors of attacks and OIDC providers are."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
import uuid
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

ALGORITHMS: dict[str, Any] = {
    "RS256": jwt.algorithms.RSAAlgorithm,
    "ES256": jwt.algorithms.ECAlgorithm,
    "EdDSA": jwt.algorithms.OKPAlgorithm,
}


def private(algorithm: str) -> Any:
    """Make a new private key."""
    if algorithm == "RS256":
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return ec.generate_private_key(ec.SECP256R1()) if algorithm == "ES256" else ed25519.Ed25519PrivateKey.generate()


def _text(part: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")


class Issuer:
    """Sign tokens with one key, or with a new one after ``rotate``."""

    def __init__(self, name: str, audience: str, algorithm: str = "EdDSA") -> None:
        self.name, self.audience, self.algorithm = name, audience, algorithm
        self.published: dict[str, dict[str, Any]] = {}
        self.rotate()

    def rotate(self, *, keep: bool = False) -> None:
        """Sign with a new key from now on; ``keep``: publish the old ones, too."""
        self.key, self.kid = private(self.algorithm), uuid.uuid4().hex[:8]
        public = ALGORITHMS[self.algorithm].to_jwk(self.key.public_key(), as_dict=True)
        self.published = {**(self.published if keep else {}), self.kid: {**public, "kid": self.kid, "use": "sig"}}

    @property
    def jwks(self) -> str:
        """Return the published keys."""
        return json.dumps({"keys": list(self.published.values())})

    def write(self, path: Path) -> Path:
        """Publish the keys as a file."""
        part = path.with_name(path.name + ".part")
        part.write_text(self.jwks)
        part.replace(path)
        return path

    def sign(self, *, key: Any = None, algorithm: str | None = None, headers: Any = None, **claims: Any) -> str:
        """Sign a token; claims that are None are left out."""
        now = time.time()
        stated = {"iss": self.name, "aud": self.audience, "iat": now, "exp": now + 60, "sub": "someone", **claims}
        return jwt.encode(
            {name: value for name, value in stated.items() if value is not None},
            self.key if key is None else key,
            algorithm or self.algorithm,
            {name: value for name, value in {"kid": self.kid, **(headers or {})}.items() if value is not None},
        )

    def confused(self, **claims: Any) -> str:
        """Sign a token by HMAC with the published public key as its secret, as PyJWT itself refuses to."""
        head, body, _ = self.sign(**claims).split(".")
        head = _text({"alg": "HS256", "typ": "JWT", "kid": self.kid})
        pem = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        mac = hmac.new(pem, f"{head}.{body}".encode(), hashlib.sha256).digest()
        return f"{head}.{body}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"

    def verdict(self, *digests: str, verdict: str = "live", detector: str = "", **claims: Any) -> str:
        """Sign a verdict of a detector of attacks."""
        pad = {"verdict": verdict, "sha256": list(digests), **({"detector": detector} if detector else {})}
        return self.sign(**{"jti": uuid.uuid4().hex, "pad": pad, **claims})
