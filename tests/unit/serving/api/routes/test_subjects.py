"""…/subjects: enrolment in every form, what it refuses, idempotency, reading and deleting."""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from pkd.serving.core.gallery_schemas import EnrolAnswer, ReceiptAnswer, SubjectAnswer
from pkd.serving.core.options import Settings
from pkd.toolkit.encoders.detector import open_detector
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import ALIGNED, CROPS, PNG, problem
from tests.support.spot_detector import picture, write_spot_detector

FILE = made.made.png(CROPS[0])


@pytest.fixture(scope="module")
def client(client: httpx.Client) -> httpx.Client:
    made.gallery(client, "g")
    return client


def post(client: httpx.Client, subject: str, **request: Any) -> Any:
    return client.post(f"/v1/galleries/g/subjects/{subject}/templates", **request)


def test_every_form(client: httpx.Client, fleet: made.Fleet) -> None:
    forms = (
        {"content": FILE, "headers": PNG, "params": ALIGNED},
        {"files": [("image", FILE), ("image", FILE)], "data": ALIGNED},
        {"json": {"inputs": [made.image(0), made.embedded(fleet.first, 0)], "aligned": True}},
    )
    teacher, first = fleet.teacher.info.id, fleet.first.info.id
    for form, encoders in zip(forms, ([teacher], [teacher, teacher], [teacher, first]), strict=True):
        answer = post(client, "forms", **form)  # type: ignore[arg-type]
        assert answer.status_code == 201, answer.text
        body = EnrolAnswer.model_validate_json(answer.content)
        assert [one.encoder for one in body.templates] == encoders
        assert not body.replayed and body.subject == "forms"
        assert body.templates[0].quality and body.templates[0].quality.sharpness > 0
        assert body.templates[-1].quality is None or body.templates[-1].encoder == teacher
    kept = SubjectAnswer.model_validate_json(client.get("/v1/galleries/g/subjects/forms").content)
    assert [one.encoder for one in kept.templates] == [teacher, teacher, teacher, teacher, first]
    assert "embedding" not in client.get("/v1/galleries/g/subjects/forms").text


def test_what_is_kept_with_a_subject(client: httpx.Client, fleet: made.Fleet) -> None:
    consent = {"basis": "consent", "reference": "form 17", "given": "2026-05-01"}
    expires = datetime.now(timezone.utc) + timedelta(days=1)
    parts = {"attributes": {"site": "north"}, "consent": consent}
    made.enrol(client, "g", "kept", made.image(0), expires=expires.isoformat(), **parts)
    body = SubjectAnswer.model_validate_json(client.get("/v1/galleries/g/subjects/kept").content)
    assert (body.attributes, body.consent and body.consent.model_dump()) == ({"site": "north"}, consent)
    assert abs((body.templates[0].expires - expires).total_seconds()) < 0.01  # type: ignore[operator]
    assert abs(body.templates[0].created.timestamp() - time.time()) < 60
    texts = {name: json.dumps(value) for name, value in parts.items()}
    for form in ({"content": FILE, "headers": PNG, "params": {**ALIGNED, **texts}}, {
        "files": {"image": FILE}, "data": {**ALIGNED, **texts},
    }):  # fmt: skip
        assert post(client, "texts", **form).status_code == 201
    body = SubjectAnswer.model_validate_json(client.get("/v1/galleries/g/subjects/texts").content)
    assert body.attributes == {"site": "north"} and body.consent


def test_retention_is_the_default_of_expires(client: httpx.Client) -> None:
    made.gallery(client, "short", retention_seconds=100)
    made.enrol(client, "short", "ann", made.image(0))
    (template,) = client.get("/v1/galleries/short/subjects/ann").json()["templates"]
    left = datetime.fromisoformat(template["expires"]) - datetime.fromisoformat(template["created"])
    assert left.total_seconds() == pytest.approx(100)


def test_an_idempotency_key(client: httpx.Client) -> None:
    key = {"idempotency-key": "k-1"}
    first = post(client, "once", content=FILE, headers={**PNG, **key}, params=ALIGNED)
    again = post(client, "once", content=FILE, headers={**PNG, **key}, params=ALIGNED)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == {**first.json(), "replayed": True}
    assert len(client.get("/v1/galleries/g/subjects/once").json()["templates"]) == 1
    form = {"files": {"image": FILE}, "data": ALIGNED, "headers": key}  # the boundary differs, what it frames does not
    assert post(client, "once", **form).json()["replayed"]
    for subject, request in (
        ("once", {"content": made.made.png(CROPS[1]), "params": ALIGNED}),
        ("other", {"content": FILE, "params": ALIGNED}),
        ("once", {"content": FILE, "params": {**ALIGNED, "attributes": '{"a":"b"}'}}),
    ):
        body = problem(post(client, subject, headers={**PNG, **key}, **request), 409, "idempotency-conflict")
        assert body["works"]["key"]
    problem(client.get("/v1/galleries/g/subjects/other"), 404, "unknown-subject")
    for bad in ("", "a b", "x" * 256):
        problem(post(client, "once", content=FILE, headers={**PNG, "idempotency-key": bad}), 422, "invalid-request")


def test_only_what_can_be_searched_is_enrolled(client: httpx.Client, fleet: made.Fleet) -> None:
    """The rogue student lies in the right space, but no certificate has it on the gallery side."""
    for encoder in (fleet.rogue, "nobody"):
        sent = made.embedded(fleet.rogue, 0)
        if encoder == "nobody":
            sent["encoder"] = encoder
        body = problem(post(client, "x", json={"inputs": [made.image(0), sent]}), 409, "not-certified")
        assert body["index"] == 1
        assert set(body["works"]["galleries"]) == {fleet.teacher.info.id, fleet.first.info.id, fleet.second.info.id}
    body = problem(
        post(client, "x", content=FILE, headers=PNG, params={"encoder": "rogue", **ALIGNED}), 409, "not-certified"
    )
    assert body["got"]["encoder"] == fleet.rogue.info.id
    problem(client.get("/v1/galleries/g/subjects/x"), 404, "unknown-subject")


def test_only_the_gallerys_space_is_taken(client: httpx.Client, fleet: made.Fleet) -> None:
    here, other = fleet.teacher.info.space.id, fleet.following.info.space.id
    body = problem(post(client, "x", json={"inputs": [made.embedded(fleet.following, 0)]}), 409, "space-mismatch")
    assert body["expected"] == {"spaces": [here]} and body["got"]["space"] == other
    assert fleet.teacher.info.id in body["works"]["galleries"]
    wrongly = made.embedded(fleet.first, 0, space=other)
    body = problem(post(client, "x", json={"inputs": [wrongly]}), 409, "space-mismatch")
    assert body["got"]["space"] == other and body["works"]["space"] == here
    assert post(client, "y", json={"inputs": [made.embedded(fleet.first, 0, space=here)]}).status_code == 201


def test_images_go_to_an_encoder_of_the_gallerys_space(client: httpx.Client, fleet: made.Fleet) -> None:
    made.gallery(client, "next", space=fleet.following.info.space.id)
    done = made.enrol(client, "next", "ann", made.image(0))
    assert [one["encoder"] for one in done["templates"]] == [fleet.following.info.id]


@pytest.mark.parametrize("reason", made.BAD_VECTORS)
def test_bad_vectors(client: httpx.Client, fleet: made.Fleet, reason: str) -> None:
    sent = made.sent(fleet.first, made.BAD_VECTORS[reason])
    body = problem(post(client, "bad", json={"inputs": [made.embedded(fleet.first, 0), sent]}), 422, "bad-vector")
    assert reason in body["detail"] and body["index"] == 1
    problem(client.get("/v1/galleries/g/subjects/bad"), 404, "unknown-subject")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"inputs": []},
        {"inputs": [{}]},
        {"inputs": [made.image(0)] * 33},
        {"inputs": [made.image(0)], "attributes": {"a": 1}},
        {"inputs": [made.image(0)], "attributes": {"a b": "c"}},
        {"inputs": [made.image(0)], "attributes": {f"a{i}": "" for i in range(17)}},
        {"inputs": [made.image(0)], "consent": {"reference": "x"}},
        {"inputs": [made.image(0)], "expires": "tomorrow"},
        {"inputs": [made.image(0)], "expires": "2020-01-01T00:00:00Z"},
        {"inputs": [made.image(0)], "expires": "2090-01-01T00:00:00"},
        {"inputs": [made.image(0)], "faces": "all"},
        {"inputs": [made.image(0)], "nonsense": 1},
    ],
)
def test_bodies_that_are_no_enrolment(client: httpx.Client, body: Any) -> None:
    problem(post(client, "x", json=body), 422, "invalid-request")


def test_options_that_are_none(client: httpx.Client) -> None:
    for params in ({"attributes": "{"}, {"attributes": "[]"}, {"consent": "1"}, {"quality": '{"sharp": 1}'}):
        problem(post(client, "x", content=FILE, headers=PNG, params={**ALIGNED, **params}), 422, "invalid-request")
    problem(post(client, "x", content=b"abc", headers=PNG, params=ALIGNED), 400, "bad-image")
    problem(post(client, "x", content=b"abc", headers={"content-type": "text/plain"}), 415, "unsupported-media")


def test_all_or_nothing(client: httpx.Client, fleet: made.Fleet) -> None:
    inputs = [made.embedded(fleet.first, 0), {"image_b64": "AAAA"}]
    assert problem(post(client, "x", json={"inputs": inputs, "aligned": True}), 400, "bad-image")["index"] == 1
    problem(client.get("/v1/galleries/g/subjects/x"), 404, "unknown-subject")


def test_a_floor_of_quality(client: httpx.Client, fleet: made.Fleet, tmp_path: Path) -> None:
    """Of the request first; the operator's cannot be undercut."""
    asked = {"quality": {"sharpness": 1e5}}
    body = problem(post(client, "x", json={"inputs": [made.image(0)], "aligned": True, **asked}), 422, "low-quality")
    assert body["low"] == ["sharpness"] and body["required"]["sharpness"] == 1e5
    assert 0 < body["measured"]["sharpness"] < 1e5 and body["measured"]["detection_score"] is None
    assert post(client, "x", json={"inputs": [made.embedded(fleet.first, 0)], **asked}).status_code == 201

    detector = open_detector(str(write_spot_detector(tmp_path / "spots.onnx", "yunet")), 0.5)
    with made.serving(fleet, tmp_path / "store", detector=detector, enrol_face_pixels=49) as strict:
        made.gallery(strict, "g")
        one = made.made.png(picture(160, 128, (64, 64)))
        for params in ({}, {"quality": '{"face_pixels": 1}'}):
            body = problem(post(strict, "x", content=one, headers=PNG, params=params), 422, "low-quality")
            assert body["low"] == ["face_pixels"] and body["measured"]["face_pixels"] == pytest.approx(48, abs=1)
            required = {name: body["required"][name] for name in ("detection_score", "face_pixels", "sharpness", "yaw")}
            assert required == {"detection_score": 0.6, "face_pixels": 49, "sharpness": 0, "yaw": 180}
        two = made.made.png(picture(160, 128, (32, 64), (112, 64)))
        problem(post(strict, "x", content=two, headers=PNG), 422, "multiple-faces")
        none = made.made.png(picture(160, 128))
        problem(post(strict, "x", content=none, headers=PNG), 422, "no-face")


def test_pages_of_subjects(client: httpx.Client, fleet: made.Fleet) -> None:
    made.gallery(client, "pages")
    for name in ("c", "a", "b", "B"):
        made.enrol(client, "pages", name, made.embedded(fleet.first, 0))
    seen: list[str] = []
    after = ""
    while after is not None:
        page = client.get("/v1/galleries/pages/subjects", params={"after": after, "limit": 3}).json()
        assert len(page["subjects"]) <= 3
        seen, after = seen + page["subjects"], page["next"]
    assert seen == ["B", "a", "b", "c"]
    for limit in (0, 1001, "x"):
        problem(client.get("/v1/galleries/pages/subjects", params={"limit": limit}), 422, "invalid-request")


def test_deletion_gives_a_receipt(client: httpx.Client, fleet: made.Fleet) -> None:
    made.enrol(client, "g", "gone", made.image(0), made.embedded(fleet.first, 0))
    receipt = ReceiptAnswer.model_validate_json(client.delete("/v1/galleries/g/subjects/gone").content)
    assert (receipt.gallery, receipt.subject, receipt.templates) == ("g", "gone", 2)
    assert {"rows", "key", "index"} <= set(receipt.covers)
    for call in (client.get, client.delete):
        problem(call("/v1/galleries/g/subjects/gone"), 404, "unknown-subject")
    found = client.post(
        "/v1/galleries/g/identify",
        json={"query": made.embedded(fleet.second, 0), "top_k": 100, "threshold": -1},
    ).json()
    assert "gone" not in [one["subject"] for one in found["candidates"]]


def test_vectors_are_kept_to_a_millionth(client: httpx.Client, fleet: made.Fleet) -> None:
    """float16 in the store; the score of the same crop against itself says how much that costs."""
    made.enrol(client, "g", "exact", made.image(3))
    query = made.sent(fleet.teacher, fleet.teacher.embed(CROPS[3:4])[0])
    side = {"gallery": "g", "subject": "exact"}
    score = client.post("/v1/verify", json={"a": query, "b": side}).json()["score"]
    assert score == pytest.approx(1, abs=2e-6) and isinstance(score, float) and np.isfinite(score)


@pytest.mark.shared
def test_a_real_photograph_is_good_enough(fleet: made.Fleet, shared: Path, tmp_path: Path) -> None:
    """The real detector, the default floor; the encoder is the small one of these tests."""
    detector = open_detector(str(shared / "models" / "yunet_n_dynamic.onnx"), 0.5)
    photograph = next((shared / "faces/lfw/raw-devtest").rglob("*.jpg"))
    floor = Settings()
    with made.serving(fleet, tmp_path, detector=detector, enrol_sharpness=floor.enrol_sharpness) as client:
        made.gallery(client, "g")
        answer = post(client, "someone", content=photograph.read_bytes(), headers={"content-type": "image/jpeg"})
        assert answer.status_code == 201, answer.text
        quality = answer.json()["templates"][0]["quality"]
        assert quality["detection_score"] > floor.enrol_detection_score and 40 < quality["face_pixels"] < 250
        assert floor.enrol_sharpness < quality["sharpness"]
        blurred = cv2.GaussianBlur(cv2.imread(str(photograph)), (0, 0), 6)  # type: ignore[arg-type]
        sent = cv2.imencode(".jpg", blurred)[1].tobytes()
        body = problem(
            post(client, "blurred", content=sent, headers={"content-type": "image/jpeg"}), 422, "low-quality"
        )
        assert body["low"] == ["sharpness"]
