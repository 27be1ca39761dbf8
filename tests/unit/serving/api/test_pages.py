"""Files for browsers: what is served, under which headers, to whom, and what is not."""

from __future__ import annotations

import gzip
import hashlib
import http.client
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pkd.serving.api import pages
from pkd.serving.api.api_keys import ApiKeys, new_key
from pkd.serving.core.options import Settings
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.service import Service
from pkd.serving.web import FOLDER
from tests.support import serving_bundles as made

WASM = "/web/vendor/ort-wasm-simd-threaded.wasm"
SERVED = sorted(
    f"/web/{path.relative_to(FOLDER).as_posix().removesuffix('.gz')}"
    for path in FOLDER.rglob("*")
    if path.suffix in {".html", ".js", ".mjs", ".css", ".gz"}
)


@pytest.fixture(scope="module")
def client(family: made.Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Run a server with keys, and ask it without one."""
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(new_key("kiosk", "verify")["line"])
    service = Service(Encoders.open(family.folders[:1]), Settings(threads=1))
    with made.running(service, ApiKeys.read(file)) as client:
        yield client


@pytest.mark.parametrize("path", SERVED)
def test_every_file_comes_without_a_key_and_with_every_header(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    for name, value in pages.HEADERS.items():
        assert answer.headers[name] == value, name
    suffix = Path(path).suffix
    kind = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".html": "text/html"}
    assert answer.headers["content-type"].partition(";")[0] == kind.get(suffix, "application/wasm")
    again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", answer.headers["etag"])
    assert again.headers["content-security-policy"] == pages.POLICY, "a cached file keeps the headers of its 304"


def test_the_policy_lets_in_nothing_from_elsewhere_and_nothing_inline() -> None:
    rules = dict(rule.split(" ", 1) for rule in pages.POLICY.split("; "))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'" and rules["worker-src"] == "'self'"
    assert rules["script-src"] == "'self' 'wasm-unsafe-eval'"
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert "unsafe-inline" not in pages.POLICY and "*" not in pages.POLICY


@pytest.mark.parametrize(
    ("accepted", "zipped"),
    [("gzip", True), ("br, gzip;q=0.5", True), ("*", True), ("identity", False), ("gzip;q=0", False), (None, False)],
)
def test_the_module_is_sent_compressed_to_whoever_takes_it(
    client: httpx.Client, accepted: str | None, zipped: bool
) -> None:
    assert client.base_url.port
    connection = http.client.HTTPConnection("127.0.0.1", client.base_url.port)
    connection.request("GET", WASM, headers={"accept-encoding": accepted} if accepted else {})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert (answer.getheader("content-encoding") == "gzip") == zipped
    plain = gzip.decompress((FOLDER / "vendor/ort-wasm-simd-threaded.wasm.gz").read_bytes())
    assert hashlib.sha256(gzip.decompress(body) if zipped else body).digest() == hashlib.sha256(plain).digest()
    assert plain[:4] == b"\0asm"


@pytest.mark.parametrize(
    "path",
    [
        "/web/", "/web/__init__.py", "/web/device/package.json", "/web/vendor/SHA256SUMS", "/web/nothing.js",
        "/web/../api/pages.py", "/web/%2e%2e/%2e%2e/serving/web/__init__.py", "/web//etc/passwd",
        "/web/vendor/ort-wasm-simd-threaded.wasm.gz",
    ],
)  # fmt: skip
def test_nothing_else_of_the_disk_is_served(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code in (401, 404), path
    assert answer.headers["content-type"] == "application/problem+json"


def test_routes_of_the_api_still_want_a_key(client: httpx.Client) -> None:
    for path in ("/v1/encoders", "/v1/detector", "/webs", "/v1/web/page.js", "/metrics"):
        assert client.get(path).status_code == 401, path


def test_a_server_can_do_without_a_page(family: made.Family) -> None:
    from starlette.testclient import TestClient

    from pkd.serving.api.app import create_app

    service = Service(Encoders.open(family.folders[:1]), Settings(threads=1))
    with TestClient(create_app(service, page=False)) as client:
        for path in ("/", "/console", SERVED[0]):
            assert client.get(path).status_code == 404, path
