"""What every request passes first: keys, readiness, the bounded queue, the clock on bodies, unforeseen errors."""

from __future__ import annotations

import hashlib
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pkd.serving.api import middleware
from pkd.serving.api.api_keys import ApiKeys
from pkd.serving.core.options import Settings
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.service import Service
from pkd.toolkit.bundle.bundle import Golden
from tests.support import serving_bundles as made

CROP = made.png(made.crops(1, seed=3)[0])
PHOTO = made.png(np.full((64, 64, 3), 90, np.uint8))
PNG = {"content-type": "image/png"}


@pytest.fixture
def encoders(family: made.Family) -> Any:
    return Encoders.open(family.folders[:2])


class Gate:
    """A detector that waits until it is told to go on, and then finds nothing."""

    digest = "0" * 64

    def __init__(self) -> None:
        self.open = threading.Event()

    def detect(self, image: Any) -> Any:
        assert self.open.wait(20)
        return []


class Broken:
    """A detector with a fault nobody foresaw, and a face in its message."""

    digest = "0" * 64

    def detect(self, image: Any) -> None:
        raise RuntimeError(f"embedding={1 / 8}")


def problem(answer: Any, status: int, type: str) -> Any:
    body = answer.json()
    assert (answer.status_code, body["type"]) == (status, type), body
    assert answer.headers["content-type"] == "application/problem+json"
    return body


def test_keys_guard_everything_but_health(encoders: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683")  # "key"
    keys = ApiKeys.read(tmp_path / "keys")
    with made.running(Service(encoders, Settings(threads=1)), keys) as client:
        for answer in (
            client.get("/v1/encoders"),
            client.get("/nowhere"),
            client.post("/embed?aligned=true", content=CROP, headers=PNG),
            client.post("/verify", json={}, headers={"authorization": "Bearer other"}),
        ):
            problem(answer, 401, "auth")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").status_code == 200
        client.headers["authorization"] = "Bearer key"
        assert client.get("/v1/encoders").status_code == 200
        assert client.post("/embed?aligned=true", content=CROP, headers=PNG).status_code == 200


def test_a_full_queue_answers_429_and_recovers(encoders: Any) -> None:
    gate = Gate()
    settings = Settings(threads=1, queue=2)
    with made.running(Service(encoders, settings, gate)) as client, ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(client.post, "/embed?faces=all", content=PHOTO, headers=PNG) for _ in range(8)]
        refused = [one.result(timeout=20) for one in islice(as_completed(sent, timeout=20), 5)]
        for answer in refused:
            problem(answer, 429, "overloaded")
            assert int(answer.headers["retry-after"]) > 0
        assert client.get("/healthz").status_code == 200
        gate.open.set()
        assert sorted(one.result(timeout=20).status_code for one in sent) == [200] * 3 + [429] * 5
        assert client.post("/embed?aligned=true", content=CROP, headers=PNG).status_code == 200


def test_a_body_that_does_not_arrive_times_out(encoders: Any) -> None:
    def slowly() -> Iterator[Any]:
        yield CROP[:100]
        time.sleep(0.6)
        yield CROP[100:]

    with made.running(Service(encoders, Settings(threads=1, body_seconds=0.2))) as client:
        answer = client.post("/embed?aligned=true", content=slowly(), headers=PNG)
        problem(answer, 408, "timeout")
        assert client.post("/embed?aligned=true", content=CROP, headers=PNG).status_code == 200


def until(true: Any) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Counting(Gate):
    """Counts the photographs that it was really given."""

    seen = 0

    def detect(self, image: Any) -> Any:
        self.seen += 1
        return super().detect(image)


def test_a_request_that_waits_too_long_is_refused_and_never_executed(encoders: Any) -> None:
    gate = Counting()
    settings = Settings(threads=1, request_seconds=0.4)
    with made.running(Service(encoders, settings, gate)) as client, ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(client.post, "/embed?faces=all", content=PHOTO, headers=PNG) for _ in range(4)]
        for one in sent:
            answer = one.result(timeout=20)
            assert "0.4 s" in problem(answer, 429, "overloaded")["detail"]
            assert int(answer.headers["retry-after"]) > 0
        gate.open.set()
        assert client.post("/embed?aligned=true", content=CROP, headers=PNG).status_code == 200
    assert gate.seen == 1  # the one that had begun


def test_a_client_that_has_gone_is_dropped_from_the_queue(encoders: Any) -> None:
    gate = Counting()
    service = Service(encoders, Settings(threads=1), gate)
    with made.running(service) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/embed?faces=all", content=PHOTO, headers=PNG)
        until(lambda: gate.seen == 1)
        head = "POST /embed?faces=all HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        head += f"Content-Length: {len(PHOTO)}"
        for _ in range(3):
            with socket.create_connection((client.base_url.host, client.base_url.port)) as gone:  # type: ignore[arg-type]
                gone.sendall(head.encode() + b"\r\n\r\n" + PHOTO)
                until(lambda: service.state.metrics.in_progress == 2)
            until(lambda: service.state.metrics.in_progress == 1)
        gate.open.set()
        assert first.result(20).status_code == 200
        assert client.post("/embed?aligned=true", content=CROP, headers=PNG).status_code == 200
        assert b"pkd_abandoned_total 3.0" in client.get("/metrics").content
    assert gate.seen == 1


def test_a_stream_has_a_limit_and_a_clock_of_its_own(encoders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that is over ``max_body`` and takes longer than ``body_seconds`` in all, but no piece of it does."""
    monkeypatch.setattr(middleware, "STREAMED", re.compile(r"/v1/embed"))

    def pieces(count: int) -> Iterator[Any]:
        for start in range(count):
            time.sleep(0.05)
            yield CROP[start * len(CROP) // count : (start + 1) * len(CROP) // count]

    limits = Settings(threads=1, max_body=2048, max_stream=10**6, body_seconds=0.3, request_seconds=0.3)
    with made.running(Service(encoders, limits)) as client:
        assert len(CROP) > 2048
        problem(client.post("/embed", content=CROP, headers=PNG), 413, "too-large")
        assert client.post("/v1/embed?aligned=true", content=pieces(20), headers=PNG).status_code == 200
        problem(client.post("/v1/embed", content=bytes(10**6 + 1), headers=PNG), 413, "too-large")


def test_scopes_rates_and_what_the_metrics_say_of_them(encoders: Any, tmp_path: Path) -> None:
    hashed = [hashlib.sha256(key).hexdigest() for key in (b"embedder", b"scraper")]
    (tmp_path / "keys").write_text(f"{hashed[0]} kiosk embed rate=3/s\n{hashed[1]} scraper -\n")
    with made.running(Service(encoders, Settings(threads=1)), ApiKeys.read(tmp_path / "keys")) as client:
        assert client.get("/metrics").status_code == 401
        client.headers["authorization"] = "Bearer embedder"
        assert client.post("/v1/embed?aligned=true", content=CROP, headers=PNG).status_code == 200
        assert problem(client.post("/verify", json={}), 403, "forbidden")["scope"] == "verify"
        problem(client.get("/v1/subjects/anna-karenina"), 404, "not-found")
        answer = client.get("/v1/encoders")
        assert problem(answer, 429, "rate-limited")["retry_after"] == int(answer.headers["retry-after"]) == 1
        client.headers["authorization"] = "Bearer scraper"
        problem(client.post("/v1/embed?aligned=true", content=CROP, headers=PNG), 403, "forbidden")
        page = client.get("/metrics").text
    for line in (
        'pkd_requests_total{method="POST",route="/v1/embed",status="200"} 1.0',
        'pkd_requests_total{method="POST",route="/v1/embed",status="403"} 1.0',
        'pkd_requests_total{method="GET",route="none",status="404"} 1.0',
        'pkd_refusals_total{type="forbidden"} 2.0',
        'pkd_refusals_total{type="rate-limited"} 1.0',
        'pkd_refusals_total{type="space-mismatch"} 0.0',
        'pkd_request_seconds_count{route="/v1/embed"} 2.0',
        "pkd_requests_in_progress 0.0",
    ):
        assert line in page.splitlines(), line
    assert re.search(r'pkd_inference_seconds_count\{encoder="teacher@[0-9a-f]{10}"\} 1.0', page)
    assert "anna" not in page and "kiosk" not in page and hashed[0] not in page


def test_an_unforeseen_error_is_a_500_and_its_values_stay_out_of_answer_and_log(
    encoders: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with made.running(Service(encoders, Settings(threads=1), Broken())) as client:  # type: ignore[arg-type]
        with caplog.at_level(logging.INFO):
            answer = client.post("/embed", content=PHOTO, headers=PNG)
        problem(answer, 500, "internal")
        assert "Traceback" not in answer.text and "0.125" not in answer.text
        assert "RuntimeError" in caplog.text and "detect" in caplog.text and "0.125" not in caplog.text
        assert "POST /embed" in caplog.text
        assert 'pkd_refusals_total{type="internal"} 1.0' in client.get("/metrics").text
        assert client.post("/embed?aligned=true", content=CROP, headers=PNG).status_code == 200


def test_a_bundle_that_fails_its_golden_crops_is_never_ready(family: made.Family, tmp_path: Path) -> None:
    images = made.crops(4, seed=99)
    wrong = Golden(images, family.student.embed(images))
    family.teacher.write(tmp_path / "wrong", golden=wrong)
    service = Service(Encoders.open([family.folders[1], tmp_path / "wrong"]), Settings(threads=1))
    with made.running(service, until=503) as client:
        assert client.get("/healthz").status_code == 200
        while "still being checked" in client.get("/readyz").json()["detail"]:
            pass
        body = problem(client.get("/readyz"), 503, "not-ready")
        assert "wrong: golden crops come out" in body["detail"]
        answer = client.post("/embed?aligned=true&encoder=student", content=CROP, headers=PNG)
        problem(answer, 503, "not-ready")
        assert "retry-after" in answer.headers


def test_before_the_self_test_and_while_draining_nothing_is_answered(encoders: Any) -> None:
    service = Service(encoders, Settings(threads=1))
    with made.running(service) as client:
        golden_errors, service.state.golden_errors = service.state.golden_errors, None
        problem(client.get("/readyz"), 503, "not-ready")
        problem(client.post("/embed?aligned=true", content=CROP, headers=PNG), 503, "not-ready")
        service.state.golden_errors = golden_errors
        assert set(client.get("/readyz").json()["golden_error"]) == set(encoders.loaded)
        service.state.draining = True
        problem(client.get("/readyz"), 503, "draining")
        answer = client.post("/verify", json={})
        problem(answer, 503, "draining")
        assert answer.headers["connection"] == "close"  # the next one belongs to another server
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "setting",
    [
        {"target_fmr": 0},
        {"target_fmr": float("nan")},
        {"threads": 0},
        {"queue": 0},
        {"detector_score": 1.0},
        {"max_body": 0},
    ],
)
def test_settings_out_of_their_range_are_refused(setting: Any) -> None:
    (name,) = setting
    with pytest.raises(ValidationError, match=name):
        Settings(**setting)
