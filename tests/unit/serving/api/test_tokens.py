"""Short-lived tokens: what they open, and that each thing that they may not do is refused for its own reason."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pkd.serving.api import tokens as module
from pkd.serving.api.api_keys import SCOPES, ApiKeys, new_key
from pkd.serving.api.problems import Unauthenticated
from pkd.serving.api.tokens import PREFIX, ROUTES, TokenBody, Tokens
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import CROPS, PNG, Fleet, problem

SECRET = bytes(range(32))
BODY = TokenBody(scopes=["verify"], gallery="staff", seconds=60, rate=1000.0)
DOCUMENT = json.loads((Path(__file__).resolve().parents[4] / "docs/openapi.json").read_text(encoding="utf-8"))


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Server:
    """A server with keys, and what a test changes of it."""

    def __init__(self, client: httpx.Client, keys: ApiKeys, clock: Clock, file: Path, fleet: Fleet) -> None:
        self.client, self.keys, self.clock, self.file, self.fleet = client, keys, clock, file, fleet
        self.given: dict[str, str] = {}
        self.lines: dict[str, str] = {}

    def key(self, name: str, scopes: str, rate: str | None = None) -> str:
        made = new_key(name, scopes, rate)
        self.lines[name], self.given[name] = made["line"], made["key"]
        self.write()
        return made["key"]

    def write(self, *more: str) -> None:
        self.file.write_text("\n".join([*self.lines.values(), *more]))
        self.keys.reload()

    def ask(self, bearer: str, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {bearer}", **options.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **options)

    def mint(self, bearer: str, **body: Any) -> httpx.Response:
        return self.ask(bearer, "POST", "/v1/tokens", json={"scopes": ["verify"], "gallery": "staff", **body})

    def token(self, **body: Any) -> str:
        return str(self.mint(self.given["desk"], **{"rate": 1000.0, **body}).json()["token"])


@pytest.fixture(scope="module")
def server(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server with two galleries and a key that may make tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "keys").write_text(new_key("first", "-")["line"])
    keys, clock = ApiKeys.read(folder / "keys"), Clock()
    keys.tokens = Tokens(SECRET, clock)
    with made.serving(fleet, folder / "store", keys) as client:
        server = Server(client, keys, clock, folder / "keys", fleet)
        admin = server.key("admin", ",".join(SCOPES))
        server.key("desk", "verify,embed,mint")
        for name in ("staff", "other"):
            assert server.ask(admin, "PUT", f"/v1/galleries/{name}").status_code == 201
            path = f"/v1/galleries/{name}/subjects/ann/templates"
            answer = server.ask(admin, "POST", path, json={"inputs": [made.image(0)], "aligned": True})
            assert answer.status_code in (200, 201), answer.text
        yield server


def embedding(server: Server) -> dict[str, Any]:
    return made.embedded(server.fleet.first, 0)


def test_a_token_compares_searches_and_reads_the_catalogue(server: Server) -> None:
    answer = server.mint(server.given["desk"], seconds=600, rate=50)
    assert answer.status_code == 201
    body = answer.json()
    assert body["fragment"] == f"#token={body['token']}" and body["token"].startswith(PREFIX)
    assert (body["scopes"], body["gallery"], body["rate"]) == (["verify"], "staff", 50)
    assert body["expires"].startswith("2027-01-15T08:10:00")
    assert "key" not in body and server.given["desk"] not in answer.text
    token, query = body["token"], embedding(server)
    verified = server.ask(token, "POST", "/v1/verify", json={"a": query, "b": {"gallery": "staff", "subject": "ann"}})
    assert verified.json()["match"] is True
    assert server.ask(token, "POST", "/verify", json={"a": query, "b": query}).status_code in (200, 409)
    found = server.ask(token, "POST", "/v1/galleries/staff/identify", json={"query": query})
    assert found.json()["candidates"][0]["subject"] == "ann"
    for path in ("encoders", "encoders/first", "encoders/first/artifact", "certificates", "spaces", "galleries/staff"):
        assert server.ask(token, "GET", f"/v1/{path}").status_code == 200, path
        assert server.ask(token, "HEAD", f"/v1/{path}").status_code == 200, path
    assert server.ask(token, "GET", "/v1/detector").status_code == 404  # this server has none


def test_what_the_token_says_of_itself_can_be_read_by_the_page(server: Server) -> None:
    payload = server.token().removeprefix(PREFIX).partition(".")[0]
    said = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert (said["gallery"], said["scopes"]) == ("staff", ["verify"])


PICTURE = {"image_b64": made.image(0)["image_b64"], "aligned": True}
REFUSED: dict[str, Callable[[Server, str], httpx.Response]] = {
    "a picture as the query": lambda s, t: s.ask(
        t, "POST", "/v1/verify", json={"a": PICTURE, "b": {"gallery": "staff", "subject": "ann"}}
    ),
    "a picture as the other side": lambda s, t: s.ask(t, "POST", "/v1/verify", json={"a": embedding(s), "b": PICTURE}),
    "a subject as the query": lambda s, t: s.ask(
        t, "POST", "/v1/verify", json={"a": {"gallery": "staff", "subject": "ann"}, "b": embedding(s)}
    ),
    "a subject of another gallery": lambda s, t: s.ask(
        t, "POST", "/v1/verify", json={"a": embedding(s), "b": {"gallery": "other", "subject": "ann"}}
    ),
    "a search of another gallery": lambda s, t: s.ask(
        t, "POST", "/v1/galleries/other/identify", json={"query": embedding(s)}
    ),
    "a search by a picture in JSON": lambda s, t: s.ask(
        t, "POST", "/v1/galleries/staff/identify", json={"query": PICTURE}
    ),
    "a search by a picture": lambda s, t: s.ask(
        t, "POST", "/v1/galleries/staff/identify?aligned=true", content=made.made.png(CROPS[0]), headers=PNG
    ),
    "another gallery's description": lambda s, t: s.ask(t, "GET", "/v1/galleries/other"),
    "the list of galleries": lambda s, t: s.ask(t, "GET", "/v1/galleries"),
    "embedding a picture": lambda s, t: s.ask(
        t, "POST", "/v1/embed?aligned=true", content=made.made.png(CROPS[0]), headers=PNG
    ),
    "another token": lambda s, t: s.mint(t),
    "metrics": lambda s, t: s.ask(t, "GET", "/metrics"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_token_does_not_open(server: Server, what: str) -> None:
    problem(REFUSED[what](server, server.token()), 403, "forbidden")


REMOVALS = {
    "require_open": {
        "a search of another gallery", "another gallery's description", "the list of galleries", "metrics",
    },
    "require_embedding": {
        "a picture as the query", "a picture as the other side", "a subject as the query",
        "a search by a picture in JSON", "a search by a picture",
    },
    "require_gallery": {"a subject of another gallery"},
}  # fmt: skip


@pytest.mark.parametrize("name", REMOVALS)
def test_each_restriction_is_what_refuses(server: Server, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Without a restriction its requests go through: the tests above would notice that it is gone."""
    for place in ("middleware", "routes.matching"):
        monkeypatch.setattr(f"pkd.serving.api.{place}.{name}", lambda *_: None, raising=False)
    opened = {what for what in REFUSED if REFUSED[what](server, server.token()).status_code != 403}
    assert opened == REMOVALS[name]


def test_every_other_route_is_closed(server: Server) -> None:
    """Ask each route of the contract, so that a new one is closed until somebody opens it."""
    token, opened = server.token(scopes=["verify", "embed"]), set()
    for path, methods in DOCUMENT["paths"].items():
        for method in methods:
            if path in ("/healthz", "/readyz"):
                continue
            at = re.sub(r"\{gallery\}", "staff", re.sub(r"\{(?!gallery)\w+\}", "first", path))
            answer = server.ask(token, method.upper(), at, **({"json": {}} if method == "post" else {}))
            if answer.status_code != 403:
                opened.add(f"{method} {path}")
    assert opened == {
        "get /v1/encoders", "get /v1/encoders/{encoder}", "get /v1/encoders/{encoder}/artifact", "get /v1/detector",
        "get /v1/devices/{device_class}/latest",
        "get /v1/spaces", "get /v1/certificates", "get /v1/galleries/{gallery}", "post /v1/verify", "post /v1/embed",
        "post /v1/galleries/{gallery}/identify",
    }  # fmt: skip


def test_embedding_takes_its_own_scope(server: Server) -> None:
    def embed(token: str) -> httpx.Response:
        return server.ask(token, "POST", "/embed?aligned=true", content=made.made.png(CROPS[0]), headers=PNG)

    assert embed(server.token(scopes=["embed", "verify"])).status_code == 200
    problem(embed(server.token()), 403, "forbidden")
    only = server.token(scopes=["embed"])
    assert embed(only).status_code == 200
    for path in ("/v1/verify", "/v1/galleries/staff/identify"):
        assert problem(server.ask(only, "POST", path, json={}), 403, "forbidden")["scope"] == "verify"


def test_a_token_runs_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    token = server.token(seconds=60)
    monkeypatch.setattr(server.clock, "now", server.clock.now + 59)
    assert server.ask(token, "GET", "/v1/encoders").status_code == 200
    monkeypatch.setattr(server.clock, "now", server.clock.now + 1)
    assert "run out" in problem(server.ask(token, "GET", "/v1/encoders"), 401, "auth")["detail"]


def test_a_token_is_revoked_by_a_line(server: Server) -> None:
    answer, other = server.mint(server.given["desk"]).json(), server.token()
    server.write(f"revoked {answer['id']}")
    try:
        assert "revoked" in problem(server.ask(answer["token"], "GET", "/v1/encoders"), 401, "auth")["detail"]
        assert server.ask(other, "GET", "/v1/encoders").status_code == 200
    finally:
        server.write()
    assert server.ask(answer["token"], "GET", "/v1/encoders").status_code == 200


def test_a_token_ends_with_its_key_and_with_its_keys_scopes(server: Server) -> None:
    server.key("till", "verify,mint")
    token = server.mint(server.given["till"]).json()["token"]
    query = {"query": embedding(server)}
    assert server.ask(token, "POST", "/v1/galleries/staff/identify", json=query).status_code == 200
    line = server.lines["till"]
    server.lines["till"] = line.replace("verify,mint", "embed,mint")
    server.write()
    problem(server.ask(token, "POST", "/v1/galleries/staff/identify", json=query), 403, "forbidden")
    server.lines["till"] = line.replace("verify,mint", "verify")
    server.write()
    problem(server.ask(token, "GET", "/v1/encoders"), 401, "auth")
    del server.lines["till"]
    server.write()
    assert "key that made" in problem(server.ask(token, "GET", "/v1/encoders"), 401, "auth")["detail"]


def test_both_rates_hold(server: Server) -> None:
    token = server.token(rate=1)
    assert server.ask(token, "GET", "/v1/encoders").status_code == 200
    assert problem(server.ask(token, "GET", "/v1/encoders"), 429, "rate-limited")["retry_after"] == 1
    assert server.ask(server.token(), "GET", "/v1/encoders").status_code == 200, "each token has a rate of its own"
    server.key("slow", "verify,mint", "0.1")
    token = server.mint(server.given["slow"], rate=1000.0).json()["token"]  # which took the key's first second
    problem(server.ask(token, "GET", "/v1/encoders"), 429, "rate-limited")
    del server.lines["slow"]
    server.write()


@pytest.mark.parametrize(
    ("body", "type"),
    [
        ({"scopes": ["enrol"]}, "invalid-request"),
        ({"scopes": []}, "invalid-request"),
        ({"gallery": "nowhere"}, "unknown-gallery"),
        ({"seconds": 86_401}, "invalid-request"),
        ({"seconds": 9}, "invalid-request"),
        ({"rate": 0}, "invalid-request"),
        ({"key": "x"}, "invalid-request"),
    ],
)
def test_what_cannot_be_made(server: Server, body: dict[str, Any], type: str) -> None:
    assert server.mint(server.given["desk"], **body).json()["type"] == type


def test_no_key_hands_on_what_it_has_not(server: Server) -> None:
    server.key("front", "mint,verify")
    server.key("plain", "verify,embed,admin")
    refused = problem(server.mint(server.given["front"], scopes=["verify", "embed"]), 403, "forbidden")
    assert refused["scope"] == "embed" and "cannot hand it on" in refused["detail"]
    assert problem(server.mint(server.given["plain"]), 403, "forbidden")["scope"] == "mint"


@pytest.mark.parametrize("where", [0, 10, -1])
def test_a_changed_token_is_none(where: int) -> None:
    text, token = Tokens(SECRET).mint(bytes(32), BODY)
    assert Tokens(SECRET).read(text) == token
    body = text.removeprefix(PREFIX)
    changed = list(body)
    changed[where] = "A" if changed[where] != "A" else "B"
    with pytest.raises(Unauthenticated, match="none of this server's"):
        Tokens(SECRET).read(PREFIX + "".join(changed))
    with pytest.raises(Unauthenticated, match="none of this server's"):
        Tokens(bytes(32)).read(text)
    for broken in ("", ".", "x", "x.y", body.partition(".")[0], "ä." + body, body + "A"):
        with pytest.raises(Unauthenticated):
            Tokens(SECRET).read(PREFIX + broken)


def test_a_scope_that_tokens_learn_is_no_scope_without_a_path() -> None:
    scopes = {scope for scope, _ in ROUTES.values() if scope}
    assert scopes == set(module.TokenScope.__args__)  # type: ignore[attr-defined]


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_buckets_of_ended_tokens_are_let_go(tmp_path: Path) -> None:
    """A page takes a token every few minutes: a server that runs for months must not keep a file for each."""
    file = tmp_path / "keys"
    made_key = new_key("desk", "verify,mint")
    file.write_text(made_key["line"])
    keys, clock = ApiKeys.read(file), Clock()
    keys.tokens, keys.shared = Tokens(SECRET, clock), tmp_path
    digest = keys.check(f"Bearer {made_key['key']}").digest
    before = open_files()
    for _ in range(30):
        text, _ = keys.tokens.mint(digest, BODY)
        keys.take(keys.check(f"Bearer {text}"))
        clock.now += 61
    assert not before or open_files() <= before + 2


def test_a_server_without_keys_needs_none(fleet: Fleet, tmp_path: Path) -> None:
    with made.serving(fleet, tmp_path / "store") as client:
        made.gallery(client, "staff")
        answer = client.post("/v1/tokens", json={"scopes": ["verify"], "gallery": "staff"})
        assert "asks for no key" in problem(answer, 422, "invalid-request")["detail"]


def test_a_broken_revocation_is_told_by_its_line(tmp_path: Path) -> None:
    from pkd.toolkit.core.errors import InputError

    file = tmp_path / "keys"
    file.write_text(f"{new_key('desk', 'mint')['line']}\nrevoked all\n")
    with pytest.raises(InputError, match="line 2: write revoked ID"):
        ApiKeys.read(file)
