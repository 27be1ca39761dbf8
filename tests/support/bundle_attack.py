"""What tests of attacks on bundles share: two keys, a signed bundle, and how a refusal is seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pkd.toolkit.bundle.bundle import Bundle, write_bundle
from pkd.toolkit.certificates.signing import SigningKey, TrustedKeys
from pkd.toolkit.cli.verification import Check, verify
from pkd.toolkit.core.errors import BundleError, PkdError
from tests.support.bundle_factory import certificate, content

OURS, THEIRS = (SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in (1, 2))
TRUSTED = TrustedKeys([OURS.private.public_key()])


def signed_bundle(folder: Path) -> Path:
    """``folder/signed``: signed by OURS, with a certificate that is not."""
    files, manifest = content()
    own = certificate(manifest.encoder.id, manifest.encoder.id, manifest.encoder.space.id)
    files = {**files, f"certificates/{own.file_name}": own.model_dump_json().encode()}
    return write_bundle(folder / "signed", files, manifest, key=OURS).path


def refused(path: Path, said: str, kind: type[PkdError] = BundleError, keys: TrustedKeys | None = None) -> None:
    """Check that opening says so, and that pkd-verify does, as a failed check instead of a traceback."""
    with pytest.raises(kind, match=said):
        Bundle.open(path, keys)
    assert failed(path, keys)


def failed(path: Path, keys: TrustedKeys | None = None) -> tuple[Check, ...]:
    failures = verify(path, keys).failures
    assert failures
    return failures
