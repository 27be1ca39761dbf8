"""What an operator demands of one gallery holds there, for enrolments and for queries, and nowhere else."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pkd.serving.matching.policies import Policies
from pkd.toolkit.encoders.detector import open_detector
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import PNG, problem
from tests.support.spot_detector import picture, write_spot_detector

FACE = made.made.png(picture(160, 128, (64, 64)))


@pytest.fixture(scope="module")
def strict(fleet: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Run a server that demands more between the eyes in one gallery, of queries in another, nothing in a third."""
    folder = tmp_path_factory.mktemp("policies")
    rules = {"enrol": {"quality": {"inter_eye": 500}}, "query": {"query_quality": {"inter_eye": 500}}, "*": {}}
    (folder / "policies.json").write_text(json.dumps(rules))
    detector = open_detector(str(write_spot_detector(folder / "spots.onnx", "yunet")), 0.5)
    policies = Policies(folder / "policies.json")
    with made.serving(fleet, folder / "store", detector=detector, policies=policies, enrol_face_pixels=0) as client:
        for gallery in ("enrol", "query", "free"):
            made.gallery(client, gallery)
        yield client


def enrolled(client: httpx.Client, gallery: str) -> httpx.Response:
    return client.post(f"/v1/galleries/{gallery}/subjects/ann/templates", content=FACE, headers=PNG)


def test_a_gallery_demands_more_of_what_is_enrolled(strict: httpx.Client) -> None:
    body = problem(enrolled(strict, "enrol"), 422, "low-quality")
    assert body["low"] == ["inter_eye"] and 0 < body["measured"]["inter_eye"] < body["required"]["inter_eye"] == 500
    line = json.dumps({"subject": "b", "inputs": [{"image_b64": base64.b64encode(FACE).decode()}]})
    bulk = strict.post(
        "/v1/galleries/enrol/templates:bulk", content=line, headers={"content-type": "application/x-ndjson"}
    )
    assert json.loads(bulk.text)["problem"]["type"] == "low-quality"
    for gallery in ("query", "free"):
        answer = enrolled(strict, gallery)
        assert answer.status_code == 201 and answer.json()["templates"][0]["quality"]["inter_eye"] > 0


def test_a_gallery_demands_more_of_queries(strict: httpx.Client) -> None:
    for gallery, status in (("query", 422), ("free", 200)):
        enrolled(strict, gallery)
        found = strict.post(f"/v1/galleries/{gallery}/identify", content=FACE, headers=PNG)
        sides = {"a": {"image_b64": base64.b64encode(FACE).decode()}, "b": {"gallery": gallery, "subject": "ann"}}
        verified = strict.post("/v1/verify", json=sides)
        for answer in (found, verified):
            assert answer.status_code == status, answer.text
            assert status == 200 or problem(answer, 422, "low-quality")["low"] == ["inter_eye"]


def test_a_gallery_says_what_it_demands(strict: httpx.Client) -> None:
    policy = strict.get("/v1/galleries/enrol").json()["policy"]
    assert policy["quality"]["inter_eye"] == 500 and policy["query_quality"]["inter_eye"] == 0
    assert [one["policy"]["quality"]["inter_eye"] for one in strict.get("/v1/galleries").json()["galleries"]] == [
        500,
        0,
        0,
    ]
