"""API keys and addresses."""

from __future__ import annotations

import hashlib

import pytest

from pkd.serving.problems import Problem
from pkd.serving.security import ApiKeys, is_loopback
from pkd.toolkit.errors import InputError


def write(path, *lines):
    path.write_text("\n".join(lines))
    return path


def hashed(key):
    return hashlib.sha256(key.encode()).hexdigest()


def test_any_listed_key_is_accepted(tmp_path):
    path = write(tmp_path / "keys", "# keys", "", hashed("one") + "  -", hashed("två").upper() + " phone")
    keys = ApiKeys.read(path)
    keys.check("Bearer one")
    keys.check("bearer två".encode().decode("latin-1"))  # as ASGI hands header bytes over


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer two", "Basic one", "one", "Bearer one two"])
def test_anything_else_is_401(tmp_path, header):
    keys = ApiKeys.read(write(tmp_path / "keys", hashed("one")))
    with pytest.raises(Problem) as refused:
        keys.check(header)
    assert (refused.value.status, refused.value.type) == (401, "auth")
    assert "WWW-Authenticate" in refused.value.response().headers


def test_a_key_pasted_in_the_clear_is_refused_and_not_repeated(tmp_path):
    path = write(tmp_path / "keys", hashed("one"), "my-secret-key")
    with pytest.raises(InputError, match="line 2: no SHA-256") as refused:
        ApiKeys.read(path)
    assert "my-secret-key" not in str(refused.value)


def test_a_file_without_keys_lets_nobody_in_by_accident(tmp_path):
    with pytest.raises(InputError, match="holds no key"):
        ApiKeys.read(write(tmp_path / "keys", "# none"))
    with pytest.raises(InputError, match="No such file"):
        ApiKeys.read(tmp_path / "missing")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_beyond_loopback(host):
    assert not is_loopback(host)
