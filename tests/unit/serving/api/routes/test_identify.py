"""…/identify: several generations of encoders in one gallery, each under its own certificate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pkd.serving.core.gallery_schemas import IdentifyAnswer
from pkd.serving.galleries.store import Hit, SearchResult
from pkd.serving.matching.identification import MatchRule, candidates
from pkd.toolkit.certificates.certificate import CertificateFile
from pkd.toolkit.certificates.extrapolation import Threshold
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import ALIGNED, CROPS, PNG, at, problem

FILE = made.made.png(CROPS[0])


def ask(client: httpx.Client, name: str, query: Any, **more: Any) -> Any:
    return client.post(f"/v1/galleries/{name}/identify", json={"query": query, **more})


def found(answer: Any) -> Any:
    assert answer.status_code == 200, answer.text
    return IdentifyAnswer.model_validate_json(answer.content)


@pytest.fixture(scope="module")
def mixed(client: httpx.Client, fleet: made.Fleet) -> Any:
    """Three subjects, each enrolled by another encoder; one of them by two."""
    name = made.gallery(client, "mixed")
    made.enrol(client, name, "t", made.image(0), attributes={"site": "north"})
    made.enrol(client, name, "f", made.embedded(fleet.first, 1), attributes={"site": "south"})
    made.enrol(client, name, "s", made.embedded(fleet.second, 2), attributes={"site": "south"})
    made.enrol(client, name, "both", made.image(3), made.embedded(fleet.second, 3))
    return name


@pytest.mark.parametrize(("index", "subject"), [(0, "t"), (1, "f"), (2, "s"), (3, "both")])
def test_generations_side_by_side(
    client: httpx.Client, fleet: made.Fleet, mixed: Any, index: int, subject: str
) -> None:
    body = found(ask(client, mixed, made.embedded(fleet.second, index), target_fpir=0.1))
    assert (body.decision, body.candidates[0].subject) == ("match", subject)
    assert len({one.subject for one in body.candidates}) == len(body.candidates) == 4
    assert {one.encoder: one.templates for one in body.searched} == {
        fleet.teacher.info.id: 2, fleet.first.info.id: 1, fleet.second.info.id: 2,
    }  # fmt: skip
    assert (body.templates, body.not_searched, body.calibrated) == (5, [], True)
    for one in body.searched:
        assert one.certificate.query == fleet.second.info.id and one.certificate.gallery == one.encoder


def test_a_query_without_every_certificate(client: httpx.Client, fleet: made.Fleet, mixed: Any) -> None:
    """The first student was never measured against the second."""
    sent = made.embedded(fleet.first, 0)
    body = problem(ask(client, mixed, sent), 409, "not-certified")
    assert body["expected"] == [{"query": fleet.first.info.id, "gallery": fleet.second.info.id}]
    assert body["got"]["query"] == fleet.first.info.id
    assert body["works"]["queries"] == [fleet.second.info.id]
    assert body["works"]["templates"][fleet.teacher.info.id] == sorted(
        one.info.id for one in (fleet.teacher, fleet.first, fleet.second)
    )
    partial = found(ask(client, mixed, sent, partial=True))
    assert (partial.decision, partial.candidates[0].subject, partial.templates) == ("match", "t", 3)
    assert [(one.encoder, one.templates, one.reason) for one in partial.not_searched] == [
        (fleet.second.info.id, 2, "not-certified")
    ]
    problem(ask(client, mixed, made.embedded(fleet.rogue, 0), partial=True), 409, "not-certified")
    unknown = {**made.embedded(fleet.first, 0), "encoder": "nobody"}
    problem(ask(client, mixed, unknown, partial=True), 409, "not-certified")
    body = problem(ask(client, mixed, made.embedded(fleet.following, 0), partial=True), 409, "space-mismatch")
    assert body["works"]["queries"] == [fleet.second.info.id]


def test_an_empty_gallery_finds_nobody(client: httpx.Client, fleet: made.Fleet) -> None:
    name = made.gallery(client, "empty")
    body = found(ask(client, name, made.embedded(fleet.first, 0)))
    assert (body.decision, body.candidates, body.templates, body.target_fmr) == ("no_match", [], 0, None)
    problem(ask(client, name, {**made.embedded(fleet.first, 0), "encoder": "nobody"}), 409, "not-certified")
    problem(ask(client, name, made.embedded(fleet.following, 0)), 409, "space-mismatch")
    problem(ask(client, "nowhere", made.embedded(fleet.first, 0)), 404, "unknown-gallery")


@pytest.fixture(scope="module")
def exact(client: httpx.Client, fleet: made.Fleet) -> Any:
    """Templates at known cosines from the first axis: teacher 0.55 and 0.71, first student 0.72; ten in all."""
    name = made.gallery(client, "exact")
    made.enrol(client, name, "low", made.sent(fleet.teacher, at(0.55, 1)), attributes={"hall": "1"})
    made.enrol(client, name, "mid", made.sent(fleet.teacher, at(0.71, 2)), attributes={"hall": "1"})
    made.enrol(client, name, "other", made.sent(fleet.first, at(0.72, 3)))
    crowd = [made.sent(fleet.teacher, np.eye(made.made.DIM)[4 + i]) for i in range(7)]
    made.enrol(client, name, "crowd", *crowd)
    return name


def query(fleet: made.Fleet) -> Any:
    return made.sent(fleet.second, at(1, 1))


def test_the_threshold_by_hand(client: httpx.Client, fleet: made.Fleet, exact: Any) -> None:
    """N = 10: FMR = 1 − 0.99^(1/10) = 1.0045e-3, a hair looser than the point at 0.6 (0.7 for the first student).

    Between measured scores the next one counts, for nobody knows where between them the rate falls.
    """
    body = found(ask(client, exact, query(fleet), target_fpir=0.01))
    assert body.target_fmr == pytest.approx(1 - 0.99**0.1, rel=1e-9) == pytest.approx(1.00453e-3, rel=1e-4)
    thresholds = {one.encoder: one.threshold for one in body.searched}
    assert thresholds == {fleet.teacher.info.id: 0.6, fleet.first.info.id: 0.7}
    assert body.calibrated
    assert [(one.subject, one.match) for one in body.candidates] == [
        ("mid", True), ("other", True), ("low", False), ("crowd", False),
    ]  # fmt: skip
    assert body.decision == "ambiguous"
    mid, other = body.candidates[:2]
    assert (mid.fmr_at_score, other.fmr_at_score) == (1e-4, 1e-3) and mid.score < other.score, "rates rank, not scores"


def test_beyond_what_the_certificate_resolves(client: httpx.Client, fleet: made.Fleet, exact: Any) -> None:
    """FPIR 1e-5 among ten: FMR 1e-6, two decades past the last point, a decade every 0.1."""
    body = found(ask(client, exact, query(fleet), target_fpir=1e-5))
    thresholds = {one.encoder: one.threshold for one in body.searched}
    assert thresholds[fleet.teacher.info.id] == pytest.approx(0.9, abs=1e-4)
    assert thresholds[fleet.first.info.id] == pytest.approx(1.0, abs=1e-4)
    assert not body.calibrated and not any(one.calibrated for one in body.searched)
    assert body.decision == "no_match"


def test_a_filter_changes_how_many_are_searched_and_so_the_threshold(
    client: httpx.Client, fleet: made.Fleet, exact: Any
) -> None:
    body = found(ask(client, exact, query(fleet), target_fpir=0.02, where={"hall": "1"}))
    assert body.templates == 2 and body.target_fmr == pytest.approx(1 - 0.98**0.5)
    assert {one.subject for one in body.candidates} == {"low", "mid"}
    searched = {one.encoder: (one.templates, one.threshold) for one in body.searched}
    assert searched[fleet.first.info.id] == (0, None)
    assert body.decision == "ambiguous", "0.55 is above the threshold of FMR 1e-2, 0.5"
    nobody = found(ask(client, exact, query(fleet), where={"hall": "9"}))
    assert (nobody.decision, nobody.templates) == ("no_match", 0)


def test_a_stated_threshold(client: httpx.Client, fleet: made.Fleet, exact: Any) -> None:
    body = found(ask(client, exact, query(fleet), threshold=0.6))
    assert {one.threshold for one in body.searched} == {0.6} and body.target_fpir is None and body.calibrated
    assert [one.subject for one in body.candidates if one.match] == ["mid", "other"]
    assert not found(ask(client, exact, query(fleet), threshold=0.95)).calibrated
    problem(ask(client, exact, query(fleet), threshold=0.6, target_fpir=0.1), 422, "invalid-request")


def test_one_candidate_asked_for_does_not_hide_a_second(client: httpx.Client, fleet: made.Fleet, exact: Any) -> None:
    """Not even where both were enrolled by the same encoder, whose search is asked for the best alone."""
    for where in (None, {"hall": "1"}):
        body = found(ask(client, exact, query(fleet), top_k=1, target_fpir=0.02, where=where))
        assert (len(body.candidates), body.decision) == (1, "ambiguous")


def test_a_match_is_never_hidden_by_a_better_resolved_rate(fleet: made.Fleet) -> None:
    """One subject, two templates past the last score that each certificate resolves: the one that matches counts."""
    coarse, fine = (made.made.certificate(fleet.second.info, one.info) for one in (fleet.teacher, fleet.first))
    c = fine.calibration
    finer = c.model_copy(update={"score": (*c.score, 0.8), "fmr": (*c.fmr, 5e-5), "low": (*c.low, 0.0)})
    fine = fine.model_copy(update={"calibration": finer.model_copy(update={"high": (*c.high, 1e-4)})})
    terms, hits = {}, {}
    for name, certificate, threshold, template in (("coarse", coarse, 0.9, "t1"), ("fine", fine, 0.97, "t2")):
        terms[name] = MatchRule(CertificateFile(Path(), b"", certificate, None), 1, Threshold(threshold, False))
        hits[name] = SearchResult((Hit("ann", template, 0.95),), 1)
    (ann,) = candidates(terms, hits)
    assert fine.fmr_at(0.95).fmr < coarse.fmr_at(0.95).fmr
    assert (ann.template, ann.match, ann.fmr_is_upper_bound) == ("t1", True, True)


def test_the_default_rate_is_the_servers(fleet: made.Fleet, tmp_path: Path) -> None:
    with made.serving(fleet, tmp_path, target_fpir=0.2) as client:
        name = made.gallery(client, "g")
        made.enrol(client, name, "ann", made.image(0))
        assert found(ask(client, name, {**made.image(0), "aligned": True})).target_fpir == 0.2


def test_a_search_is_stricter_as_a_bound(client: httpx.Client, fleet: made.Fleet, exact: str) -> None:
    point, bound = (found(ask(client, exact, query(fleet), target_fpir=0.1, assurance=a)) for a in ("point", "bound"))
    assert (point.assurance, bound.assurance) == ("point", "bound") and point.target_fmr == bound.target_fmr
    for one, other in zip(point.searched, bound.searched, strict=True):
        assert one.threshold is None or (other.threshold is not None and one.threshold < other.threshold)
    assert found(ask(client, exact, query(fleet), threshold=0.5)).assurance is None


def test_every_form_of_an_image(client: httpx.Client, fleet: made.Fleet, mixed: Any) -> None:
    forms: tuple[dict[str, Any], ...] = (
        {"json": {"query": {**made.image(0), "aligned": True, "encoder": "second"}, "where": {"site": "north"}}},
        {"content": FILE, "headers": PNG, "params": {**ALIGNED, "encoder": "second", "where": '{"site": "north"}'}},
        {"files": {"image": FILE}, "data": {**ALIGNED, "encoder": "second", "where": '{"site": "north"}'}},
    )
    answers = [found(client.post(f"/v1/galleries/{mixed}/identify", **form)) for form in forms]
    assert answers[0] == answers[1] == answers[2]
    assert (answers[0].decision, answers[0].query_encoder) == ("match", fleet.second.info.id)
    assert [one.subject for one in answers[0].candidates] == ["t"]
    two: dict[str, Any] = {"files": [("image", FILE), ("image", FILE)], "data": {**ALIGNED, "encoder": "second"}}
    problem(client.post(f"/v1/galleries/{mixed}/identify", **two), 422, "invalid-request")


def test_options_beside_json_count_and_are_given_once(client: httpx.Client, fleet: made.Fleet, exact: Any) -> None:
    url = f"/v1/galleries/{exact}/identify"
    body = {"query": query(fleet), "where": {"hall": "1"}}
    beside = found(client.post(url, params={"top_k": 1, "target_fpir": 1e-6}, json=body))
    assert beside == found(client.post(url, json={**body, "top_k": 1, "target_fpir": 1e-6}))
    assert (len(beside.candidates), beside.target_fpir) == (1, 1e-6)
    for params, named in (
        ({"typo": 1}, "typo"),
        ({"encoder": "first"}, "encoder"),  # goes with an image that is the body
        ({"top_k": 0}, "top_k"),
        ({"where": "{}"}, "twice"),
    ):
        detail = problem(client.post(url, params=params, json=body), 422, "invalid-request")["detail"]
        assert named in detail
    both = client.post(url, params={"threshold": 0.5}, json={**body, "target_fpir": 0.1})
    assert "either" in problem(both, 422, "invalid-request")["detail"]


def test_a_refused_pair_costs_no_decoding(client: httpx.Client, mixed: Any) -> None:
    junk = {"image_b64": "!!", "aligned": True, "encoder": "first"}
    problem(ask(client, mixed, junk), 409, "not-certified")
    problem(ask(client, mixed, {**junk, "encoder": "second"}), 400, "bad-image")
    problem(ask(client, mixed, {**junk, "encoder": "nobody"}), 404, "unknown-encoder")


@pytest.mark.parametrize("reason", made.BAD_VECTORS)
def test_bad_vectors(client: httpx.Client, fleet: made.Fleet, mixed: Any, reason: str) -> None:
    body = problem(ask(client, mixed, made.sent(fleet.second, made.BAD_VECTORS[reason])), 422, "bad-vector")
    assert reason in body["detail"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"query": {}},
        {"query": {"gallery": "mixed", "subject": "t"}},
        {"query": made.image(0), "top_k": 0},
        {"query": made.image(0), "top_k": 101},
        {"query": made.image(0), "target_fpir": 1e-320},
        {"query": made.image(0), "target_fpir": 1},
        {"query": made.image(0), "threshold": 1.5},
        {"query": made.image(0), "where": {"a": 1}},
        {"query": made.image(0), "where": "x"},
    ],
)
def test_bodies_that_are_no_search(client: httpx.Client, mixed: Any, body: Any) -> None:
    problem(client.post(f"/v1/galleries/{mixed}/identify", json=body), 422, "invalid-request")


class TestVerifySubject:
    """/v1/verify with an enrolled subject on either side."""

    def test_the_best_template_decides(self, client: httpx.Client, fleet: made.Fleet, mixed: Any) -> None:
        side = {"gallery": mixed, "subject": "both"}
        body = client.post("/v1/verify", json={"a": made.embedded(fleet.second, 3), "b": side}).json()
        assert body["match"] and body["comparisons"] == 2 and body["a"] is None
        assert body["b"]["encoder"] == fleet.second.info.id, "the same crop by the same encoder"
        assert body["certificate"]["gallery"] == fleet.second.info.id
        templates = client.get(f"/v1/galleries/{mixed}/subjects/both").json()["templates"]
        assert body["b"]["template"] == templates[1]["id"] and body["score"] == pytest.approx(1, abs=1e-5)

    def test_what_is_not_certified_is_left_out_and_said(
        self, client: httpx.Client, fleet: made.Fleet, mixed: Any
    ) -> None:
        side = {"gallery": mixed, "subject": "both"}
        body = client.post("/v1/verify", json={"a": made.embedded(fleet.first, 3), "b": side}).json()
        assert (body["b"]["encoder"], body["comparisons"]) == (fleet.teacher.info.id, 1)
        assert body["not_compared"] == [{"encoder": fleet.second.info.id, "templates": 1, "reason": "not-certified"}]
        only = {"gallery": mixed, "subject": "s"}
        answer = client.post("/v1/verify", json={"a": made.embedded(fleet.first, 2), "b": only})
        body = problem(answer, 409, "not-certified")
        assert body["works"]["queries"] == [fleet.second.info.id]

    def test_on_the_query_side_and_on_both(self, client: httpx.Client, fleet: made.Fleet, mixed: Any) -> None:
        second, teacher = {"gallery": mixed, "subject": "s"}, {"gallery": mixed, "subject": "t"}
        body = client.post("/v1/verify", json={"a": second, "b": teacher}).json()
        expected = fleet.second.embed(CROPS)[2] @ fleet.teacher.embed(CROPS)[0]
        assert body["score"] == pytest.approx(float(expected), abs=1e-3)
        assert (body["a"]["subject"], body["b"]["subject"]) == ("s", "t")
        problem(client.post("/v1/verify", json={"a": teacher, "b": second}), 409, "not-certified")
        image = {**made.image(2), "aligned": True, "encoder": "second"}
        assert client.post("/v1/verify", json={"a": second, "b": image}).json()["match"]

    def test_who_is_not_there(self, client: httpx.Client, fleet: made.Fleet) -> None:
        a = made.embedded(fleet.second, 0)
        for side, type in (
            ({"gallery": "mixed", "subject": "nemo"}, "unknown-subject"),
            ({"gallery": "nowhere", "subject": "t"}, "unknown-gallery"),
        ):
            problem(client.post("/v1/verify", json={"a": a, "b": side}), 404, type)
        problem(
            client.post("/v1/verify", json={"a": a, "b": {"gallery": "../x", "subject": "t"}}), 422, "invalid-request"
        )

    def test_a_rate_that_only_one_certificate_covers(self, fleet: made.Fleet, client: httpx.Client, mixed: Any) -> None:
        side = {"gallery": mixed, "subject": "both"}
        body = {"a": made.embedded(fleet.second, 3), "b": side, "policy": {"target_fmr": 1e-6}}
        assert problem(client.post("/v1/verify", json=body), 422, "unsupported-fmr")["smallest"] == 1e-4


def test_options_in_text_are_json(client: httpx.Client, mixed: Any) -> None:
    for where in ("x", "[]", json.dumps({"a": 1})):
        params = {**ALIGNED, "where": where}
        answer = client.post(f"/v1/galleries/{mixed}/identify", content=FILE, headers=PNG, params=params)
        problem(answer, 422, "invalid-request")
