"""The client against the real server, and against one that is busy, silent or broken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pkd.serving.client import Client, Embedding, Enrolled, Item, Refused, Unreachable, connection, vectors
from pkd.toolkit.core.errors import PkdError
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import CROPS

FILES = [made.made.png(crop) for crop in CROPS]
ALIGNED = {"aligned": True}


@pytest.fixture(scope="module")
def client(fleet: made.Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with (
        made.serving(fleet, tmp_path_factory.mktemp("store")) as http,
        Client(str(http.base_url), retries=1) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nobody waits here; how long it would have been."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


def device(encoder: Any, index: int) -> Any:
    return Embedding(encoder.embed(CROPS[index : index + 1])[0], encoder.info.id)


def test_embed_and_verify(client: Any, fleet: made.Fleet) -> None:
    answer = client.embed(*FILES[:2], **ALIGNED)
    assert [one.encoding for one in answer.data] == ["b64_f16"] * 2
    assert np.allclose(vectors(answer), fleet.teacher.embed(CROPS[:2]), atol=1e-3)
    assert client.verify(device(fleet.first, 0), FILES[0], target_fmr=1e-4, **ALIGNED).match
    assert not client.verify(device(fleet.first, 1), FILES[0], threshold=0.9999, **ALIGNED).match


def test_a_gallerys_life(client: Any, fleet: made.Fleet) -> None:
    assert client.create_gallery("life").name == "life"
    enrolled = client.enrol("life", "ann", FILES[0], device(fleet.first, 0), attributes={"site": "n"}, **ALIGNED)
    assert len(enrolled.templates) == 2
    assert client.enrol("life", "bob", FILES[1], key="k", **ALIGNED).replayed is False
    assert client.enrol("life", "bob", FILES[1], key="k", **ALIGNED).replayed is True
    assert client.gallery("life").subjects == 2 and "life" in [one.name for one in client.galleries()]
    assert list(client.subjects("life")) == ["ann", "bob"]
    assert client.subject("life", "ann").attributes == {"site": "n"}
    found = client.identify("life", device(fleet.second, 0), target_fpir=0.1, where={"site": "n"})
    assert (found.decision, found.candidates[0].subject) == ("match", "ann")
    assert client.verify(device(fleet.first, 0), Enrolled("life", "ann")).match
    assert client.delete_subject("life", "bob").templates == 1
    assert client.delete_gallery("life").templates == 2
    with pytest.raises(Refused) as refused:
        client.gallery("life")
    assert (refused.value.type, refused.value.status, refused.value.exit_code) == ("unknown-gallery", 404, 2)


def test_a_refusal_carries_what_works(client: Any, fleet: made.Fleet) -> None:
    client.create_gallery("works")
    with pytest.raises(Refused, match="not-certified") as refused:
        client.enrol("works", "x", device(fleet.rogue, 0))
    assert fleet.teacher.info.id in refused.value.problem["works"]["galleries"]
    assert fleet.teacher.info.id in str(refused.value)


def test_many(client: Any, fleet: made.Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CHUNK_LINES", 7)
    client.create_gallery("many")
    unusual = {"attributes": {"n": "a\u2028line separator, \x85 and \n"}}
    items = [Item(f"s{i:02}", (device(fleet.first, i % 6),), options=unusual) for i in range(20)]
    items.append(Item("bad name", (FILES[0],)))
    told = list(client.enrol_bulk("many", items))
    assert [item for item, _ in told] == items
    assert [answer.problem and answer.problem["type"] for _, answer in told] == [None] * 20 + ["invalid-request"]
    lines = list(client.export("many"))
    assert len(lines) == 22 and json.loads(lines[1])["attributes"] == unusual["attributes"]
    client.create_gallery("copy")
    for replayed in (False, True):
        told = list(client.import_gallery("copy", lines))
        assert len(told) == 20 and {one.replayed for one in told} == {replayed}
        assert not any(one.problem for one in told)
    with pytest.raises(PkdError, match="cut off"):
        list(client.import_gallery("copy", lines[:-1]))
    with pytest.raises(Refused, match="unknown-gallery"):
        list(client.enrol_bulk("nowhere", items))


def test_migrations_and_the_catalogue(client: Any, fleet: made.Fleet, tmp_path: Path) -> None:
    client.create_gallery("moves")
    new = fleet.following.info.space.id
    client.enrol("moves", "ann", FILES[0], **ALIGNED)
    assert client.begin_migration("moves", new).unmoved == ["ann"] == client.migration("moves").unmoved
    assert client.finish_migration("moves", abandon=True).space.id == fleet.teacher.info.space.id
    assert client.encoders().encoders[0].default and len(client.spaces().spaces) == 2
    assert len(client.certificates(query="second")) == 3
    path = tmp_path / "encoder.onnx"
    assert [client.download("first", path), client.download("first", path)] == [True, False]
    assert path.read_bytes() == fleet.first.model
    assert client.encoder("first").artifact.bytes == len(fleet.first.model)


def acting(*answers: Any, **options: Any) -> Any:
    """Make a client whose server gives these answers, one a request; exceptions are raised."""
    left, seen = list(answers), []

    def handle(request: Any) -> Any:
        seen.append(request)
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer(request) if callable(answer) else answer

    return Client("http://server", transport=httpx.MockTransport(handle), **options), seen


def busy(status: int = 503, after: Any = "7") -> Any:
    headers = {"retry-after": after} if after else {}
    return httpx.Response(status, json={"type": "draining", "status": status, "detail": "d"}, headers=headers)


GALLERIES = httpx.Response(200, json={"galleries": []})


def test_a_busy_server_is_asked_again_when_it_says(slept: Any) -> None:
    client, seen = acting(busy(429, "3"), busy(503, "2"), busy(503, None), GALLERIES)
    assert client.galleries() == [] and len(seen) == 4
    assert [round(seconds // 1) for seconds in slept[:2]] == [3, 2] and 0.8 <= slept[2] <= 1
    client, _ = acting(*[busy(after="9999")] * 3, retries=2)
    with pytest.raises(Refused) as refused:
        client.galleries()
    assert refused.value.status == 503 and refused.value.exit_code == 1 and max(slept) <= 30 * 1.25


def test_only_what_is_safe_is_sent_again() -> None:
    client, seen = acting(httpx.ReadError("gone"), GALLERIES)
    assert client.galleries() == [] and len(seen) == 2
    client, seen = acting(httpx.ReadError("gone"))
    with pytest.raises(Unreachable, match="pkd-serve"):
        client.delete_subject("g", "s")
    client, seen = acting(*[httpx.ConnectError("refused")] * 3, retries=2)
    with pytest.raises(Unreachable):
        client.delete_subject("g", "s")
    assert len(seen) == 3, "a connection that never was is no risk"
    enrolled = {"gallery": "g", "subject": "s", "templates": [], "sequence": 1, "replayed": True}
    client, seen = acting(httpx.ReadError("gone"), httpx.Response(200, json=enrolled))
    client.enrol("g", "s", b"x")
    assert seen[0].headers["idempotency-key"] == seen[1].headers["idempotency-key"]


def test_what_is_no_problem_document_is_refused_all_the_same() -> None:
    client, _ = acting(httpx.Response(502, text="<html>bad gateway</html>"))
    with pytest.raises(Refused, match="bad gateway"):
        client.galleries()
    client, _ = acting(httpx.Response(403, json=["x"]))
    with pytest.raises(Refused, match="unknown"):
        client.galleries()


def test_items_without_an_answer_are_sent_again(slept: Any) -> None:
    """Broken off in the middle, then one item too many for a busy server, then done."""

    def lines(*answers: Any) -> Any:
        return httpx.Response(200, content=b"".join(json.dumps(one).encode() + b"\n" for one in answers))

    def done(number: Any) -> Any:
        return {"line": number, "templates": ["t"], "sequence": 1, "replayed": False}

    full = {"type": "overloaded", "status": 429, "detail": "d"}
    client, seen = acting(
        lines(done(1)), lines({"line": 1, "problem": full}, done(2)), busy(), httpx.ReadError("gone"), lines(done(1))
    )
    items = [Item(name, (b"x",)) for name in "abc"]
    told = list(client.enrol_bulk("g", items))
    assert [item.subject for item, _ in told] == ["a", "c", "b"]
    assert [request.content.count(b"\n") for request in seen] == [3, 2, 1, 1, 1]
    client, _ = acting(*[lines({"line": 1, "problem": full})] * 2, retries=1)
    ((_, answer),) = client.enrol_bulk("g", items[:1])
    assert answer.problem == full, "in the end it is said, not hidden"
    client, _ = acting(*[lines()] * 2, retries=1)
    with pytest.raises(Unreachable, match="1 lines"):
        list(client.enrol_bulk("g", items[:1]))


def test_an_export_that_was_cut_off() -> None:
    header = json.dumps({"format": "pkd-gallery-1"}).encode() + b"\n"
    client, _ = acting(httpx.Response(200, content=header))
    with pytest.raises(Unreachable, match="cut off"):
        list(client.export("g"))


def test_a_download_that_was_damaged(tmp_path: Path) -> None:
    client, _ = acting(httpx.Response(200, content=b"abc", headers={"etag": '"00"'}))
    with pytest.raises(PkdError, match="damaged"):
        client.download("e", tmp_path / "encoder.onnx")
    assert not any(tmp_path.iterdir())


def test_the_client_needs_no_server_package() -> None:
    """The extra `client` brings httpx alone."""
    code = (
        "import sys\n"
        "for name in ('fastapi', 'starlette', 'uvicorn', 'orjson', 'prometheus_client', 'torch', 'onnx'):\n"
        "    sys.modules[name] = None\n"
        "import pkd.serving.client, pkd.serving.cli.enroll\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
