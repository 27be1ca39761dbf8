"""Sign the files that an operator answers for: detached ed25519 signatures beside them. Format: docs/certificate.md.

The exact bytes of a file are signed (RFC 8032, pure Ed25519), so no JSON has to be brought into a canonical form, and
plain OpenSSL can check what pkd signed.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from getpass import getpass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pkd.toolkit.core.errors import InputError, NotTrusted

SUFFIX = ".sig"
"""Appended to the whole name of the signed file."""
PASSPHRASE = "PKD_KEY_PASSPHRASE"
"""Environment variable with the passphrase of an encrypted private key."""
MAX_KEY = 64 << 10
"""Bytes; a key file has a few hundred."""
_LINES = re.compile(rb"ed25519 sha256:([0-9a-f]{64})\n([A-Za-z0-9+/]{86}==)\n")
_MAKE = "Make one with pkd-verify --new-key FILE, or openssl genpkey -algorithm ed25519"


@dataclass(frozen=True)
class Signature:
    """Hold what a ``.sig`` file says. ``value``: 64 bytes. ``key``: fingerprint of the key said to have made it."""

    key: str
    value: bytes

    def text(self) -> bytes:
        """Write the file: ``ed25519 <fingerprint>``, then the signature as base64, each on a line of its own."""
        return f"ed25519 {self.key}\n{base64.b64encode(self.value).decode()}\n".encode()

    @classmethod
    def parse(cls, data: bytes, path: str | Path) -> Signature:
        """Read ``data``; ``path`` is what errors name. Raises NotTrusted for anything but the one spelling."""
        found = _LINES.fullmatch(data)
        if found:
            read = cls(f"sha256:{found[1].decode()}", base64.b64decode(found[2]))
            if read.text() == data:  # base64 has several spellings of one value; only one is a signature file
                return read
        raise NotTrusted(f"{path}: not a signature file of pkd. Sign again with --sign KEY.pem.")


@dataclass(frozen=True)
class SigningKey:
    """Hold a private key in memory."""

    private: Ed25519PrivateKey

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the public half."""
        return fingerprint(self.private.public_key())

    def sign(self, data: bytes) -> Signature:
        """Sign ``data`` as it is."""
        return Signature(self.fingerprint, self.private.sign(data))

    @classmethod
    def read(cls, path: Path) -> SigningKey:
        """Read a PKCS#8 PEM file. An encrypted key's passphrase comes from ``$PKD_KEY_PASSPHRASE`` or a prompt.

        Raises InputError: not an ed25519 private key, readable by others, no or a wrong passphrase.
        """
        data, mode = _read(path)
        if b"PUBLIC KEY" in data:
            raise InputError(f"{path}: is a public key; signing needs the private one. {_MAKE}.")
        if os.name == "posix" and mode & 0o077:
            raise InputError(
                f"{path}: others than its owner may read or change this private key (mode {mode:o}). "
                f"Run chmod 600 {path}, and make a new key if someone may have seen it."
            )
        try:
            key = _decrypt(data, path)
        except (ValueError, UnsupportedAlgorithm):
            raise InputError(f"{path}: not a private key in PEM (PKCS#8). {_MAKE}.") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise InputError(f"{path}: is a {_kind(key)} key; pkd signs with ed25519 only. {_MAKE}.")
        return cls(key)


class TrustedKeys:
    """Hold the public keys whose signatures are believed."""

    def __init__(self, keys: Iterable[Ed25519PublicKey]) -> None:
        self._keys = {fingerprint(key): key for key in keys}

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Return the fingerprint of every key, in the order given."""
        return tuple(self._keys)

    @classmethod
    def read(cls, paths: Iterable[Path]) -> TrustedKeys:
        """Read SPKI PEM files. Raises InputError for a private key, another kind of key, or no key."""
        return cls(_public(path) for path in paths)

    def require(
        self, data: bytes, signature: Signature | None, path: str | Path, sign: str = "pkd-evaluate --sign KEY.pem"
    ) -> str:
        """Find the trusted key that signed ``data`` → its fingerprint. Errors name ``path`` and how to sign: ``sign``.

        Raises NotTrusted where it is unsigned, signed by another key, or changed.
        """
        if signature is None:
            raise NotTrusted(f"{path}: is not signed: no {Path(path).name}{SUFFIX} beside it. Sign with {sign}.")
        key = self._keys.get(signature.key)
        if key is None:
            raise NotTrusted(
                f"{path}: is signed by {signature.key}, trusted is {' or '.join(self._keys)}. "
                "Pass that key's public half with --trust-key if you trust it."
            )
        try:
            key.verify(signature.value, data)
        except InvalidSignature:
            raise NotTrusted(
                f"{path}: was changed after {signature.key} signed it, or the signature is another file's. "
                "Do not use it; get the original."
            ) from None
        return signature.key


def signature_path(path: Path) -> Path:
    """Say where the signature of the file at ``path`` lies."""
    return path.with_name(path.name + SUFFIX)


def signature_beside(path: Path) -> Signature | None:
    """Read the signature beside ``path``, unchecked; None where there is none. Raises NotTrusted for a bad one."""
    where = signature_path(path)
    try:
        with where.open("rb") as file:
            data = file.read(MAX_KEY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NotTrusted(f"{where}: {error.strerror}. Make it a readable file.") from None
    return Signature.parse(data, where)


def write_signed(path: Path, data: bytes, key: SigningKey | None) -> None:
    """Write ``data`` and, with a key, its signature beside it; without one, a signature of older data is removed."""
    path.write_bytes(data)
    if key:
        signature_path(path).write_bytes(key.sign(data).text())
    else:
        signature_path(path).unlink(missing_ok=True)


def fingerprint(key: Ed25519PublicKey) -> str:
    """Hash a key's SPKI DER: ``sha256:<64 hex digits>``, as ``openssl pkey -pubin -outform DER | sha256sum`` does."""
    der = key.public_bytes(pem.Encoding.DER, pem.PublicFormat.SubjectPublicKeyInfo)
    return f"sha256:{hashlib.sha256(der).hexdigest()}"


def new_key(path: Path) -> tuple[Path, str]:
    """Write a new private key to ``path`` (mode 600) and its public half beside it; returns where, and its fingerprint.

    Encrypted where ``$PKD_KEY_PASSPHRASE`` is set. Raises InputError if either file exists: a key is never replaced.
    """
    public = path.with_name(f"{path.stem}.pub.pem")
    for taken in (path, public):
        if taken.exists():
            raise InputError(f"{taken} exists already, and a key is never replaced. Choose another name.")
    key = Ed25519PrivateKey.generate()
    secret = os.environ.get(PASSPHRASE, "").encode()
    encryption = pem.BestAvailableEncryption(secret) if secret else pem.NoEncryption()
    private = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, encryption)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(private)
        public.write_bytes(key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo))
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror}. Choose a folder you can write to.") from None
    return public, fingerprint(key.public_key())


def _public(path: Path) -> Ed25519PublicKey:
    data, _ = _read(path)
    if b"PRIVATE KEY" in data:
        raise InputError(
            f"{path}: is a private key, which stays with whoever signs. Pass its public half: "
            f"openssl pkey -in {path} -pubout -out {path.stem}.pub.pem"
        )
    try:
        key = pem.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{path}: not a public key in PEM (SubjectPublicKeyInfo). {_MAKE}.") from None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path}: is a {_kind(key)} key; pkd signs with ed25519 only. {_MAKE}.")
    return key


def _decrypt(data: bytes, path: Path) -> object:
    if b"ENCRYPTED" not in data:
        return pem.load_pem_private_key(data, None)
    secret = os.environ.get(PASSPHRASE)
    if secret is None:
        if not sys.stdin.isatty():
            raise InputError(f"{path}: is encrypted, and there is nobody to ask for the passphrase. Set {PASSPHRASE}.")
        secret = getpass(f"passphrase of {path}: ")
    try:
        return pem.load_pem_private_key(data, secret.encode())
    except (ValueError, TypeError):
        raise InputError(f"{path}: cannot be decrypted: the passphrase is wrong, or the file is damaged.") from None


def _read(path: Path) -> tuple[bytes, int]:
    """Read content and permission bits of a key file."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_KEY), stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. Give a key file. {_MAKE}.") from None


def _kind(key: object) -> str:
    name = type(key).__name__.removeprefix("_")
    return re.sub(r"(Public|Private)Key$", "", name)
