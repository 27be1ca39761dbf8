"""One request that asks for too much, or that could be taken for something else: what it costs, and what it is told."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from pkd.serving.api.api_keys import ApiKeys, new_key
from pkd.serving.api.middleware import Middleware
from pkd.serving.core.options import Settings
from pkd.serving.core.validation import MAX_LISTED
from pkd.serving.inference.pipeline import MAX_FACES
from pkd.serving.observability.state import State
from pkd.toolkit.encoders.detector import Face
from pkd.toolkit.images.alignment import TEMPLATE
from pkd.toolkit.images.codec import Rgb
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import NDJSON, embedded, problem
from tests.support.server_process import until
from tests.support.serving_bundles import png

JSON = {"content-type": "application/json"}


class Grid:
    """A detector that finds 64 faces for every 32 grey levels of red in the first pixel: none in a black photograph."""

    digest = "0" * 64

    def detect(self, image: Rgb) -> list[Face]:
        box = np.array([0, 0, 112, 112], np.float32)
        return [Face(box, TEMPLATE.astype(np.float32), 0.9)] * (64 * round(image[0, 0, 0] / 32))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> made.Fleet:
    return made.fleet(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def client(fleet: made.Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder: Path = tmp_path_factory.mktemp("store")
    with made.serving(fleet, folder, detector=Grid(), max_body=16 * 2**20) as client:
        made.gallery(client, "g")
        made.enrol(client, "g", "ann", embedded(fleet.teacher, 0))
        yield client


def photograph(faces: int, height: int = 200, width: int = 200) -> bytes:
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = 32 * (faces // 64)
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()


BOOLEANS: list[tuple[str, str, dict[str, Any], str]] = [
    ("POST", "/v1/verify", {"policy": {"threshold": False}}, "policy.threshold"),
    ("POST", "/v1/verify", {"policy": {"target_fmr": True}}, "policy.target_fmr"),
    ("POST", "/v1/verify", {"policy": {"threshold": "0.9"}}, "policy.threshold"),
    ("POST", "/v1/galleries/g/identify", {"threshold": False}, "threshold"),
    ("POST", "/v1/galleries/g/identify", {"top_k": True}, "top_k"),
    ("POST", "/v1/galleries/g/identify", {"top_k": 2.0}, "top_k"),
    ("POST", "/v1/galleries/g/identify", {"partial": 1}, "partial"),
    ("PUT", "/v1/galleries/other", {"retention_seconds": True}, "retention_seconds"),
    ("PUT", "/v1/galleries/other", {"retention_seconds": "60"}, "retention_seconds"),
    ("POST", "/v1/galleries/g/subjects/bo/templates", {"quality": {"sharpness": False}}, "quality.sharpness"),
    ("POST", "/v1/galleries/g/subjects/bo/templates", {"aligned": 1}, "aligned"),
    ("POST", "/v1/galleries/g/subjects/bo/templates", {"expires": 4_000_000_000}, "expires"),
]


@pytest.mark.parametrize(("method", "path", "more", "field"), BOOLEANS)
def test_a_value_of_another_type_is_refused(
    client: httpx.Client, fleet: made.Fleet, method: str, path: str, more: dict[str, Any], field: str
) -> None:
    side = embedded(fleet.teacher, 0)
    body = {
        "/v1/verify": {"a": side, "b": embedded(fleet.teacher, 1)},
        "/v1/galleries/g/identify": {"query": side},
        "/v1/galleries/g/subjects/bo/templates": {"inputs": [side]},
    }.get(path, {})
    refusal = problem(client.request(method, path, json={**body, **more}), 422, "invalid-request")  # type: ignore[dict-item]
    assert [one["field"] for one in refusal["errors"]] == [field]
    assert client.request(method, path, json=body).status_code in (200, 201)  # the rest of it is right


@pytest.mark.parametrize("value", ["true", "false", '"0.5"', "null", "[1]"])
def test_numbers_of_a_vector_are_numbers(client: httpx.Client, fleet: made.Fleet, value: str) -> None:
    encoder = json.dumps(fleet.teacher.info.id)
    side = f'{{"encoder": {encoder}, "embedding": [1, {value}, {", ".join(["0.0"] * (made.made.DIM - 2))}]}}'
    answer = client.post("/v1/verify", content=f'{{"a": {side}, "b": {side}}}', headers=JSON)
    assert problem(answer, 422, "invalid-request")["errors"][0]["field"].startswith("a.embedding")


def test_a_number_within_a_form_field_is_a_number(client: httpx.Client) -> None:
    path, files = "/v1/galleries/g/subjects/bo/templates", {"image": png(made.CROPS[0])}
    data = {"aligned": "true", "quality": '{"sharpness": false}'}
    refusal = problem(client.post(path, files=files, data=data), 422, "invalid-request")
    assert refusal["errors"][0]["field"] == "quality.sharpness"
    assert client.post(path, files=files, data={**data, "quality": '{"sharpness": 0}'}).status_code == 201


@pytest.mark.parametrize(("field", "value"), [("end", 1), ("subjects", True), ("end", 1.0)])
def test_the_last_line_of_an_import_is_typed(client: httpx.Client, field: str, value: object) -> None:
    last = {"end": True, "subjects": 0, field: value}
    answer = client.post("/v1/galleries/g/import", content=json.dumps(last), headers=NDJSON)
    assert "invalid-request" in answer.text


def test_many_faults_cost_little(client: httpx.Client) -> None:
    """131,000 unknown keys kept the event loop for 4 s a line when each was described."""
    keys = ",".join(f'"k{number}":1' for number in range(131_000))
    begun = time.process_time()
    answer = client.post(
        "/v1/galleries/g/templates:bulk", content=f'{{"subject":"a","inputs":[],{keys}}}', headers=NDJSON
    )
    assert time.process_time() - begun < 3
    assert "131,001 fields are at fault" in answer.json()["problem"]["detail"]


def test_a_few_faults_are_listed(client: httpx.Client) -> None:
    body = {"inputs": [], **dict.fromkeys(map(str, range(MAX_LISTED - 1)), 1)}
    assert len(problem(client.post("/v1/embed", json=body), 422, "invalid-request")["errors"]) == 20


def test_the_faces_of_a_photograph_are_counted_before_they_are_embedded(client: httpx.Client) -> None:
    params, headers = {"faces": "all"}, {"content-type": "image/jpeg"}
    most = client.post("/v1/embed", params=params, content=photograph(MAX_FACES), headers=headers).json()
    assert [one["face"] for one in most["data"]] == list(range(MAX_FACES))
    answer = client.post("/v1/embed", params=params, content=photograph(MAX_FACES + 64), headers=headers)
    refusal = problem(answer, 422, "too-many-faces")
    assert (refusal["found"], refusal["limit"]) == (MAX_FACES + 64, MAX_FACES)


LARGE = photograph(0, 1000, 2000)
"""6 MB of pixels."""
PIXELS = 6_000_000
CUT = base64.b64encode(LARGE[:-200]).decode()
WHOLE = base64.b64encode(LARGE).decode()
REFUSED = [
    ("/v1/embed", {"inputs": [{"image_b64": WHOLE}]}),  # no face
    ("/v1/embed", {"inputs": [{"image_b64": WHOLE}] * 2, "aligned": True}),
    ("/v1/embed", {"inputs": [{"image_b64": CUT}] * 2}),
    ("/v1/verify", {"a": {"image_b64": WHOLE}, "b": {"image_b64": WHOLE}}),
    ("/v1/galleries/g/identify", {"query": {"image_b64": WHOLE, "aligned": True}}),
    ("/v1/galleries/g/subjects/bo/templates", {"inputs": [{"image_b64": WHOLE}]}),
    ("/v1/galleries/g/templates:bulk", {"subject": "bo", "inputs": [{"image_b64": WHOLE}]}),
]


@pytest.mark.parametrize(("path", "body"), REFUSED)
def test_a_refused_photograph_is_let_go(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """Without waiting for Python to look for circles: its pixels hung on the traceback of the refusal."""

    def ask() -> None:
        headers = NDJSON if path.endswith("bulk") else JSON
        assert '"type":' in client.post(path, content=json.dumps(body), headers=headers).text

    ask()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(5):
            ask()
        # A second image of the request may be worked on a moment longer.
        until(lambda: tracemalloc.get_traced_memory()[0] - before < PIXELS, 5)
    finally:
        tracemalloc.stop()
        gc.enable()


FOREIGN = [
    {"host": "attacker.example"},
    {"host": "attacker.example:8000"},
    {"host": "127.0.0.1.attacker.example"},
    {"host": "attacker.example:80@127.0.0.1"},
    {"host": "["},
    {"origin": "https://attacker.example"},
    {"origin": "null"},
    {"origin": "http://localhost:1"},
    {"origin": "http://["},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
]


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/galleries/g/export"), ("POST", "/v1/embed"), ("GET", "/x")])
def test_a_page_of_another_site_cannot_use_a_server_without_keys(
    client: httpx.Client, method: str, path: str, headers: dict[str, str]
) -> None:
    problem(client.request(method, path, headers=headers), 403, "foreign-origin")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "127.8.9.1"])
def test_a_page_of_the_server_itself_can(client: httpx.Client, host: str) -> None:
    for headers in ({}, {"origin": f"http://{host}"}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}):
        assert client.get("/v1/galleries", headers={"host": host, **headers}).status_code == 200
    assert client.get("/healthz", headers={"host": "pod.cluster.local"}).status_code == 200


def test_with_keys_a_server_has_any_name(fleet: made.Fleet, tmp_path: Path) -> None:
    line = new_key("kiosk", "verify")
    (tmp_path / "keys").write_text(line["line"] + "\n", encoding="utf-8")
    keys = ApiKeys.read(tmp_path / "keys")
    with made.serving(fleet, tmp_path / "store", keys) as client:
        headers = {"host": "faces.example", "origin": "https://app.example", "authorization": f"Bearer {line['key']}"}
        assert client.get("/v1/galleries", headers=headers).status_code == 200


def test_one_key_leaves_the_others_their_share_of_the_queue() -> None:
    """200 clients of one key filled the queue, and another key's two clients got none of 38 requests answered."""
    gate, answers = asyncio.Event(), Counter[tuple[str, int]]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    keys = [new_key(name, "embed") for name in ("many", "few", "third")]

    async def ask(number: int) -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answers[keys[number]["line"].split()[1], message["status"]] += 1

        authorization = f"Bearer {keys[number]['key']}".encode()
        scope = {"type": "http", "method": "POST", "path": "/v1/embed", "headers": [(b"authorization", authorization)]}
        await middleware(scope, receive, send)

    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(key["line"] for key in keys))
        file.flush()
        state = State(golden_errors={})
        middleware = Middleware(app, Settings(threads=1, queue=11), state, ApiKeys.read(file.name))

    async def main() -> None:
        tasks = [asyncio.create_task(ask(number)) for number in [0] * 200 + [1] * 10 + [2] * 2]
        await asyncio.sleep(0.05)
        assert answers == {("many", 429): 188, ("few", 429): 4}
        gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert answers == {("many", 429): 188, ("few", 429): 4, ("many", 200): 12, ("few", 200): 6, ("third", 200): 2}
    assert not middleware.working
