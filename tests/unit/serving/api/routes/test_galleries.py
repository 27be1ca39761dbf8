"""/v1/galleries: created once, pinned to a space, deleted with a receipt."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from pkd.serving.core.gallery_schemas import GalleriesAnswer, GalleryAnswer, ReceiptAnswer
from pkd.serving.core.options import Settings
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.service import Service
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import problem


def test_create_read_list_delete(client: httpx.Client, fleet: made.Fleet) -> None:
    answer = client.put("/v1/galleries/staff")
    body = GalleryAnswer.model_validate_json(answer.content)
    assert answer.status_code == 201
    assert body.space.id == fleet.teacher.info.space.id, "the default encoder's"
    assert (body.space.dim, body.moving_to, body.subjects, body.templates, body.retention_seconds) == (
        32, None, 0, {}, None,
    )  # fmt: skip
    assert client.put("/v1/galleries/staff", json={"space": body.space.id}).status_code == 200
    made.enrol(client, "staff", "ann", made.image(0), made.embedded(fleet.first, 0))
    read = GalleryAnswer.model_validate_json(client.get("/v1/galleries/staff").content)
    assert (read.subjects, read.templates) == (1, {fleet.teacher.info.id: 1, fleet.first.info.id: 1})
    names = [one.name for one in GalleriesAnswer.model_validate_json(client.get("/v1/galleries").content).galleries]
    assert "staff" in names and names == sorted(names)
    receipt = ReceiptAnswer.model_validate_json(client.delete("/v1/galleries/staff").content)
    assert (receipt.gallery, receipt.subject, receipt.templates) == ("staff", None, 2)
    assert {"rows", "key", "index"} <= set(receipt.covers) and len(receipt.hash) == 64
    for call in (client.get, client.delete):
        problem(call("/v1/galleries/staff"), 404, "unknown-gallery")


def test_another_space_or_retention_is_a_conflict(client: httpx.Client, fleet: made.Fleet) -> None:
    made.gallery(client, "guests", space=fleet.following.info.space.id, retention_seconds=3600)
    here, other = fleet.following.info.space.id, fleet.teacher.info.space.id
    body = problem(client.put("/v1/galleries/guests", json={"space": other}), 409, "gallery-conflict")
    assert (body["expected"], body["got"]) == ({"space": here}, {"space": other})
    assert body["works"] == {"spaces": [here]}
    again = {"space": here, "retention_seconds": 60}
    body = problem(client.put("/v1/galleries/guests", json=again), 409, "gallery-conflict")
    assert (body["expected"], body["got"]) == ({"retention_seconds": 3600}, {"retention_seconds": 60})
    again["retention_seconds"] = 3600
    assert client.put("/v1/galleries/guests", json=again).json()["retention_seconds"] == 3600


def test_a_space_nobody_embeds_into(client: httpx.Client, fleet: made.Fleet) -> None:
    body = problem(client.put("/v1/galleries/g", json={"space": "nowhere"}), 409, "space-mismatch")
    assert body["got"] == {"space": "nowhere"}
    assert set(body["works"]["spaces"]) == {fleet.teacher.info.space.id, fleet.following.info.space.id}


@pytest.mark.parametrize("name", ["-x", ".hidden", "..", "a b", "a%2Fb", "%2e%2e", "ä", "a" * 129, "a%00b", "a%0A"])
def test_names_are_no_paths(client: httpx.Client, name: str) -> None:
    answer = client.put(f"/v1/galleries/{name}")
    assert answer.status_code in (404, 405, 422), answer.text
    assert answer.json()["type"] in ("invalid-request", "not-found", "method-not-allowed")
    answer = client.get(f"/v1/galleries/staff/subjects/{name}")
    assert answer.status_code in (404, 422)
    assert answer.json()["type"] in ("invalid-request", "not-found", "unknown-gallery")


@pytest.mark.parametrize(
    "body", [[], {"spaces": 1}, {"retention_seconds": 0.5}, {"retention_seconds": -5}, {"retention_seconds": "x"}]
)
def test_bodies_that_are_none(client: httpx.Client, body: Any) -> None:
    problem(client.put("/v1/galleries/g", json=body), 422, "invalid-request")
    problem(client.put("/v1/galleries/g", content=b"{}", headers=made.PNG), 415, "unsupported-media")


def test_a_server_without_a_store(fleet: made.Fleet) -> None:
    service = Service(Encoders.open(fleet.folders[:1]), Settings(threads=1))
    with made.made.running(service) as client:
        for answer in (
            client.get("/v1/galleries"),
            client.put("/v1/galleries/g"),
            client.post("/v1/galleries/g/identify", content=b"x", headers=made.PNG),
            client.get("/v1/galleries/g/export"),
        ):
            assert "--gallery" in problem(answer, 404, "no-galleries")["detail"]
        assert client.get("/v1/encoders").status_code == 200
