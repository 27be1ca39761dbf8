"""…/migrations: a gallery moves to the space of another teacher, subject by subject, while both answer."""

from __future__ import annotations

from typing import Any

import httpx

from pkd.serving.core.gallery_schemas import MigrationAnswer, MovedAnswer
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import problem


def search(client: httpx.Client, name: str, encoder: Any, index: int, **more: Any) -> Any:
    body = {"query": made.embedded(encoder, index), "target_fpir": 0.1, **more}
    return client.post(f"/v1/galleries/{name}/identify", json=body)


def state(client: httpx.Client, name: str, **params: Any) -> Any:
    return MigrationAnswer.model_validate_json(client.get(f"/v1/galleries/{name}/migrations", params=params).content)


def test_end_to_end(client: httpx.Client, fleet: made.Fleet) -> None:
    old, new = fleet.teacher.info.space.id, fleet.following.info.space.id
    url = f"/v1/galleries/{made.gallery(client, 'g', space=old)}/migrations"
    people = ["ann", "bob", "eve"]
    for index, subject in enumerate(people):
        made.enrol(client, "g", subject, made.image(index))
    assert state(client, "g").model_dump(include={"moving_to", "moved", "total", "unmoved", "next"}) == {
        "moving_to": None, "moved": 0, "total": 3, "unmoved": [], "next": None,
    }  # fmt: skip

    for _ in range(2):  # resumable: the same again goes on
        begun = MigrationAnswer.model_validate_json(client.post(url, json={"space": new}).content)
        assert (begun.space.id, begun.moving_to and begun.moving_to.id, begun.unmoved) == (old, new, people)

    done = made.enrol(client, "g", "bob", made.image(1))
    assert done["templates"][0]["encoder"] == fleet.following.info.id, "images go to the space that is moved to"
    for encoder, index, subject in ((fleet.second, 0, "ann"), (fleet.second, 1, "bob"), (fleet.following, 1, "bob")):
        answer = search(client, "g", encoder, index).json()
        assert (answer["decision"], answer["candidates"][0]["subject"]) == ("match", subject)
        assert [one["reason"] for one in answer["not_searched"]] == ["other-space"]
    page = state(client, "g", limit=1)
    assert (page.moved, page.total, page.unmoved, page.next) == (1, 3, ["ann"], "ann")
    assert state(client, "g", limit=1, after="ann").unmoved == ["eve"]
    side = {"gallery": "g", "subject": "bob"}
    for encoder in (fleet.second, fleet.following):
        answer = client.post("/v1/verify", json={"a": made.embedded(encoder, 1), "b": side}).json()
        assert answer["match"] and answer["not_compared"][0]["reason"] == "space-mismatch"

    body = problem(client.post(f"{url}/finish"), 409, "gallery-conflict")
    assert body["got"]["unmoved"] == body["works"]["enrol_or_delete"] == ["ann", "eve"]
    made.enrol(client, "g", "ann", made.embedded(fleet.following, 0))
    client.delete("/v1/galleries/g/subjects/eve").raise_for_status()
    moved = MovedAnswer.model_validate_json(client.post(f"{url}/finish").content)
    assert (moved.space.id, moved.templates, moved.receipt.templates) == (new, 2, 2)
    assert client.get("/v1/galleries/g").json()["templates"] == {fleet.following.info.id: 2}
    assert search(client, "g", fleet.following, 0).json()["candidates"][0]["subject"] == "ann"
    problem(search(client, "g", fleet.second, 0), 409, "space-mismatch")
    body = problem(client.post(f"{url}/finish"), 409, "gallery-conflict")
    assert body["works"]["spaces"] == [old]


def test_abandon(client: httpx.Client, fleet: made.Fleet) -> None:
    old, new = fleet.teacher.info.space.id, fleet.following.info.space.id
    url = f"/v1/galleries/{made.gallery(client, 'back', space=old)}/migrations"
    made.enrol(client, "back", "ann", made.image(0))
    client.post(url, json={"space": new}).raise_for_status()
    made.enrol(client, "back", "ann", made.image(0))
    made.enrol(client, "back", "new", made.image(1))
    assert state(client, "back").unmoved == []
    body = problem(client.post(f"{url}/abandon"), 409, "gallery-conflict")
    assert body["works"] == {"enrol_or_delete": ["new"]}
    client.delete("/v1/galleries/back/subjects/new").raise_for_status()
    moved = MovedAnswer.model_validate_json(client.post(f"{url}/abandon").content)
    assert (moved.space.id, moved.templates) == (old, 1)
    assert search(client, "back", fleet.second, 0).json()["decision"] == "match"


def test_the_second_space_answers_from_the_start(client: httpx.Client, fleet: made.Fleet) -> None:
    url = f"/v1/galleries/{made.gallery(client, 'early', space=fleet.teacher.info.space.id)}/migrations"
    made.enrol(client, "early", "ann", made.image(0))
    client.post(url, json={"space": fleet.following.info.space.id}).raise_for_status()
    for partial in (False, True):
        answer = search(client, "early", fleet.following, 0, partial=partial)
        assert answer.status_code == 200, answer.text
        assert answer.json()["decision"] == "no_match"
        assert [one["reason"] for one in answer.json()["not_searched"]] == ["other-space"]
    assert search(client, "early", fleet.second, 0).json()["decision"] == "match"


def test_what_is_sent_again_is_answered_as_before(client: httpx.Client, fleet: made.Fleet) -> None:
    url = f"/v1/galleries/{made.gallery(client, 'again', space=fleet.teacher.info.space.id)}/migrations"
    sent = {"inputs": [made.image(0)], "aligned": True}
    path, headers = "/v1/galleries/again/subjects/ann/templates", {"idempotency-key": "k"}
    first = client.post(path, json=sent, headers=headers).json()
    client.post(url, json={"space": fleet.following.info.space.id}).raise_for_status()
    again = client.post(path, json=sent, headers=headers).json()
    assert again["replayed"] and again["templates"] == first["templates"]


def test_what_is_no_migration(client: httpx.Client, fleet: made.Fleet) -> None:
    old, new = fleet.teacher.info.space.id, fleet.following.info.space.id
    url = f"/v1/galleries/{made.gallery(client, 'none', space=old)}/migrations"
    body = problem(client.post(url, json={"space": old}), 409, "gallery-conflict")
    assert body["got"]["space"] == old and body["works"] == {"spaces": [new]}
    problem(client.post(url, json={"space": "nowhere"}), 409, "space-mismatch")
    problem(client.post(url, json={}), 422, "invalid-request")
    problem(client.post(url, content=b"{}"), 415, "unsupported-media")
    for path in ("", "/finish", "/abandon"):
        answer = client.post(f"/v1/galleries/nowhere/migrations{path}", json=None if path else {"space": new})
        problem(answer, 404, "unknown-gallery")
    client.post(url, json={"space": new}).raise_for_status()
    body = problem(client.post(url, json={"space": old}), 409, "gallery-conflict")
    assert body["expected"] == {"moving_to": new}
