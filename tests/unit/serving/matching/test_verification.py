"""POST /v1/verify against a running server: the certificate decides who may be compared and at which threshold."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pkd.serving.core.embedding_codec import encode
from pkd.serving.core.options import Settings
from pkd.serving.core.schemas import VerifyAnswer
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching import service
from pkd.serving.matching.service import Service
from pkd.serving.matching.verification import FEW, decide
from tests.support import gallery_fixtures as galleries
from tests.support import serving_bundles as made

CROPS = made.crops(2, seed=7)
IMAGES = [base64.b64encode(made.png(crop)).decode() for crop in CROPS]


@pytest.fixture(scope="module")
def client(family: made.Family) -> Iterator[Any]:
    with made.running(Service(Encoders.open(family.folders), Settings(threads=2))) as client:
        yield client


def image(index: int, encoder: Any = None) -> Any:
    return {"image_b64": IMAGES[index], "aligned": True, **({"encoder": encoder} if encoder else {})}


def embedded(encoder: Any, index: int, encoding: str = "b64_f16", **more: Any) -> Any:
    vector = encode(encoder.embed(CROPS[index : index + 1])[0], encoding)  # type: ignore[arg-type]
    sent = vector.tolist() if encoding == "float" else vector  # type: ignore[union-attr]
    return {"embedding": sent, "encoding": encoding, "encoder": encoder.info.id, **more}


def ask(client: httpx.Client, a: Any, b: Any, **policy: Any) -> Any:
    return client.post("/v1/verify", json={"a": a, "b": b, **({"policy": policy} if policy else {})})


def problem(answer: Any, status: int, type: str) -> Any:
    body = answer.json()
    assert (answer.status_code, body["type"]) == (status, type), body
    assert answer.headers["content-type"] == "application/problem+json"
    return body


@pytest.mark.parametrize("encoding", ["float", "b64_f32", "b64_f16", "b64_i8"])
def test_a_student_embedding_against_a_teacher_image(client: httpx.Client, family: made.Family, encoding: str) -> None:
    for index, same in ((0, True), (1, False)):
        answer = ask(client, embedded(family.student, index, encoding), image(0))
        body = VerifyAnswer.model_validate_json(answer.content)
        expected = family.student.embed(CROPS)[index] @ family.teacher.embed(CROPS)[0]
        assert body.score == pytest.approx(float(expected), abs=1e-2 if encoding == "b64_i8" else 1e-3)
        assert (body.match, body.threshold, body.target_fmr) == (same, 0.6, 1e-3)
        assert (body.certificate.query, body.certificate.gallery) == (family.student.info.id, family.teacher.info.id)
        assert body.certificate.impostor_pairs == 300_000
        assert body.certificate.synthetic


def test_images_on_both_sides_use_the_default_encoder(client: httpx.Client, family: made.Family) -> None:
    body = ask(client, image(0), image(0)).json()
    assert body["score"] == pytest.approx(1, abs=1e-6)
    assert body["certificate"]["query"] == body["certificate"]["gallery"] == family.teacher.info.id
    assert client.post("/verify", json={"a": image(0), "b": image(0)}).json()["match"]


def test_many_comparisons_do_not_keep_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def watched(*given: Any) -> Any:
        threads.append(threading.current_thread())
        return decide(*given)

    monkeypatch.setattr(service, "decide", watched)
    fleet = galleries.fleet(tmp_path)
    with galleries.serving(fleet, tmp_path / "store") as client:
        galleries.gallery(client, "g")
        count = int(FEW**0.5) + 1
        for name, others in (("a", 1), ("b", 2)):
            inputs = [galleries.embedded(fleet.first, others)] * (count - 1)
            galleries.enrol(client, "g", name, *inputs, galleries.embedded(fleet.first, 0))
        a, b = ({"gallery": "g", "subject": name} for name in "ab")
        few, many = ask(client, galleries.embedded(fleet.first, 0), b), ask(client, a, b)
        last = client.get("/v1/galleries/g/subjects/a").json()["templates"][-1]["id"]
    assert [one.json()["comparisons"] for one in (few, many)] == [count, count**2]
    assert many.json()["match"] and many.json()["a"]["template"] == last
    assert threads[0] is not threads[1]


def test_the_false_match_rate_at_the_score_comes_from_the_calibration(
    client: httpx.Client, family: made.Family
) -> None:
    body = ask(client, embedded(family.student, 0), image(0)).json()
    assert body["score"] > 0.7  # above the last score whose rate is resolved
    assert body["fmr_at_score"] == 1e-4 and body["fmr_ci95"] == [0.0, 2e-4] and body["fmr_is_upper_bound"] is True


def test_policies(client: httpx.Client, family: made.Family) -> None:
    sides = embedded(family.student, 0), image(0)
    assert ask(client, *sides, target_fmr=1e-4).json()["threshold"] == 0.7
    body = ask(client, *sides, threshold=0.999).json()
    assert (body["match"], body["threshold"], body["target_fmr"]) == (False, 0.999, None)
    for policy in ({"target_fmr": 1e-3, "threshold": 0.5}, {"threshold": 2}, {"target_fmr": 0}, {"fmr": 1e-3}):
        problem(ask(client, *sides, **policy), 422, "invalid-request")
    problem(client.post("/verify", json={"a": sides[0], "b": sides[1], "policy": {}}), 422, "invalid-request")


def test_a_rate_that_the_impostor_pairs_cannot_resolve(client: httpx.Client, family: made.Family) -> None:
    body = problem(ask(client, embedded(family.student, 0), image(0), target_fmr=1e-5), 422, "unsupported-fmr")
    assert (body["smallest"], body["largest"], body["got"]) == (1e-4, 1e-2, 1e-5)
    assert "300,000 impostor pairs" in body["detail"]


def test_a_rate_is_asked_as_a_point_or_as_a_bound(client: httpx.Client, family: made.Family) -> None:
    sides = embedded(family.student, 0), image(0)
    point, bound = (ask(client, *sides, target_fmr=1e-2, assurance=one).json() for one in ("point", "bound"))
    assert [(one["threshold"], one["assurance"]) for one in (point, bound)] == [(0.5, "point"), (0.6, "bound")]
    assert ask(client, *sides, target_fmr=1e-2).json()["assurance"] == "point"
    assert ask(client, *sides, threshold=0.5).json()["assurance"] is None
    body = problem(ask(client, *sides, target_fmr=1e-4, assurance="bound"), 422, "unsupported-fmr")
    assert (body["smallest"], body["got"]) == (2e-4, 1e-4) and "with 95 % confidence" in body["detail"]
    for policy in ({"threshold": 0.5, "assurance": "bound"}, {"target_fmr": 1e-2, "assurance": "surely"}):
        problem(ask(client, *sides, **policy), 422, "invalid-request")
    service = Service(Encoders.open(family.folders), Settings(threads=1, target_fmr=1e-2, assurance="bound"))
    with made.running(service) as strict:
        assert ask(strict, *sides).json()["threshold"] == 0.6
        assert ask(strict, *sides, target_fmr=1e-2, assurance="point").json()["threshold"] == 0.5


def test_the_servers_default_is_never_replaced_in_silence(family: made.Family) -> None:
    service = Service(Encoders.open(family.folders), Settings(threads=1, target_fmr=1e-6))
    with made.running(service) as client:
        problem(ask(client, image(0), image(0)), 422, "unsupported-fmr")
        assert ask(client, image(0), image(0), target_fmr=1e-2).json()["threshold"] == 0.5


def test_the_other_order_is_not_certified(client: httpx.Client, family: made.Family) -> None:
    body = problem(ask(client, image(0), image(0, "student")), 409, "not-certified")
    assert body["got"] == {"query": family.teacher.info.id, "gallery": family.student.info.id}
    assert body["works"]["galleries"] == [family.teacher.info.id]


def test_another_space_is_a_mismatch(client: httpx.Client, family: made.Family) -> None:
    body = problem(ask(client, image(0, "stranger"), image(0)), 409, "space-mismatch")
    assert body["expected"] == {"space": family.teacher.info.space.id}
    wrong = embedded(family.student, 0, space=family.stranger.info.space.id)
    body = problem(ask(client, wrong, image(0)), 409, "space-mismatch")
    assert body["got"]["space"] == family.stranger.info.space.id
    right = embedded(family.student, 0, space=family.student.info.space.id)
    assert ask(client, right, image(0)).status_code == 200


def test_a_refused_pair_costs_no_decoding(client: httpx.Client) -> None:
    junk = {"image_b64": "!!", "aligned": True, "encoder": "stranger"}
    problem(ask(client, junk, image(0)), 409, "space-mismatch")


def test_an_unknown_encoder(client: httpx.Client, family: made.Family) -> None:
    assert problem(ask(client, image(0, "nobody"), image(0)), 404, "unknown-encoder")["got"] == "nobody"
    unknown = {**embedded(family.student, 0), "encoder": "nobody"}
    body = problem(ask(client, unknown, image(0)), 409, "not-certified")
    assert family.student.info.id in body["works"]["queries"]


def test_two_embeddings_need_a_certificate_but_no_loaded_encoder(family: made.Family) -> None:
    with made.running(Service(Encoders.open([family.folders[1]]), Settings(threads=1))) as client:
        assert ask(client, embedded(family.student, 0), embedded(family.teacher, 0)).json()["match"]
        problem(ask(client, embedded(family.student, 0), image(0, family.teacher.info.id)), 404, "unknown-encoder")


UNIT = [1.0] + [0.0] * (made.DIM - 1)


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        (UNIT[:-1], "31 numbers"),
        ([*UNIT, 0.0], "33 numbers"),
        ([], "0 numbers"),
        ([0.0] * made.DIM, "zero"),
        ([0.5, *UNIT[1:]], "length"),
        ([1e308] * made.DIM, "length"),
        (base64.b64encode(np.full(made.DIM, np.nan, "<f4").tobytes()).decode(), "NaN"),
        (base64.b64encode(np.full(made.DIM, np.inf, "<f4").tobytes()).decode(), "infinity"),
        ("not base64", "base64"),
    ],
)
@pytest.mark.parametrize("side", ["a", "b"])
def test_bad_vectors(client: httpx.Client, family: made.Family, vector: Any, reason: str, side: Any) -> None:
    encoder = {"a": family.student, "b": family.teacher}[side]
    sent = {"embedding": vector, "encoder": encoder.info.id, "encoding": "b64_f32" if vector[:1] == "A" else "float"}
    if isinstance(vector, str):
        sent["encoding"] = "b64_f32"
    other = embedded(family.student, 0) if side == "b" else embedded(family.teacher, 0)
    a, b = (sent, other) if side == "a" else (other, sent)
    detail = problem(ask(client, a, b), 422, "bad-vector")["detail"]
    assert detail.startswith(f"{side}: ") and reason in detail


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_should_not_hold(client: httpx.Client, family: made.Family, literal: Any) -> None:
    numbers = ", ".join([literal] * made.DIM)
    side = f'{{"embedding": [{numbers}], "encoder": "{family.student.info.id}"}}'
    body = f'{{"a": {side}, "b": {side.replace("student", "teacher")}}}'
    answer = client.post("/verify", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (409, 422)
    teacher = f'{{"embedding": {UNIT}, "encoder": "{family.teacher.info.id}"}}'
    body = f'{{"a": {side}, "b": {teacher}}}'
    answer = client.post("/verify", content=body, headers={"content-type": "application/json"})
    problem(answer, 422, "bad-vector")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"a": {}},
        {"a": 1, "b": 2},
        {"a": {"gallery": "g"}, "b": {"gallery": "g"}},
        {"a": {"gallery": "g", "subject": "s"}, "b": {"gallery": "g", "subject": "s/t"}},
        [],
    ],
)
def test_bodies_that_are_no_comparison(client: httpx.Client, body: Any) -> None:
    problem(client.post("/verify", json=body), 422, "invalid-request")


def test_what_was_sent_is_not_sent_back(client: httpx.Client, family: made.Family) -> None:
    answer = ask(client, {"embedding": ["secret"], "encoder": family.student.info.id}, image(0))
    problem(answer, 422, "invalid-request")
    assert "secret" not in answer.text


def test_a_bad_image_names_its_side(client: httpx.Client) -> None:
    assert problem(ask(client, image(0), {"image_b64": "AAAA", "aligned": True}), 400, "bad-image")["side"] == "b"
    problem(ask(client, image(0), {"image_b64": IMAGES[0]}), 422, "no-detector")


def test_only_json_is_taken(client: httpx.Client) -> None:
    problem(client.post("/verify", content=b"{}", headers={"content-type": "text/plain"}), 415, "unsupported-media")
