"""Logs and spans: what they say, and that nothing of a person or a key is in them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pkd.serving.api.api_keys import SCOPES, ApiKeys
from pkd.serving.cli.serve import main
from pkd.serving.core.options import Settings
from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.sqlite.store import SqliteStore
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.service import Service
from pkd.serving.observability import logs, telemetry
from pkd.toolkit.encoders.detector import Face
from tests.support import serving_bundles as made

SUBJECT = "anna-karenina"
KEY = "pkd_the-key-itself"
TRACE = "0af7651916cd43dd8448eb211c80319c"


class Leaky:
    """A detector that fails with a person's data in its message."""

    digest = "0" * 64

    def detect(self, image: Any) -> list[Face]:
        raise RuntimeError(f"{SUBJECT} embedding={1 / 8:.6f}")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Collect what the server says, as JSON lines, with requests; the loggers are put back afterwards."""
    logger = logging.getLogger("pkd.serving")
    root = logging.getLogger()
    before = list(logger.handlers), logger.propagate, logger.level, logs.requests.level
    others = list(root.handlers), root.level
    for module, hook in ((sys, "excepthook"), (threading, "excepthook")):
        monkeypatch.setattr(module, hook, getattr(module, hook))
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    logs.set_up("json", each_request=True)
    yield stream
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])
    logs.requests.setLevel(before[3])
    root.handlers[:] = others[0]
    root.setLevel(others[1])
    logging.captureWarnings(False)


@pytest.fixture
def spans() -> Iterator[Any]:
    exporter = InMemorySpanExporter()
    finish = telemetry.set_up(exporter)
    yield exporter
    finish()


def test_neither_logs_nor_spans_hold_a_vector_a_key_or_a_subject(tmp_path: Path, lines: Any, spans: Any) -> None:
    """A life of a subject, and everything a client can send to a wrong place."""
    scopes = ",".join(SCOPES)
    (tmp_path / "keys").write_text(f"{hashlib.sha256(KEY.encode()).hexdigest()} kiosk {scopes}\n")
    family = made.family(tmp_path)
    vector = family.student.embed(made.crops(1, seed=3))[0]
    image = made.png(made.crops(1, seed=3)[0])
    store = SqliteStore(tmp_path / "galleries", MasterKey.create(tmp_path / "master"))
    service = Service(Encoders.open(family.folders), Settings(threads=1, enrol_sharpness=0), Leaky(), store)
    with made.running(service, ApiKeys.read(tmp_path / "keys")) as client:
        client.get("/v1/encoders", headers={"authorization": f"Bearer {KEY}-wrong"})
        client.headers.update({"authorization": f"Bearer {KEY}", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
        subject = f"/v1/galleries/staff/subjects/{SUBJECT}"
        query = {"embedding": vector.tolist(), "encoder": family.student.info.id}
        side = {"image_b64": base64.b64encode(image).decode(), "aligned": True}
        for status, answer in (
            (201, client.put("/v1/galleries/staff", json={})),
            (
                201,
                client.post(
                    f"{subject}/templates", json={"aligned": True, "inputs": [{"image_b64": side["image_b64"]}]}
                ),
            ),
            (200, client.get(subject)),
            (422, client.get(f"{subject}?subject={SUBJECT}")),
            (200, client.post("/v1/galleries/staff/identify", json={"query": query})),
            (200, client.post("/v1/verify", json={"a": query, "b": {"gallery": "staff", "subject": SUBJECT}})),
            (422, client.post("/v1/verify", json={"a": {**query, "embedding": [1 / 8] * 3}, "b": side})),
            (422, client.post("/v1/verify", json={"a": {"gallery": "staff", "subject": [SUBJECT]}, "b": side})),
            (404, client.get(f"/v1/galleries/staff/{SUBJECT}")),
            (500, client.post("/v1/embed", content=image, headers={"content-type": "image/png"})),
            (200, client.delete(subject)),
            (404, client.delete(subject)),
        ):
            assert answer.status_code == status, answer.text
    store.close()
    said = lines.getvalue()
    attributes = json.dumps([{**dict(one.attributes), "": one.name} for one in spans.get_finished_spans()])
    for text in (said, attributes):
        for secret in (SUBJECT, KEY, "0.125", *(f"{number:.5f}" for number in vector[:8]), "staff"):
            assert secret not in text
    entries = [json.loads(line) for line in said.splitlines()]
    (failure,) = [entry for entry in entries if entry["level"] == "error"]
    assert "RuntimeError" in failure["message"] and "POST /v1/embed" in failure["message"]
    requests = [entry for entry in entries if entry["logger"] == "pkd.serving.requests"]
    assert (requests[0]["status"], requests[0]["problem"], "key" in requests[0]) == (401, "auth", False)
    assert requests[0]["route"] != "none"  # though it was refused before the router saw it
    assert requests[3]["route"] == "/v1/galleries/{gallery}/subjects/{subject}"
    assert requests[3]["key"] == "kiosk" and requests[3]["ms"] > 0
    assert "DELETE /v1/galleries/{gallery}/subjects/{subject}" in attributes


def test_a_span_a_request_that_continues_the_client_s_trace(tmp_path: Path, spans: Any) -> None:
    family = made.family(tmp_path)
    with made.running(Service(Encoders.open(family.folders[:1]), Settings(threads=1))) as client:
        spans.clear()
        client.get("/v1/encoders", headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
        client.post("/v1/verify", json={})
        client.get("/v1/encoders", headers={"traceparent": "nonsense"})
    listed, refused, alone = (one for one in spans.get_finished_spans() if "/v1/" in one.name)
    assert listed.name == "GET /v1/encoders" and f"{listed.context.trace_id:032x}" == TRACE
    assert dict(listed.attributes) == {
        "http.request.method": "GET",
        "http.route": "/v1/encoders",
        "http.response.status_code": 200,
    }
    assert refused.attributes["error.type"] == "invalid-request"
    assert alone.parent is None


def test_text_lines_are_for_people(lines: Any, capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("text", each_request=False)
    logging.getLogger("pkd.serving").error("keys.txt: No such file.")
    logs.log_request("GET", "/v1/spaces", 200, 0.1, None, None)
    token = logs.request_id.set("abc-1")
    logging.getLogger("pkd.serving").error("again")
    logs.request_id.reset(token)
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z error keys.txt: No such file\.", first)
    assert second.endswith("Z error again request=abc-1")


def test_what_others_say_and_what_ends_a_server_is_json_too(
    lines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("asyncio").error("taken")
    logging.getLogger("py.warnings").warning("old")  # as captureWarnings logs them
    sys.excepthook(ValueError, ValueError(SUBJECT), None)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "none"), "--log", "json"])
    assert ended.value.code == 2
    said = lines.getvalue() + capsys.readouterr().err
    entries = [json.loads(line) for line in said.splitlines()]
    assert [entry["level"] for entry in entries] == ["error", "warning", "error", "error"]
    assert "old" in entries[1]["message"] and entries[2]["error"] == "ValueError"
    assert entries[3]["message"].startswith(f"{tmp_path / 'none'}: not a bundle")
    assert SUBJECT not in said


def test_ids_of_requests_are_a_proxy_s_where_they_are_harmless() -> None:
    assert logs.id_of(b"abc-1.Z_9") == "abc-1.Z_9"
    for sent in (b"", b"a b", b"x" * 65, "ä".encode(), b'"}\n{"level":"info"'):
        assert re.fullmatch("[0-9a-f]{16}", logs.id_of(sent))


def test_an_exception_is_named_but_not_quoted(lines: Any) -> None:
    try:
        raise ValueError(SUBJECT)
    except ValueError:
        logging.getLogger("pkd.serving").exception("failed")
    entry = json.loads(lines.getvalue())
    assert entry["error"] == "ValueError" and SUBJECT not in lines.getvalue()
