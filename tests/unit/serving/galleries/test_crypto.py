"""Envelope encryption: what opens what, and what does not."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from pkd.serving.galleries.crypto import DecryptionError, MasterKey
from pkd.toolkit.core.errors import InputError

MASTER = MasterKey(bytes(range(32)))


def test_a_template_opens_in_its_place_only() -> None:
    gallery, wrapped_gallery = MASTER.new_gallery("staff")
    subject, wrapped_subject = gallery.new_subject("ann")
    ciphertext = subject.encrypt(b"vector", "1", "teacher")
    opened = MASTER.gallery("staff", wrapped_gallery).subject("ann", wrapped_subject)
    assert opened.decrypt(ciphertext, "1", "teacher") == b"vector"
    other, wrapped_other = gallery.new_subject("bo")
    for attempt in (
        lambda: opened.decrypt(ciphertext, "2", "teacher"),
        lambda: opened.decrypt(ciphertext, "1", "student"),
        lambda: other.decrypt(ciphertext, "1", "teacher"),
        lambda: opened.decrypt(ciphertext[:-1] + bytes([ciphertext[-1] ^ 1]), "1", "teacher"),
        lambda: opened.decrypt(b"", "1", "teacher"),
        lambda: gallery.subject("ann", wrapped_other),
        lambda: MASTER.gallery("guests", wrapped_gallery),
        lambda: MasterKey(bytes(32)).gallery("staff", wrapped_gallery),
    ):
        with pytest.raises(DecryptionError):
            attempt()


def test_many_open_as_one_by_one_does() -> None:
    gallery, _ = MASTER.new_gallery("stäff")
    rows = []
    for number, name in enumerate(["ann", "bo", "Zoë"]):
        key, wrapped = gallery.new_subject(name)
        rows.append((name, wrapped, str(number), key.encrypt(name.encode(), str(number), "e")))
    (ann, key, _, ciphertext) = rows[0]  # type: ignore[assignment]
    rows += [(ann, key, "9", ciphertext), ("bo", key, "0", ciphertext), (ann, key, "0", b"short")]  # type: ignore[list-item]
    opened = list(gallery.templates(rows, "e"))
    for (name, wrapped, template, data), found in zip(rows, opened, strict=True):
        try:
            expected: object = gallery.subject(name, wrapped).decrypt(data, template, "e")
        except DecryptionError as error:
            expected = str(error).split(":")[0]
        assert expected == (found if isinstance(found, bytes) else str(found).split(":")[0])
    assert [isinstance(found, bytes) for found in opened] == [True] * 3 + [False] * 3


def test_associated_data_of_two_rows_differ() -> None:
    """Subject "a", template "bc" is not subject "ab", template "c", even under one key."""
    gallery, _ = MASTER.new_gallery("g")
    key, _ = gallery.new_subject("s")
    ciphertext = key.encrypt(b"x", "ab", "c")
    with pytest.raises(DecryptionError):
        key.decrypt(ciphertext, "a", "bc")


def test_the_same_plaintext_is_never_encrypted_alike() -> None:
    gallery, wrapped = MASTER.new_gallery("g")
    key, _ = gallery.new_subject("s")
    assert key.encrypt(b"x", "1", "e") != key.encrypt(b"x", "1", "e")
    assert MASTER.wrap(gallery) != wrapped


def test_a_changed_master_key_needs_gallery_keys_written_anew_only() -> None:
    gallery, _ = MASTER.new_gallery("g")
    key, wrapped_subject = gallery.new_subject("s")
    ciphertext = key.encrypt(b"x", "1", "e")
    after = MasterKey(bytes(32))
    assert after.gallery("g", after.wrap(gallery)).subject("s", wrapped_subject).decrypt(ciphertext, "1", "e") == b"x"


def test_pseudonyms_depend_on_the_gallery_key() -> None:
    first, _ = MASTER.new_gallery("g")
    second, _ = MASTER.new_gallery("g")
    assert first.pseudonym("ann") == first.pseudonym("ann") != first.pseudonym("bo")
    assert first.pseudonym("ann") != second.pseudonym("ann")
    assert first.derive("rotation") != first.derive("pseudonyms")


def test_a_key_file_is_private_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    made = MasterKey.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert MasterKey.read(path) == made
    assert made.key.hex() not in repr(made)
    with pytest.raises(InputError, match="never replaced"):
        MasterKey.create(path)
    path.chmod(0o640)
    with pytest.raises(InputError, match=r"mode 640.*chmod 600"):
        MasterKey.read(path)


@pytest.mark.parametrize("text", ["", "00" * 31, "00" * 33, "zz" * 32, "00" * 32 + " 00"])
def test_what_is_no_key_is_refused_without_being_shown(tmp_path: Path, text: str) -> None:
    path = tmp_path / "master.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(InputError, match="64 hex digits") as caught:
        MasterKey.read(path)
    assert not text or text not in str(caught.value)


def test_a_missing_key_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pkd-gallery new-key"):
        MasterKey.read(tmp_path / "none")
    with pytest.raises(InputError, match="folder"):
        MasterKey.create(tmp_path / "none" / "key")
