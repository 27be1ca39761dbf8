"""Access tokens of an issuer beside keys: mapped scopes, audience, clocks, rotation, and every known confusion."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("jwt", reason="pyjwt is not installed (extra serve)")

from jwt.algorithms import OKPAlgorithm

from pkd.serving.api.api_keys import ApiKeys, new_key
from pkd.serving.api.oidc import Oidc, OidcConfig
from pkd.serving.core.signed_tokens import Expected, KeySet
from pkd.toolkit.core.errors import InputError
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import problem
from tests.support.issuer import Issuer, private

SCOPES = {"face.read": ["verify"], "face.write": ["enrol", "delete"], "face.all": ["admin", "verify"]}
OWN = new_key("own", "verify")


class Clock:
    """Seconds since start that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module", params=["RS256", "ES256", "EdDSA"])
def issuer(request: pytest.FixtureRequest) -> Issuer:
    return Issuer("https://id.example", "pkd-api", request.param)


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("oidc")


@pytest.fixture(scope="module")
def server(fleet: Any, issuer: Issuer, clock: Clock, folder: Path) -> Iterator[httpx.Client]:
    config = OidcConfig(issuer=issuer.name, audience=issuer.audience, jwks="-", scopes=SCOPES, leeway_seconds=5)
    (folder / "keys.txt").write_text(OWN["line"] + "\n")
    keys = ApiKeys.read(folder / "keys.txt")
    keys.access_tokens = Oidc(config, KeySet(str(issuer.write(folder / "jwks.json")), clock))
    with made.serving(fleet, folder / f"store-{issuer.algorithm}", keys) as client:
        yield client


def ask(client: httpx.Client, token: str, method: str = "GET", path: str = "/v1/galleries") -> httpx.Response:
    return client.request(method, path, headers={"authorization": f"Bearer {token}"})


def test_scopes_are_mapped_and_the_rest_allows_nothing(server: httpx.Client, issuer: Issuer) -> None:
    assert ask(server, issuer.sign(scope="openid face.read")).status_code == 200
    assert ask(server, issuer.sign(scope="face.read face.write"), "PUT", "/v1/galleries/made").status_code == 201
    for scope in ("openid", "verify admin", "", None, 7):
        problem(ask(server, issuer.sign(scope=scope)), 403, "forbidden")
    problem(ask(server, issuer.sign(scope="face.read"), "PUT", "/v1/galleries/g"), 403, "forbidden")
    assert ask(server, issuer.sign(scope=["face.read"])).status_code == 200
    assert ask(server, OWN["key"]).status_code == 200  # keys are taken as before


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"aud": "another-api"}, "another audience"),
        ({"aud": None}, "lacks the claim 'aud'"),
        ({"iss": "https://id.example/"}, "another issuer"),
        ({"exp": time.time() - 20}, "expired"),
        ({"exp": None}, "lacks the claim 'exp'"),
        ({"nbf": time.time() + 86_400}, "not valid yet"),
        ({"iat": time.time() + 86_400}, "not valid yet"),
        ({"sub": None}, "lacks the claim 'sub'"),
    ],
)
def test_every_claim_counts(server: httpx.Client, issuer: Issuer, claims: dict[str, Any], says: str) -> None:
    body = problem(ask(server, issuer.sign(scope="face.read", **claims)), 401, "auth")
    assert says in body["detail"]


def test_clocks_may_differ_a_little(server: httpx.Client, issuer: Issuer) -> None:
    assert ask(server, issuer.sign(scope="face.read", exp=time.time() - 2)).status_code == 200
    assert ask(server, issuer.sign(scope="face.read", iat=time.time() + 3)).status_code == 200
    assert ask(server, issuer.sign(scope="face.read", aud=["x", "pkd-api"])).status_code == 200


def test_confusions(server: httpx.Client, issuer: Issuer) -> None:
    """Use another's key under the right name, no signature, the public key as a secret, a key in the token."""
    other = Issuer(issuer.name, issuer.audience, issuer.algorithm)
    kind = "ES256" if issuer.algorithm != "ES256" else "EdDSA"
    whole = issuer.sign(scope="face.read")
    head, body, signature = whole.split(".")
    forged = other.sign(scope="face.all").split(".")[1]
    for token in (
        issuer.sign(key=other.key, scope="face.read"),
        issuer.sign(key=private(kind), algorithm=kind, scope="face.read"),
        issuer.sign(key="", algorithm="none", scope="face.read"),
        issuer.confused(scope="face.read"),
        issuer.sign(key=other.key, headers={"jwk": other.published[other.kid]}, scope="face.read"),
        issuer.sign(key=other.key, headers={"jku": "https://attacker.example/jwks"}, scope="face.read"),
        issuer.sign(headers={"kid": "../jwks"}, scope="face.read"),
        issuer.sign(headers={"kid": None}, key=other.key, scope="face.read"),
        issuer.sign(headers={"crit": ["exp"]}, scope="face.read"),
        issuer.sign(headers={"typ": "logout+jwt"}, scope="face.read"),
        f"{head}.{forged}.{signature}",
        f"{head}.{body}.",
        f"{head}.{body}.{signature}x",
        f"{head[:-2]}.{body}.{signature}",
        "a.b.c",
        "..",
        "x" * 9000 + "..",
    ):
        answer = problem(ask(server, token), 401, "auth")
        assert token not in json.dumps(answer) and "The access token is not believed" in answer["detail"]
    assert ask(server, whole).status_code == 200


def test_keys_rotate_and_old_ones_are_no_longer_believed(
    server: httpx.Client, issuer: Issuer, clock: Clock, folder: Path
) -> None:
    before = issuer.sign(scope="face.read")
    assert ask(server, before).status_code == 200
    issuer.rotate(keep=True)
    issuer.write(folder / "jwks.json")
    clock.now += 2
    assert ask(server, issuer.sign(scope="face.read")).status_code == 200 == ask(server, before).status_code
    issuer.rotate()
    issuer.write(folder / "jwks.json")
    clock.now += 2
    problem(ask(server, before), 401, "auth")  # also though it was seen before
    assert ask(server, issuer.sign(scope="face.read")).status_code == 200
    (folder / "jwks.json").write_text("broken")
    clock.now += 2
    assert ask(server, issuer.sign(scope="face.read")).status_code == 200  # the keys read last stay


def test_the_holder_is_named_and_kept_to_a_rate(issuer: Issuer, tmp_path: Path) -> None:
    import asyncio

    config = OidcConfig(issuer=issuer.name, audience=issuer.audience, jwks="-", scopes=SCOPES, rate=2)
    oidc = Oidc(config, KeySet(str(issuer.write(tmp_path / "jwks.json"))))
    plain = asyncio.run(oidc.check(issuer.sign(sub="kiosk-1", scope="face.read")))
    again = asyncio.run(oidc.check(issuer.sign(sub="kiosk-1", scope="face.write")))
    mail = asyncio.run(oidc.check(issuer.sign(sub="ann@example.org", scope="face.read")))
    assert plain.name == "oidc.kiosk-1" and plain.rate == 2 and plain.digest == again.digest
    assert mail.name.startswith("oidc.") and "ann" not in mail.name and mail.digest != plain.digest


class Keys(http.server.BaseHTTPRequestHandler):
    """Publish the keys of an issuer over HTTP."""

    issuer: Issuer
    asked = 0

    def do_GET(self) -> None:
        """Answer with the keys, or lead elsewhere."""
        type(self).asked += 1
        moved = self.path == "/moved"
        self.send_response(302 if moved else 200)
        if moved:
            self.send_header("location", "/keys")
        self.end_headers()
        self.wfile.write(self.issuer.jwks.encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_keys_at_an_address_are_fetched_again_for_a_new_one_but_not_for_every_stranger(issuer: Issuer) -> None:
    clock = Clock()
    handler: Any = type("Handler", (Keys,), {"issuer": issuer})
    clock.now = 1000
    listener = http.server.HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{listener.server_port}"
        keys = KeySet(f"{url}/keys", clock)
        old = issuer.kid
        issuer.rotate()
        assert keys.is_due(issuer.kid) and not keys.is_due(old)
        keys.refresh(issuer.kid)
        assert handler.asked == 2 and not keys.is_due(issuer.kid)
        for stranger in ("a", "b", "c"):
            assert not keys.is_due(stranger)
        clock.now += 11
        assert keys.is_due("a")
        with pytest.raises(InputError, match="cannot be fetched"):
            KeySet(f"{url}/moved", clock)
    finally:
        listener.shutdown()
        listener.server_close()


def test_a_token_that_was_believed_is_checked_again_once_it_has_expired(issuer: Issuer, tmp_path: Path) -> None:
    class Counted(KeySet):
        calls = 0

        def claims(self, token: str, expected: Expected) -> dict[str, Any]:
            self.calls += 1
            return super().claims(token, expected)

    now = time.time()
    config = OidcConfig(issuer=issuer.name, audience=issuer.audience, jwks="-", scopes=SCOPES, leeway_seconds=5)
    keys = Counted(str(issuer.write(tmp_path / "jwks.json")))
    oidc, token = Oidc(config, keys, lambda: now), issuer.sign(iat=now, exp=now + 3600)
    for later, calls in ((0, 1), (3600, 1), (6, 2)):  # seconds: 5 are allowed beyond
        now += later
        asyncio.run(oidc.check(token))
        assert keys.calls == calls


def test_the_files_name_what_is_wrong_with_them(tmp_path: Path) -> None:
    good = {"issuer": "i", "audience": "a", "jwks": "jwks.json", "scopes": {"x": ["verify"]}}
    for change, says in (
        ({"scopes": {"x": ["root"]}}, "'x' is mapped to 'root'"),
        ({"scopes": {"x": ["mint"]}}, "'x' is mapped to 'mint'"),
        ({"audience": ""}, "audience"),
        ({"jwks": "http://id.example/keys"}, "Give an https address"),
        ({"algorithms": ["none"]}, "algorithms: Extra inputs"),
    ):
        (tmp_path / "oidc.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match=says):
            Oidc.read(tmp_path / "oidc.json")
    (tmp_path / "oidc.json").write_text(json.dumps(good))
    weak = {"kty": "RSA", "kid": "w", "e": "AQAB", "n": "u" * 171}  # 1024 bits
    leaked = json.loads(OKPAlgorithm.to_jwk(private("EdDSA")))  # a private key has no place here
    assert "d" in leaked
    for keys in ([], [{"kty": "oct", "k": "c2VjcmV0", "kid": "s"}], [weak], [leaked], {"keys": 1}):
        (tmp_path / "jwks.json").write_text(json.dumps({"keys": keys}))
        with pytest.raises(InputError, match=r"jwks\.json: (no JWKS|holds no public key)"):
            Oidc.read(tmp_path / "oidc.json")


def test_metrics_are_open_only_where_the_operator_says_so(fleet: Any, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text(OWN["line"] + "\n")
    keys = ApiKeys.read(tmp_path / "keys.txt")
    with made.serving(fleet, tmp_path / "store", keys) as client:
        problem(client.get("/metrics"), 401, "auth")
        keys.open_metrics = True
        assert client.get("/metrics").status_code == 200
        problem(client.get("/v1/galleries"), 401, "auth")
