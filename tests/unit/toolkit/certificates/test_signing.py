"""Signatures bind a file to a key; whatever else they are shown is refused."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pkd.toolkit.certificates.signing import (
    PASSPHRASE,
    Signature,
    SigningKey,
    TrustedKeys,
    new_key,
    signature_beside,
    signature_path,
    write_signed,
)
from pkd.toolkit.core.errors import InputError, NotTrusted

OPENSSL = shutil.which("openssl")
DATA = b'{"threshold": 0.38}\n'

# RFC 8032, section 7.1, TEST 3: secret key, public key, message, signature.
RFC_SECRET = "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7"
RFC_PUBLIC = "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025"
RFC_SIGNATURE = (
    "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
    "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
)
GOLDEN = """\
ed25519 sha256:8d39ba50abe50f77b6bb8ae7b6927aff7ffbeba35ad2837c0e51e82bcbcc60d5
YpHWV97sJAJIJ+acOr4BowzlSKKEdDpEXjaA19taw6wY/5tTjRbykK5n92CYTcZZSnwV6XFu0o3AJ77O6h7ECg==
"""


def write(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def private_pem(key: object, secret: bytes | None = None) -> bytes:
    encryption = pem.BestAvailableEncryption(secret) if secret else pem.NoEncryption()
    return key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, encryption)  # type: ignore[attr-defined, no-any-return]


def public_pem(key: object) -> bytes:
    return key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[SigningKey, TrustedKeys]:
    public, _ = new_key(tmp_path / "key.pem")
    return SigningKey.read(tmp_path / "key.pem"), TrustedKeys.read([public])


def test_the_bytes_of_a_signature_file_are_pinned() -> None:
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(RFC_SECRET)))
    der = bytes.fromhex("302a300506032b6570032100" + RFC_PUBLIC)  # RFC 8410: the algorithm, then the key
    assert key.fingerprint == f"sha256:{hashlib.sha256(der).hexdigest()}"
    made = key.sign(bytes.fromhex("af82"))
    assert made.value.hex() == RFC_SIGNATURE
    assert made.text().decode() == GOLDEN
    assert Signature.parse(GOLDEN.encode(), "x") == made


def test_a_new_pair_signs_and_is_believed(pair: tuple[SigningKey, TrustedKeys], tmp_path: Path) -> None:
    key, trusted = pair
    assert trusted.require(DATA, key.sign(DATA), "c.json") == key.fingerprint == trusted.fingerprints[0]
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
    for name in ("key.pem", "key.pub.pem"):
        with pytest.raises(InputError, match="never replaced"):
            new_key(tmp_path / name)


def test_a_signature_lies_beside_and_an_old_one_goes(pair: tuple[SigningKey, TrustedKeys], tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    assert signature_beside(path) is None
    write_signed(path, DATA, pair[0])
    assert signature_path(path).name == "c.json.sig"
    pair[1].require(path.read_bytes(), signature_beside(path), path)
    write_signed(path, DATA, None)
    assert signature_beside(path) is None and path.read_bytes() == DATA


def test_unsigned_changed_and_strangers_are_refused_by_name(
    pair: tuple[SigningKey, TrustedKeys], tmp_path: Path
) -> None:
    key, trusted = pair
    stranger = SigningKey(Ed25519PrivateKey.generate())
    with pytest.raises(NotTrusted, match=r"dir/c\.json: is not signed"):
        trusted.require(DATA, None, "dir/c.json")
    with pytest.raises(NotTrusted, match=f"signed by {stranger.fingerprint}, trusted is {key.fingerprint}"):
        trusted.require(DATA, stranger.sign(DATA), "c.json")
    with pytest.raises(NotTrusted, match=r"c\.json: was changed after"):
        trusted.require(DATA + b" ", key.sign(DATA), "c.json")
    posing = Signature(key.fingerprint, stranger.sign(DATA).value)  # claims to be the trusted key's
    with pytest.raises(NotTrusted, match="was changed after"):
        trusted.require(DATA, posing, "c.json")


def test_several_keys_are_trusted_alike(tmp_path: Path) -> None:
    publics = [new_key(tmp_path / f"{i}.pem")[0] for i in range(2)]
    trusted = TrustedKeys.read(publics)
    for i in range(2):
        key = SigningKey.read(tmp_path / f"{i}.pem")
        assert trusted.require(DATA, key.sign(DATA), "x") == key.fingerprint == trusted.fingerprints[i]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"",
        lambda text: text[:-1],
        lambda text: text + b"\n",
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text.replace(b"ed25519", b"ed448"),
        lambda text: text.upper(),
        lambda text: text[:-4] + b"h==\n",  # the same 64 bytes in another spelling of base64
        lambda text: text.splitlines()[1],
        lambda text: b"\xff" * 200,
    ],
)
def test_only_one_spelling_is_a_signature_file(change: Any) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NotTrusted, match=r"c\.json\.sig: not a signature file"):
        Signature.parse(change(GOLDEN.encode()), "c.json.sig")


def test_another_spelling_would_decode_to_the_same_bytes() -> None:
    """The case above is a real one."""
    text = GOLDEN.splitlines()[1]
    assert text[-3] == "g" and base64.b64decode(text) == base64.b64decode(text[:-3] + "h==")


def test_a_folder_as_signature_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.json.sig").mkdir()
    with pytest.raises(NotTrusted, match=r"c\.json\.sig: Is a directory"):
        signature_beside(tmp_path / "c.json")


RSA = rsa.generate_private_key(65537, 2048)
ED = Ed25519PrivateKey.generate()
BAD_PRIVATE = {
    "rsa": (private_pem(RSA), "is a RSA key; pkd signs with ed25519 only"),
    "ec": (private_pem(ec.generate_private_key(ec.SECP256R1())), "is a EC.* key; pkd signs with ed25519 only"),
    "public": (public_pem(ED), "is a public key; signing needs the private one"),
    "empty": (b"", "not a private key in PEM"),
    "text": (b"hello", "not a private key in PEM"),
    "binary": (bytes(range(256)) * 9, "not a private key in PEM"),
    "damaged": (private_pem(ED)[:60], "not a private key in PEM"),
}


@pytest.mark.parametrize("name", BAD_PRIVATE)
def test_what_cannot_sign_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    data, said = BAD_PRIVATE[name]
    with pytest.raises(InputError, match=said):
        SigningKey.read(write(tmp_path / "k.pem", data))


BAD_PUBLIC = {
    "rsa": (public_pem(RSA), "is a RSA key"),
    "private": (private_pem(ED), r"is a private key.* -pubout -out k\.pub\.pem"),
    "encrypted": (private_pem(ED, b"secret"), "is a private key"),
    "empty": (b"", "not a public key in PEM"),
    "text": (b"hello", "not a public key in PEM"),
}


@pytest.mark.parametrize("name", BAD_PUBLIC)
def test_what_cannot_be_trusted_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    data, said = BAD_PUBLIC[name]
    with pytest.raises(InputError, match=said):
        TrustedKeys.read([write(tmp_path / "k.pem", data)])


@pytest.mark.parametrize("read", [SigningKey.read, lambda path: TrustedKeys.read([path])])
def test_a_missing_file_and_a_folder_are_named(tmp_path: Path, read: Any) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=r"none\.pem: No such file"):
        read(tmp_path / "none.pem")
    with pytest.raises(InputError, match="Is a directory"):
        read(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_private_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "k.pem", private_pem(ED), mode)
    with pytest.raises(InputError, match=rf"mode {mode:o}.* chmod 600 "):
        SigningKey.read(path)
    TrustedKeys.read([write(tmp_path / "p.pem", public_pem(ED), mode)])


def test_a_passphrase_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSPHRASE, "correct horse")
    public, fingerprint = new_key(tmp_path / "k.pem")
    assert b"ENCRYPTED" in (tmp_path / "k.pem").read_bytes()
    assert SigningKey.read(tmp_path / "k.pem").fingerprint == fingerprint == TrustedKeys.read([public]).fingerprints[0]
    for wrong in ("", "battery staple"):
        monkeypatch.setenv(PASSPHRASE, wrong)
        with pytest.raises(InputError, match="the passphrase is wrong"):
            SigningKey.read(tmp_path / "k.pem")
    monkeypatch.delenv(PASSPHRASE)
    with pytest.raises(InputError, match=f"Set {PASSPHRASE}"):
        SigningKey.read(tmp_path / "k.pem")


def test_a_passphrase_is_asked_for_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "k.pem", private_pem(ED, b"secret"))
    asked: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("pkd.toolkit.certificates.signing.getpass", lambda prompt: asked.append(prompt) or "secret")  # type: ignore[func-returns-value]
    assert SigningKey.read(path).private.private_bytes_raw() == ED.private_bytes_raw()
    assert asked == [f"passphrase of {path}: "]


@pytest.mark.skipif(OPENSSL is None, reason="no openssl on PATH")
def test_keys_and_signatures_are_openssls_own(tmp_path: Path) -> None:
    """Keys of openssl sign here; signatures and fingerprints are what openssl says, by the documented commands."""
    run = ["bash", "-euc", 'set -o pipefail; eval "$1"', "bash"]
    shell = lambda line: subprocess.run([*run, line], cwd=tmp_path, capture_output=True, text=True, check=False)  # noqa: E731
    made = shell("openssl genpkey -algorithm ed25519 -out k.pem && openssl pkey -in k.pem -pubout -out k.pub.pem")
    assert made.returncode == 0, made.stderr
    (tmp_path / "k.pem").chmod(0o600)
    key = SigningKey.read(tmp_path / "k.pem")
    write_signed(tmp_path / "c.json", DATA, key)
    digest = shell("openssl pkey -pubin -in k.pub.pem -outform DER | openssl dgst -sha256 -r").stdout.split()[0]
    assert f"sha256:{digest}" == key.fingerprint
    check = (
        "tail -n 1 c.json.sig | openssl base64 -d -A > c.sig.bin && "
        "openssl pkeyutl -verify -pubin -inkey k.pub.pem -rawin -in c.json -sigfile c.sig.bin"
    )
    assert "Verified Successfully" in shell(check).stdout
    (tmp_path / "c.json").write_bytes(DATA.replace(b"8", b"9"))
    assert shell(check).returncode != 0
