"""What holds for every route: HEAD, the methods that a path takes, its query parameters, and bodies that are whole."""

from __future__ import annotations

import asyncio
import gzip
from typing import Any

import httpx
import pytest

from pkd.serving.api import app
from pkd.serving.api.routes import parameters
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import ALIGNED, CROPS, PNG, problem

FILE = made.made.png(CROPS[0])


@pytest.fixture(scope="module")
def client(client: httpx.Client) -> httpx.Client:
    made.gallery(client, "g")
    made.enrol(client, "g", "ann", made.image(0))
    return client


class TestHead:
    """HEAD answers as GET does, without a body."""

    @pytest.mark.parametrize(
        "path",
        [
            "/healthz", "/readyz", "/openapi.json", "/docs", "/v1/encoders", "/v1/encoders/first", "/v1/certificates",
            "/v1/galleries", "/v1/galleries/g", "/v1/galleries/g/subjects/ann", "/v1/encoders/first/artifact",
            "/v1/encoders/first/artifact?as=bundle", "/v1/galleries/nowhere", "/v1/encoders?x=1", "/nowhere",
        ],
    )  # fmt: skip
    def test_is_get_without_the_body(self, client: httpx.Client, path: str) -> None:
        whole, head = client.get(path), client.head(path)
        assert head.content == b"" and whole.content
        assert head.status_code == whole.status_code
        own = {"date": "", "x-request-id": ""}
        assert {**head.headers, **own} == {**whole.headers, **own}
        assert int(head.headers["content-length"]) == len(whole.content)

    def test_of_an_artifact_that_is_known_and_of_a_part(self, client: httpx.Client) -> None:
        url = "/v1/encoders/first/artifact"
        whole = client.head(url)
        assert client.head(url, headers={"if-none-match": whole.headers["etag"]}).status_code == 304
        part = client.head(url, headers={"range": "bytes=0-9"})  # RFC 9110, 14.2: Range is for GET
        assert (part.status_code, part.headers["content-length"]) == (200, whole.headers["content-length"])

    def test_of_a_stream_reads_no_more_than_its_beginning(
        self, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pkd.serving.matching.transfer.of_subject", None)  # no subject could be described
        assert client.head("/v1/galleries/g/export").status_code == 200
        assert client.get("/healthz").status_code == 200

    def test_is_counted_as_such(self, client: httpx.Client) -> None:
        client.head("/v1/galleries/g")
        page = client.get("/metrics").text
        assert 'pkd_requests_total{method="HEAD",route="/v1/galleries/{gallery}",status="200"}' in page

    def test_is_refused_where_get_is(self, client: httpx.Client) -> None:
        answer = client.head("/v1/embed")
        assert (answer.status_code, answer.headers["allow"], answer.content) == (405, "POST", b"")

    def test_nothing_follows_the_first_piece(self) -> None:
        async def api(scope: Any, receive: Any, send: Any) -> None:
            assert (scope["method"], scope["headers"]) == ("GET", [(b"host", b"x")])
            scope["route"] = "the route"
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(2):
                await send({"type": "http.response.body", "body": b"piece", "more_body": True})
            raise AssertionError("it went on")

        sent = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "HEAD", "headers": [(b"range", b"bytes=0-1"), (b"host", b"x")]}
        asyncio.run(app.answer_head(api, scope, None, send))  # type: ignore[arg-type]
        assert [one["type"] for one in sent] == ["http.response.start", "http.response.body"]
        assert sent[1]["more_body"] is False and (scope["method"], scope["route"]) == ("HEAD", "the route")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v1/galleries/x", "DELETE, GET, HEAD, PUT"),
        ("PATCH", "/v1/galleries/g/subjects/ann", "DELETE, GET, HEAD"),
        ("DELETE", "/v1/galleries/g/migrations", "GET, HEAD, POST"),
        ("GET", "/embed", "POST"),
        ("PUT", "/v1/verify", "POST"),
        ("OPTIONS", "/v1/encoders", "GET, HEAD"),
        ("POST", "/healthz", "GET, HEAD"),
        ("POST", "/openapi.json", "GET, HEAD"),
    ],
)
def test_a_405_names_what_the_path_takes(client: httpx.Client, method: str, path: str, allowed: Any) -> None:
    answer = client.request(method, path)
    assert answer.headers["allow"] == allowed
    assert problem(answer, 405, "method-not-allowed")["detail"].endswith(f" Send {allowed}.")


@pytest.mark.parametrize(
    ("method", "path", "takes"),
    [
        ("POST", "/v1/verify", "none"),
        ("POST", "/verify", "none"),
        ("PUT", "/v1/galleries/g", "none"),
        ("GET", "/v1/galleries/g", "none"),
        ("GET", "/v1/galleries", "none"),
        ("DELETE", "/v1/galleries/g", "none"),
        ("GET", "/v1/galleries/g/subjects", "after, limit"),
        ("GET", "/v1/galleries/g/subjects/ann", "none"),
        ("DELETE", "/v1/galleries/g/subjects/ann", "none"),
        ("POST", "/v1/galleries/g/templates:bulk", "none"),
        ("POST", "/v1/galleries/g/import", "none"),
        ("GET", "/v1/galleries/g/export", "none"),
        ("GET", "/v1/galleries/g/migrations", "after, limit"),
        ("POST", "/v1/galleries/g/migrations", "none"),
        ("POST", "/v1/galleries/g/migrations/finish", "none"),
        ("GET", "/v1/encoders", "none"),
        ("GET", "/v1/encoders/first", "none"),
        ("GET", "/v1/encoders/first/artifact", "as, file, target"),
        ("GET", "/v1/spaces", "none"),
        ("GET", "/v1/certificates", "gallery, query"),
        ("POST", "/v1/galleries/g/identify", None),
        ("POST", "/v1/galleries/g/subjects/bob/templates", None),
        ("POST", "/v1/embed", None),
    ],
)
@pytest.mark.parametrize("name", ["retention_second", "limi t"])
def test_a_query_parameter_that_a_route_does_not_have(
    client: httpx.Client, method: str, path: str, takes: Any, name: str
) -> None:
    request = {"content": FILE, "headers": PNG} if takes is None else {}
    params = {**(ALIGNED if takes is None else {}), name: "1", "typo": ""}
    body = problem(client.request(method, path, params=params, **request), 422, "invalid-request")  # type: ignore[arg-type]
    assert [one["field"] for one in body["errors"]] == [name, "typo"]
    if takes:
        assert body["detail"] == f"{name}: no such query parameter; this route takes {takes}."
    assert client.get("/v1/galleries/g/subjects/ann").status_code == 200, "nothing was done"


def test_query_parameters_that_routes_have(client: httpx.Client) -> None:
    for path in (
        "/v1/galleries/g/subjects?after=a&limit=5",
        "/v1/galleries/g/subjects?",
        "/v1/certificates?query=first&gallery=teacher",
        "/v1/encoders/first/artifact?file=encoder.onnx",
        "/healthz?from=probe",
        "/readyz?x",
        "/metrics?x=1",
    ):
        assert client.get(path).status_code == 200, path


def form(*, closed: Any) -> Any:
    """Two images, and the options before them."""
    parts = [b'name="aligned"\r\n\r\ntrue']
    parts += [b'name="image"; filename="x"\r\n\r\n' + made.made.png(crop) for crop in CROPS[:2]]
    body = b"".join(b"--b\r\ncontent-disposition: form-data; " + one + b"\r\n" for one in parts)
    return body + closed


@pytest.mark.parametrize("path", ["/v1/embed", "/v1/galleries/g/subjects/bob/templates", "/v1/galleries/g/identify"])
@pytest.mark.parametrize("closed", [b"", b"--b", b"--b\r\n", b"--b-", b"--c--"])
def test_a_form_that_was_cut_off_is_refused_as_a_whole(client: httpx.Client, path: str, closed: Any) -> None:
    """Or the image before the end would be missing, and the others enrolled."""
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = client.post(path, content=form(closed=closed), headers=headers)
    assert "cut off" in problem(answer, 422, "invalid-request")["detail"]
    problem(client.get("/v1/galleries/g/subjects/bob"), 404, "unknown-subject")


@pytest.mark.parametrize("closed", [b"--b--", b"--b--\r\n", b"--b--\r\nwhat follows\r\n"])
def test_a_form_with_its_end_is_taken(client: httpx.Client, closed: Any) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert len(client.post("/v1/embed", content=form(closed=closed), headers=headers).json()["data"]) == 2


BODIES = [
    ("POST", "/v1/embed", "image/png"),
    ("POST", "/v1/verify", "application/json"),
    ("PUT", "/v1/galleries/h", "application/json"),
    ("POST", "/v1/galleries/g/identify", "application/json"),
    ("POST", "/v1/galleries/g/subjects/bob/templates", "multipart/form-data; boundary=b"),
    ("POST", "/v1/galleries/g/migrations", "application/json"),
    ("POST", "/v1/galleries/g/templates:bulk", "application/x-ndjson"),
    ("POST", "/v1/galleries/g/import", "application/x-ndjson"),
]


@pytest.mark.parametrize(("method", "path", "kind"), BODIES)
@pytest.mark.parametrize("coding", ["gzip", "GZIP, identity", "br"])
def test_a_compressed_body_is_refused_by_its_name(
    client: httpx.Client, method: str, path: str, kind: str, coding: Any
) -> None:
    headers = {"content-type": kind, "content-encoding": coding}
    answer = client.request(method, path, content=gzip.compress(b"{}"), headers=headers)
    detail = problem(answer, 415, "unsupported-media")["detail"]
    assert detail == f"content encoding {coding!r}. Send the body as it is, without one."


def test_a_coding_that_changes_nothing(client: httpx.Client) -> None:
    for coding in ("identity", "", "Identity"):
        headers = {**PNG, "content-encoding": coding}
        assert client.post("/v1/embed", content=FILE, headers=headers, params=ALIGNED).status_code == 200
    assert client.get("/v1/galleries/g", headers={"content-encoding": "gzip"}).status_code == 200, "no body"


def test_where_the_hot_routes_go_past_the_router_nothing_is_looked_up(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("looked up")

    monkeypatch.setattr(parameters, "queries_of", never)
    assert client.post("/v1/embed", content=FILE, headers=PNG, params=ALIGNED).status_code == 200
    side = {**made.image(0), "aligned": True}
    assert client.post("/v1/verify", json={"a": side, "b": side}).status_code == 200


def test_the_page_of_the_api_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "openapi.json" in page.text and "//" not in page.text.replace("<!--", "")
