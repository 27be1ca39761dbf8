"""Any change to a signed certificate or to its signature is refused, wherever it is."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.toolkit.certificates.signing import Signature, SigningKey, TrustedKeys
from pkd.toolkit.core.errors import NotTrusted
from tests.support.bundle_factory import certificate

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
TRUSTED = TrustedKeys([KEY.private.public_key()])
MADE = certificate("student@sha256:" + "1" * 64, "teacher@sha256:" + "2" * 64, "teacher@sha256:" + "3" * 64)
DATA = (MADE.model_dump_json(indent=2) + "\n").encode()
SIGNED = KEY.sign(DATA).text()


def believed(data: bytes, signature: bytes) -> bool:
    try:
        TRUSTED.require(data, Signature.parse(signature, "c.json.sig"), "c.json")
    except NotTrusted as error:
        assert str(error).startswith(("c.json: ", "c.json.sig: ")) and "\n" not in str(error)
        return False
    return True


def flipped(data: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


@given(st.integers(0, len(DATA) - 1), st.integers(0, 7))
@settings(max_examples=300)
def test_any_flipped_bit_of_the_certificate(place: int, bit: int) -> None:
    assert believed(DATA, SIGNED)
    assert not believed(flipped(DATA, place, bit), SIGNED)


def test_every_flipped_bit_of_the_signature_file() -> None:
    assert not any(believed(DATA, flipped(SIGNED, place, bit)) for place in range(len(SIGNED)) for bit in range(8))


@given(st.integers(0, len(DATA)), st.integers(0, len(DATA)), st.binary(max_size=20))
@settings(max_examples=200)
def test_any_splice(start: int, length: int, instead: bytes) -> None:
    changed = DATA[:start] + instead + DATA[start + length :]
    assert believed(changed, SIGNED) == (changed == DATA)


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_noise_is_no_signature(noise: bytes) -> None:
    assert not believed(DATA, noise)


@given(st.integers(0, 2**256 - 1))
@settings(max_examples=50)
def test_an_equivalent_scalar_is_refused(multiple: int) -> None:
    """S and S + L verify alike in sloppy implementations (RFC 8032, 8.4): another file for one signature."""
    order = 2**252 + 27742317777372353535851937790883648493
    value = KEY.sign(DATA).value
    scalar = int.from_bytes(value[32:], "little") + order * (1 + multiple % 14)
    if scalar < 2**256:
        forged = Signature(KEY.fingerprint, value[:32] + scalar.to_bytes(32, "little"))
        assert not believed(DATA, forged.text())
