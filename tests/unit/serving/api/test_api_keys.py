"""API keys and addresses."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from pkd.serving.api.api_keys import (
    ANONYMOUS,
    BEFORE_SCOPES,
    IN_SCOPE,
    SCOPES,
    ApiKeys,
    Bucket,
    new_key,
    require,
)
from pkd.serving.api.problems import problem_response, problem_type
from pkd.serving.core.options import is_loopback
from pkd.toolkit.core.errors import InputError, PkdError


def write(path: Path, *lines: Any) -> Any:
    path.write_text("\n".join(lines))
    return path


def hashed(key: Any) -> Any:
    return hashlib.sha256(key.encode()).hexdigest()


def test_any_listed_key_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "keys", "# keys", "", hashed("one") + "  -", hashed("två").upper() + " phone")
    keys = ApiKeys.read(path)
    assert keys.check("Bearer one").name == f"key-{hashed('one')[:8]}"
    assert keys.check("bearer två".encode().decode("latin-1")).name == "phone"  # as ASGI hands header bytes over
    assert keys.check("Bearer one").scopes == BEFORE_SCOPES


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer two", "Basic one", "one", "Bearer one two"])
def test_anything_else_is_401(tmp_path: Path, header: str) -> None:
    keys = ApiKeys.read(write(tmp_path / "keys", hashed("one")))
    with pytest.raises(PkdError) as refused:
        keys.check(header)
    assert problem_type(refused.value)[:2] == ("auth", 401)
    assert "WWW-Authenticate" in problem_response(refused.value).headers


def test_a_key_pasted_in_the_clear_is_refused_and_not_repeated(tmp_path: Path) -> None:
    path = write(tmp_path / "keys", hashed("one"), "my-secret-key")
    with pytest.raises(InputError, match=r"line 2: no SHA-256 hash at its start.*--new-api-key") as refused:
        ApiKeys.read(path)
    assert "my-secret-key" not in str(refused.value)


def test_a_file_without_keys_lets_nobody_in_by_accident(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no key"):
        ApiKeys.read(write(tmp_path / "keys", "# none"))
    with pytest.raises(InputError, match="No such file"):
        ApiKeys.read(tmp_path / "missing")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("secret-word? embed", "second word is no name"),
        ("phone of secret-word", "third word is no list of scopes; a comment"),
        ("phone embed,fly", "third word is no list of scopes"),
        ("phone embed, verify", "third word"),
        ("phone embed 20/s", "no rate such as rate=20/s"),
        ("phone embed rate=0/s", "no rate"),
        ("phone embed rate=-1/s", "no rate"),
        ("phone embed rate=1/s secret-word", "more than four words"),
    ],
)
def test_a_line_that_cannot_be_meant_is_refused_with_the_remedy(tmp_path: Path, words: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"line 1: .*{said}.*Write SHA256 NAME SCOPES") as refused:
        ApiKeys.read(write(tmp_path / "keys", f"{hashed('one')} {words}"))
    assert "secret-word" not in str(refused.value) and hashed("one") not in str(refused.value)


def test_the_same_key_twice_is_refused_and_a_name_twice_is_a_change_of_keys(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 2: this hash stands in an earlier line"):
        ApiKeys.read(write(tmp_path / "keys", hashed("one") + " a embed", hashed("one").upper() + " b admin"))
    keys = ApiKeys.read(write(tmp_path / "keys", hashed("old") + " kiosk embed", hashed("new") + " kiosk embed"))
    assert {keys.check(f"Bearer {key}").name for key in ("old", "new")} == {"kiosk"}


def request(key: Any) -> Any:
    return Request({"type": "http", IN_SCOPE: key})


def test_a_key_may_do_what_its_line_says_and_nothing_else(tmp_path: Path) -> None:
    keys = ApiKeys.read(write(tmp_path / "keys", f"{hashed('a')} kiosk embed,enrol", f"{hashed('b')} scraper -"))
    kiosk, scraper = keys.check("Bearer a"), keys.check("Bearer b")
    for scope in SCOPES:
        if scope in ("embed", "enrol"):
            assert require(request(kiosk), scope) == "kiosk"
        for key in (kiosk, scraper):
            if scope not in key.scopes:
                with pytest.raises(PkdError) as refused:
                    require(request(key), scope)
                assert problem_type(refused.value)[:2] == ("forbidden", 403)
                assert scope in str(refused.value)
        assert require(request(None), scope) == ANONYMOUS
    with pytest.raises(ValueError, match=r"no scopes .*'enroll'"):
        require(request(None), "enroll")
    assert require(request(kiosk), "verify", "enrol") == "kiosk"
    with pytest.raises(PkdError, match="lacks the scope verify or admin"):
        require(request(kiosk), "verify", "admin")
    with pytest.raises(KeyError):  # a request that did not come through the door
        require(Request({"type": "http"}), "embed")


class Clock:
    """Tell the time that a test sets."""

    now = 100.0

    def __call__(self) -> Any:
        return self.now


def limited(path: Path, clock: Any, rate: Any) -> Any:
    return ApiKeys.read(write(path, f"{hashed('one')} kiosk embed rate={rate}/s"), clock)


def refusal(keys: Any) -> Any:
    with pytest.raises(PkdError) as refused:
        keys.take(keys.check("Bearer one"))
    assert problem_type(refused.value)[:2] == ("rate-limited", 429)
    return int(problem_response(refused.value).headers["retry-after"])


def test_a_rate_holds_over_time_and_says_truly_when_the_next_request_is_taken(tmp_path: Path) -> None:
    clock = Clock()
    keys = limited(tmp_path / "keys", clock, 4)
    for _ in range(4):
        keys.take(keys.check("Bearer one"))
    assert refusal(keys) == 1
    clock.now += 0.26
    keys.take(keys.check("Bearer one"))
    refusal(keys)
    taken = 0
    for _ in range(1000):  # ten seconds of a client that does not listen
        clock.now += 0.01
        try:
            keys.take(keys.check("Bearer one"))
            taken += 1
        except PkdError:
            pass
    assert taken == 40


def test_less_than_one_request_a_second(tmp_path: Path) -> None:
    clock = Clock()
    keys = limited(tmp_path / "keys", clock, 0.2)
    keys.take(keys.check("Bearer one"))
    clock.now += 1.5
    wait = refusal(keys)
    assert wait == 4
    clock.now += wait
    keys.take(keys.check("Bearer one"))


def test_a_raised_rate_holds_at_once(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "keys"
    keys = limited(path, clock, 0.001)
    keys.take(keys.check("Bearer one"))
    assert refusal(keys) == 1000
    write(path, f"{hashed('one')} kiosk embed rate=100/s")
    clock.now += 10
    assert refusal(keys) == 1
    for _ in range(200):
        clock.now += 0.01
        keys.take(keys.check("Bearer one"))


def test_wrong_keys_use_up_nobody_s_rate(tmp_path: Path) -> None:
    clock = Clock()
    keys = limited(tmp_path / "keys", clock, 1)
    for _ in range(5):
        with pytest.raises(PkdError, match="a key that this server knows"):
            keys.check("Bearer two")
    keys.take(keys.check("Bearer one"))


def test_processes_share_a_rate(tmp_path: Path) -> None:
    """Two processes that take as fast as they can get what one would: the burst, and the rate after it."""
    code = (
        "import sys, time; from pathlib import Path; from pkd.serving.api.api_keys import Bucket\n"
        "bucket, taken, end = Bucket(Path(sys.argv[1])), 0, time.monotonic() + 0.5\n"
        "while (now := time.monotonic()) < end: taken += bucket.take(100, now) == 0\n"
        "print(taken)"
    )
    begun = time.monotonic()
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "bucket")], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    taken = [int(one.communicate(timeout=60)[0]) for one in both]
    assert min(taken) > 0
    assert 100 < sum(taken) <= 100 + 100 * (time.monotonic() - begun) + 1
    assert Bucket().take(1, 5.0) == 0.0


def test_a_changed_file_is_read_again_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, path = Clock(), tmp_path / "keys"
    keys = limited(path, clock, 9)
    write(path, f"{hashed('two')} phone embed,admin")
    clock.now += 0.5
    assert keys.check("Bearer one").name == "kiosk"  # not looked at yet
    clock.now += 0.6
    assert keys.check("Bearer two").name == "phone"
    with pytest.raises(PkdError):
        keys.check("Bearer one")
    for change in (lambda: write(path, "not a key"), path.unlink):
        change()
        clock.now += 1.1
        assert keys.check("Bearer two").name == "phone"
        assert "stay valid" in caplog.text and "not a key" not in caplog.text
        caplog.clear()
    other = write(tmp_path / "other", f"{hashed('three')} pad embed")
    other.replace(path)  # as Kubernetes swaps a mounted secret
    keys.reload()  # as SIGHUP asks
    assert keys.check("Bearer three").name == "pad"


def test_a_file_that_could_not_be_read_is_read_once_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after chmod: its content and the time of its last change are as they were."""
    clock, path = Clock(), tmp_path / "keys"
    keys = limited(path, clock, 9)
    read = Path.read_bytes

    def refused(self: Path, *args: Any, **named: Any) -> None:
        raise PermissionError(13, "Permission denied")

    write(path, f"{hashed('two')} phone embed,admin").chmod(0)
    monkeypatch.setattr(Path, "read_bytes", refused)  # who runs the tests may be root, who may read everything
    clock.now += 1.1
    assert keys.check("Bearer one").name == "kiosk"
    monkeypatch.setattr(Path, "read_bytes", read)
    time.sleep(0.02)  # file systems have a clock that ticks every 10 ms or faster
    path.chmod(0o600)
    clock.now += 1.1
    assert keys.check("Bearer two").name == "phone"


def test_a_new_key_works_once_its_line_is_in_the_file(tmp_path: Path) -> None:
    made = new_key("kiosk-1", "embed,verify", "20")
    assert made != new_key("kiosk-1", "embed,verify", "20")
    key = ApiKeys.read(write(tmp_path / "keys", made["line"])).check(f"Bearer {made['key']}")
    assert (key.name, key.scopes, key.rate) == ("kiosk-1", {"embed", "verify"}, 20.0)
    assert made["key"] not in made["line"]


@pytest.mark.parametrize(
    "given",
    [("a b", "embed", None), ("-", "embed", None), ("a", "all", None), ("a", "embed", "fast"), ("a", "embed", "0")],
)
def test_a_new_key_that_no_file_would_take(given: Any) -> None:
    with pytest.raises(InputError, match=f"--new-api-key {given[0]}"):
        new_key(*given)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_beyond_loopback(host: str) -> None:
    assert not is_loopback(host)
