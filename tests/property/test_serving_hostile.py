"""Whatever is sent, the server answers with a documented problem: never a 5xx, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pkd.serving.api.problems import TYPES
from tests.support import gallery_fixtures
from tests.support import serving_bundles as made

GOOD = made.png(made.crops(1, seed=3)[0])
ROUTES = st.sampled_from(
    [
        "/embed",
        "/v1/verify",
        "/v1/galleries/g/identify",
        "/v1/galleries/g/subjects/s/templates",
        "/v1/galleries/g/templates:bulk",
        "/v1/galleries/g/import",
        "/v1/galleries/g/migrations",
    ]
)
KINDS = st.sampled_from(
    [
        "application/x-ndjson",
        "application/json",
        "image/png",
        "multipart/form-data; boundary=x",
        "multipart/form-data",
        "text/plain",
        "",
    ]
)
QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
SIDE = st.fixed_dictionaries(
    {},
    optional={
        "embedding": st.lists(st.floats(), max_size=40) | st.text(max_size=60) | JSON,
        "encoding": st.sampled_from(["float", "b64_f32", "b64_f16", "b64_i8", "b64"]),
        "encoder": st.sampled_from(["teacher", "first", "rogue", "following", "nobody", ""]) | JSON,
        "space": st.none() | st.text(max_size=5),
        "image_b64": st.text(max_size=60) | JSON,
        "aligned": st.booleans() | JSON,
    },
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    fleet = gallery_fixtures.fleet(tmp_path_factory.mktemp("bundles"))
    with gallery_fixtures.serving(fleet, tmp_path_factory.mktemp("store")) as client:
        gallery_fixtures.gallery(client, "g")
        gallery_fixtures.enrol(client, "g", "ann", gallery_fixtures.image(0))
        yield client


def judge(answer: Any) -> None:
    assert answer.status_code < 500, answer.text
    if answer.headers["content-type"] == "application/x-ndjson":
        for one in map(json.loads, filter(None, answer.content.split(b"\n"))):
            assert "problem" not in one or TYPES[one["problem"]["type"]].status == one["problem"]["status"] < 500
    elif answer.status_code not in (200, 201):
        body = answer.json()
        assert TYPES[body["type"]].status == answer.status_code
        assert "Traceback" not in answer.text


@QUICK
@given(body=st.binary(max_size=400), kind=KINDS, route=ROUTES)
def test_random_bytes(client: httpx.Client, body: Any, kind: str, route: str) -> None:
    judge(client.post(route, content=body, headers={"content-type": kind}))


@QUICK
@given(body=JSON, route=ROUTES)
def test_random_json(client: httpx.Client, body: Any, route: str) -> None:
    kind = "application/x-ndjson" if route.endswith(("bulk", "import")) else "application/json"
    judge(client.post(route, content=json.dumps(body), headers={"content-type": kind}))


@QUICK
@given(a=SIDE | JSON, b=SIDE, policy=st.none() | st.dictionaries(st.sampled_from(["target_fmr", "threshold"]), LEAVES))
def test_nearly_right_comparisons(client: httpx.Client, a: Any, b: Any, policy: Any) -> None:
    body = json.dumps({"a": a, "b": b, "policy": policy})
    judge(client.post("/verify", content=body, headers={"content-type": "application/json"}))


@QUICK
@given(
    cut=st.integers(0, len(GOOD)),
    flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=8),
)
def test_damaged_images(client: httpx.Client, cut: Any, flips: Any) -> None:
    data = bytearray(GOOD)
    for place, value in flips:
        data[place] = value
    answer = client.post("/embed?aligned=true", content=bytes(data[:cut]), headers={"content-type": "image/png"})
    judge(answer)
    assert answer.status_code in (200, 400, 413, 415, 422)


@QUICK
@given(
    query=st.dictionaries(
        st.text(max_size=8) | st.sampled_from(["faces", "encoder", "aligned"]), st.text(max_size=12), max_size=3
    )
)
def test_random_options(client: httpx.Client, query: Any) -> None:
    judge(client.post("/embed", content=GOOD, params=query, headers={"content-type": "image/png"}))


@QUICK
@given(
    query=SIDE | JSON,
    more=st.fixed_dictionaries(
        {},
        optional={
            "top_k": st.integers() | LEAVES,
            "target_fpir": st.floats() | LEAVES,
            "threshold": st.floats() | LEAVES,
            "where": st.dictionaries(st.text(max_size=4), st.text(max_size=4) | LEAVES, max_size=3) | JSON,
            "partial": st.booleans(),
        },
    ),
)
def test_nearly_right_searches(client: httpx.Client, query: Any, more: Any) -> None:
    body = json.dumps({"query": query, **more})
    judge(client.post("/v1/galleries/g/identify", content=body, headers={"content-type": "application/json"}))


@QUICK
@given(
    inputs=st.lists(SIDE, max_size=3) | JSON,
    more=st.fixed_dictionaries(
        {},
        optional={
            "aligned": st.booleans() | JSON,
            "attributes": st.dictionaries(st.text(max_size=4), st.text(max_size=4) | LEAVES, max_size=3) | JSON,
            "consent": st.fixed_dictionaries({"basis": st.text(max_size=5) | LEAVES}) | JSON,
            "expires": st.datetimes().map(str) | st.floats() | JSON,
            "quality": st.dictionaries(st.sampled_from(["sharpness", "face_pixels"]), st.floats(), max_size=2) | JSON,
        },
    ),
    route=st.sampled_from(["subjects/s/templates", "templates:bulk"]),
)
def test_nearly_right_enrolments(client: httpx.Client, inputs: Any, more: Any, route: str) -> None:
    bulk = route.endswith("bulk")
    body = json.dumps({"inputs": inputs, **more, **({"subject": "s"} if bulk else {})})
    kind = "application/x-ndjson" if bulk else "application/json"
    judge(client.post(f"/v1/galleries/g/{route}", content=body, headers={"content-type": kind}))


@QUICK
@given(name=st.text(max_size=12), below=st.sampled_from(["", "/subjects", "/subjects/x", "/export", "/migrations"]))
def test_any_name(client: httpx.Client, name: str, below: Any) -> None:
    judge(client.get(f"/v1/galleries/{quote(name, safe='')}{below}"))
