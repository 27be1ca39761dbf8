"""Whatever is sent, the server answers with a documented problem: never a 5xx, never a traceback."""

from __future__ import annotations

import json

import pytest
import serving_bundles as made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pkd.serving.encoders import Encoders
from pkd.serving.problems import PROBLEMS
from pkd.serving.service import Service
from pkd.serving.settings import Settings

GOOD = made.png(made.crops(1, seed=3)[0])
KINDS = st.sampled_from(
    ["application/json", "image/png", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain", ""]
)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
SIDE = st.fixed_dictionaries(
    {},
    optional={
        "embedding": st.lists(st.floats(), max_size=40) | st.text(max_size=60) | JSON,
        "encoding": st.sampled_from(["float", "b64_f32", "b64_f16", "b64_i8", "b64"]),
        "encoder": st.sampled_from(["teacher", "student", "stranger", "nobody", ""]) | JSON,
        "space": st.none() | st.text(max_size=5),
        "image_b64": st.text(max_size=60) | JSON,
        "aligned": st.booleans() | JSON,
    },
)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    family = made.family(tmp_path_factory.mktemp("bundles"))
    with made.running(Service(Encoders.open(family.folders), Settings(threads=2))) as client:
        yield client


def judge(answer):
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        body = answer.json()
        assert PROBLEMS[body["type"]][0] == answer.status_code
        assert "Traceback" not in answer.text


@QUICK
@given(body=st.binary(max_size=400), kind=KINDS, route=st.sampled_from(["/embed", "/v1/verify"]))
def test_random_bytes(client, body, kind, route):
    judge(client.post(route, content=body, headers={"content-type": kind}))


@QUICK
@given(body=JSON, route=st.sampled_from(["/v1/embed", "/verify"]))
def test_random_json(client, body, route):
    judge(client.post(route, content=json.dumps(body), headers={"content-type": "application/json"}))


@QUICK
@given(a=SIDE | JSON, b=SIDE, policy=st.none() | st.dictionaries(st.sampled_from(["target_fmr", "threshold"]), LEAVES))
def test_nearly_right_comparisons(client, a, b, policy):
    body = json.dumps({"a": a, "b": b, "policy": policy})
    judge(client.post("/verify", content=body, headers={"content-type": "application/json"}))


@QUICK
@given(
    cut=st.integers(0, len(GOOD)),
    flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=8),
)
def test_damaged_images(client, cut, flips):
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
def test_random_options(client, query):
    judge(client.post("/embed", content=GOOD, params=query, headers={"content-type": "image/png"}))
