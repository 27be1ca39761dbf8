"""Envelope encryption of what a gallery holds. Format: docs/galleries.md.

A master key, kept outside the database, wraps a key per gallery; that wraps a key per subject; that encrypts the
subject's templates. To destroy a wrapped key is to destroy all that it encrypts (crypto-shredding), wherever copies of
the ciphertext remain. Everything is AES-256-GCM (NIST SP 800-38D) with a random 96-bit nonce in front, and its
associated data names the row it belongs to: a row that was moved to another gallery, subject or template, or stamped
with another encoder, does not decrypt.
"""

from __future__ import annotations

import hmac
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pkd.toolkit.core.errors import InputError, NotTrusted
from pkd.toolkit.core.text import decode_text

KEY = 32
"""Length of every key in bytes."""
NONCE = 12
"""Length in bytes of what stands in front of every ciphertext."""
LEVELS = ("gallery", "subject", "template", "encoder")
"""Kinds of the names in associated data, outermost first."""
REASON = "does not decrypt: changed, moved, or encrypted with another key."
_HEX = re.compile(r"\s*([0-9a-fA-F]{64})\s*", re.ASCII)
_MAKE = "Make a key with pkd-gallery new-key FILE"


class DecryptionError(NotTrusted):
    """Ciphertext does not decrypt: changed, moved to another row, or encrypted with another key."""


@dataclass(frozen=True)
class SubjectKey:
    """Encrypt the templates of one subject. ``gallery`` and ``subject`` are names."""

    gallery: str
    subject: str
    key: bytes = field(repr=False)

    @cached_property
    def _cipher(self) -> AESGCM:
        return AESGCM(self.key)

    def encrypt(self, data: bytes, template: str, encoder: str) -> bytes:
        """Encrypt a template. It decrypts only as this very template, of this encoder, subject and gallery."""
        return _encrypt(self._cipher, data, self._associated_data(template, encoder))

    def decrypt(self, ciphertext: bytes, template: str, encoder: str) -> bytes:
        """Return what ``encrypt`` was given; raises DecryptionError."""
        return _decrypt(self._cipher, ciphertext, self._associated_data(template, encoder))

    def _associated_data(self, template: str, encoder: str) -> bytes:
        return _associated_data("template", self.gallery, self.subject, template, encoder)


@dataclass(frozen=True)
class GalleryKey:
    """Wrap the keys of a gallery's subjects, and derive the secrets that go with the gallery."""

    gallery: str
    key: bytes = field(repr=False)

    @cached_property
    def _cipher(self) -> AESGCM:
        return AESGCM(self.key)

    @cached_property
    def _pseudonyms(self) -> bytes:
        return self.derive("pseudonyms")

    def new_subject(self, subject: str) -> tuple[SubjectKey, bytes]:
        """Make a key for a new subject, and the same wrapped, to be stored beside their templates."""
        key = os.urandom(KEY)
        return SubjectKey(self.gallery, subject, key), _encrypt(self._cipher, key, self._associated_data(subject))

    def subject(self, subject: str, wrapped: bytes) -> SubjectKey:
        """Decrypt the key that ``new_subject`` wrapped; raises DecryptionError."""
        return SubjectKey(self.gallery, subject, _decrypt(self._cipher, wrapped, self._associated_data(subject)))

    def templates(
        self, rows: Iterable[tuple[str, bytes, str, bytes]], encoder: str
    ) -> Iterator[bytes | DecryptionError]:
        """Decrypt many templates of an encoder: of each row (subject, their wrapped key, template, ciphertext).

        Equal to ``subject`` and ``decrypt``, row for row, in a third of the time; a failure is yielded, not raised.
        """
        for subject, wrapped, template, ciphertext in rows:
            names = f"{len(self.gallery)}\0{self.gallery}\0{len(subject)}\0{subject}"
            try:
                key = self._cipher.decrypt(wrapped[:NONCE], wrapped[NONCE:], f"subject\0{names}".encode())
                names = f"template\0{names}\0{len(template)}\0{template}\0{len(encoder)}\0{encoder}"
                yield AESGCM(key).decrypt(ciphertext[:NONCE], ciphertext[NONCE:], names.encode())
            except (InvalidTag, ValueError):
                yield DecryptionError(f"{_spoken(names)}: {REASON}")

    def pseudonym(self, subject: str) -> bytes:
        """Return 32 bytes that stand for the subject in the audit log, and mean nothing without this key."""
        return hmac.digest(self._pseudonyms, subject.encode(), "sha256")

    def derive(self, purpose: str) -> bytes:
        """Return a further secret of 32 bytes that goes when this key goes."""
        return hmac.digest(self.key, f"pkd {purpose}".encode(), "sha256")

    def _associated_data(self, subject: str) -> bytes:
        return _associated_data("subject", self.gallery, subject)


@dataclass(frozen=True)
class MasterKey:
    """Wrap the keys of galleries. This key lies in a file, or a secret manager, and never in the database."""

    key: bytes = field(repr=False)

    @cached_property
    def id(self) -> str:
        """Return 16 hex digits that tell master keys apart and do not give the key away."""
        return hmac.digest(self.key, b"pkd master key", "sha256")[:8].hex()

    @cached_property
    def _cipher(self) -> AESGCM:
        return AESGCM(self.key)

    def derive(self, purpose: str) -> bytes:
        """Return a further secret of 32 bytes, which all machines that have this key derive alike."""
        return hmac.digest(self.key, f"pkd {purpose}".encode(), "sha256")

    @classmethod
    def parse(cls, text: str, source: str = "master key") -> MasterKey:
        """Parse 64 hex digits; ``source`` is what the InputError names, which never shows the text."""
        found = _HEX.fullmatch(text)
        if not found:
            raise InputError(f"{source}: not a master key, which is 64 hex digits. {_MAKE}.")
        return cls(bytes.fromhex(found[1]))

    @classmethod
    def read(cls, path: Path) -> MasterKey:
        """Read a key file. Raises InputError: not a key, or others than its owner may read or change it."""
        try:
            with path.open("rb") as file:
                seen = os.fstat(file.fileno())
                mode = stat.S_IMODE(seen.st_mode)
                data = file.read(1024)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}. {_MAKE}.") from None
        # A secret that Kubernetes mounts belongs to root and is read through the group of the pod.
        mounted = os.name == "posix" and seen.st_uid == 0 != os.geteuid()
        if os.name == "posix" and mode & (0o037 if mounted else 0o077):
            raise InputError(
                f"{path}: others than its owner may read or change this master key (mode {mode:o}). "
                f"Run chmod 600 {path}, and pkd-gallery rekey if someone may have seen it."
            )
        return cls.parse(_text(data), str(path))

    @classmethod
    def create(cls, path: Path) -> MasterKey:
        """Write a new key to ``path``, mode 600. Raises InputError if the file exists: a key is never replaced."""
        key = os.urandom(KEY)
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(f"{key.hex()}\n".encode())
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            raise InputError(f"{path} exists already, and a key is never replaced. Choose another name.") from None
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}. Choose a folder you can write to.") from None
        return cls(key)

    def new_gallery(self, gallery: str) -> tuple[GalleryKey, bytes]:
        """Make a key for a new gallery, and the same wrapped, to be stored."""
        key = GalleryKey(gallery, os.urandom(KEY))
        return key, self.wrap(key)

    def gallery(self, gallery: str, wrapped: bytes) -> GalleryKey:
        """Decrypt the key that ``new_gallery`` or ``wrap`` wrapped; raises DecryptionError."""
        return GalleryKey(gallery, _decrypt(self._cipher, wrapped, _associated_data("gallery", gallery)))

    def wrap(self, key: GalleryKey) -> bytes:
        """Wrap a gallery's key under this master key: all that a change of master key has to write anew."""
        return _encrypt(self._cipher, key.key, _associated_data("gallery", key.gallery))


def _text(data: bytes) -> str:
    """Decode a key file; what is no text is no key, either."""
    try:
        return decode_text(data)
    except UnicodeDecodeError:
        return ""


def _encrypt(cipher: AESGCM, data: bytes, associated: bytes) -> bytes:
    nonce = os.urandom(NONCE)
    return nonce + cipher.encrypt(nonce, data, associated)


def _decrypt(cipher: AESGCM, ciphertext: bytes, associated: bytes) -> bytes:
    try:
        return cipher.decrypt(ciphertext[:NONCE], ciphertext[NONCE:], associated)
    except (InvalidTag, ValueError):
        raise DecryptionError(f"{_spoken(associated.decode().split(chr(0), 1)[1])}: {REASON}") from None


def _spoken(names: str) -> str:
    """Put the names in associated data into words."""
    parts = names.removeprefix("template\0").split("\0")[1::2]
    return ", ".join(f"{level} {name}" for level, name in zip(LEVELS, parts, strict=False))


def _associated_data(kind: str, *names: str) -> bytes:
    """Join names, each after its length in characters, so that no two rows have the same associated data."""
    return "\0".join([kind, *[f"{len(name)}\0{name}" for name in names]]).encode()
