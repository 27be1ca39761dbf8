"""Bulk enrolment, export and import: streams of lines, each answered once it is durable."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from pkd.serving.api.problems import TYPES
from pkd.serving.core.embedding_codec import decode
from pkd.serving.core.errors import TooLarge
from pkd.serving.core.transfer_schemas import BulkAnswer
from pkd.serving.inference.pipeline import Pipeline
from pkd.serving.matching.bulk import BATCH, split_lines
from pkd.toolkit.core.errors import PkdError
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import CROPS, NDJSON, problem


@pytest.fixture(scope="module")
def client(fleet: made.Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with made.serving(fleet, tmp_path_factory.mktemp("store"), max_body=200_000) as client:
        yield client


def lines(*items: Any) -> Any:
    return b"".join(item if isinstance(item, bytes) else json.dumps(item).encode() + b"\n" for item in items)


def bulk(client: httpx.Client, name: str, content: Any, route: str = "templates:bulk") -> Any:
    answer = client.post(f"/v1/galleries/{name}/{route}", content=content, headers=NDJSON)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [BulkAnswer.model_validate_json(line) for line in filter(None, answer.content.split(b"\n"))]


def test_a_line_out_for_a_line_in(client: httpx.Client, fleet: made.Fleet) -> None:
    made.gallery(client, "g")
    sent = [
        {"subject": f"s{i:03}", "inputs": [made.embedded(fleet.first, i % 6)], "attributes": {"n": str(i)}}
        for i in range(2 * BATCH + 5)
    ]
    sent.append({"subject": "image", "inputs": [made.image(0), made.image(1)], "aligned": True})  # type: ignore[dict-item]
    told = bulk(client, "g", lines(*sent))
    assert [(one.line, one.subject) for one in told] == [(i + 1, one["subject"]) for i, one in enumerate(sent)]
    assert all(one.problem is None and one.templates and not one.replayed for one in told)
    assert len(told[-1].templates) == 2
    assert client.get("/v1/galleries/g").json()["subjects"] == len(sent)
    assert client.get("/v1/galleries/g/subjects/s007").json()["attributes"] == {"n": "7"}
    sequences = [one.sequence for one in told]
    assert sequences == sorted(sequences)


def test_bad_lines_do_not_stop_the_good_ones(client: httpx.Client, fleet: made.Fleet) -> None:
    made.gallery(client, "bad")
    good = {"inputs": [made.embedded(fleet.first, 0)]}
    strict = {"aligned": True, "quality": {"sharpness": 1e6}}
    nan = made.sent(fleet.first, np.full(made.made.DIM, np.nan))
    wrong = {
        b"{\n": "invalid-request",
        b"[1]\n": "invalid-request",
        b"\xff\xfe\n": "invalid-request",
        lines({"subject": "../x", **good}): "invalid-request",
        lines({"subject": "x", **good, "extra": 1}): "invalid-request",
        lines({"subject": "x", "inputs": [nan]}): "bad-vector",
        lines({"subject": "x", "inputs": [{"image_b64": "AAAA"}], "aligned": True}): "bad-image",
        lines({"subject": "x", "inputs": [made.embedded(fleet.rogue, 0)]}): "not-certified",
        lines({"subject": "x", "inputs": [made.embedded(fleet.following, 0)]}): "space-mismatch",
        lines({"subject": "x", "inputs": [made.image(0)]}): "no-detector",
        lines({"subject": "x", "inputs": [made.image(0)], **strict}): "low-quality",
        b"x" * 300_000 + b"\n": "too-large",
        b'{"a": [' + b"1," * 140_000 + b"1]}\n": "too-large",
    }  # fmt: skip
    body, expected = b"", []
    for number, (line, type) in enumerate(wrong.items()):
        body += line + lines({"subject": f"good{number}", **good})
        expected += [type, None]
    told = bulk(client, "bad", body)
    assert [one.problem and one.problem["type"] for one in told] == expected
    assert [one.line for one in told] == list(range(1, len(expected) + 1))
    for one in told:
        if one.problem:
            assert TYPES[one.problem["type"]].status == one.problem["status"] and one.problem["detail"]
            if one.problem["status"] == 409:
                assert {"expected", "got", "works"} <= set(one.problem)
    assert client.get("/v1/galleries/bad").json()["subjects"] == len(wrong)


def test_what_nobody_foresaw_stops_no_other_line(
    client: httpx.Client, fleet: made.Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made.gallery(client, "poison")
    real, sent, unforeseen = Pipeline.run, made.image(3)["image_b64"], RuntimeError("secret numbers")

    def run(self: Pipeline, image: Any, *rest: Any) -> Any:
        if image == sent:
            raise unforeseen
        return real(self, image, *rest)

    monkeypatch.setattr(Pipeline, "run", run)
    told = bulk(
        client, "poison", lines(*({"subject": f"s{i}", "inputs": [made.image(i)], "aligned": True} for i in range(6)))
    )
    assert [one.problem and one.problem["type"] for one in told] == [None, None, None, "internal", None, None]
    assert client.get("/v1/galleries/poison").json()["subjects"] == 5
    assert "line 4 of a bulk enrolment: RuntimeError" in caplog.text and "in run" in caplog.text
    assert "secret" not in caplog.text


def test_empty_lines_count_and_the_last_needs_no_end(client: httpx.Client, fleet: made.Fleet) -> None:
    made.gallery(client, "gaps")
    item = lines({"subject": "a", "inputs": [made.embedded(fleet.first, 0)]})
    told = bulk(client, "gaps", b"\n\r\n" + item.rstrip() + b"\r\n \n" + item.rstrip())
    assert [one.line for one in told] == [3, 5]
    assert bulk(client, "gaps", b"") == []


def test_resumed_by_keys(client: httpx.Client, fleet: made.Fleet) -> None:
    made.gallery(client, "keys")
    items = [{"subject": f"s{i}", "key": f"k{i}", "inputs": [made.embedded(fleet.first, i)]} for i in range(4)]
    first = bulk(client, "keys", lines(*items[:2]))
    again = bulk(client, "keys", lines(*items))
    assert [one.replayed for one in again] == [True, True, False, False]
    assert [one.templates for one in again[:2]] == [one.templates for one in first]
    changed = {**items[0], "subject": "other"}
    twice = bulk(client, "keys", lines(changed, items[3], {**items[3], "key": "new"}, {**items[3], "key": "new"}))
    assert twice[0].problem["type"] == "idempotency-conflict" and twice[0].problem["works"]
    assert [one.replayed for one in twice[1:]] == [True, False, True]
    assert client.get("/v1/galleries/keys").json()["templates"] == {fleet.first.info.id: 5}


def test_what_was_enrolled_before_is_not_embedded_again(client: httpx.Client) -> None:
    made.gallery(client, "cheap")
    items = [{"subject": f"s{i}", "key": f"k{i}", "inputs": [made.image(i)], "aligned": True} for i in range(6)]

    def crops_embedded() -> Any:
        page = client.get("/metrics").text
        return sum(float(found) for found in re.findall(r"^pkd_batch_size_sum\{.*\} (\S+)", page, re.MULTILINE))

    begun = crops_embedded()
    bulk(client, "cheap", lines(*items[:4]))
    assert crops_embedded() - begun == 4
    again = bulk(client, "cheap", lines(*items))
    assert [one.replayed for one in again] == [True] * 4 + [False] * 2
    assert crops_embedded() - begun == 6
    assert client.delete("/v1/galleries/cheap/subjects/s0").status_code == 200
    assert not bulk(client, "cheap", lines(items[0]))[0].replayed
    assert crops_embedded() - begun == 7


def test_an_item_is_answered_while_the_body_is_still_coming(client: httpx.Client, fleet: made.Fleet) -> None:
    """Whoever sends the next line only after the answer to the last one gets them all: nothing waits for the end."""
    made.gallery(client, "live")
    item = lines({"subject": "a", "inputs": [made.embedded(fleet.first, 0)]})

    async def talk() -> Any:
        host, port = client.base_url.host, client.base_url.port
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(
            b"POST /v1/galleries/live/templates:bulk HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: application/x-ndjson\r\n\r\n"
        )
        told = []
        for _ in range(3):
            writer.write(b"%x\r\n%s\r\n" % (len(item), item))
            while not (line := await asyncio.wait_for(reader.readline(), 10)).startswith(b"{"):
                pass
            told.append(json.loads(line))
        writer.write(b"0\r\n\r\n")
        rest = await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 10)
        writer.close()
        return told, rest

    told, rest = asyncio.run(talk())
    assert [one["line"] for one in told] == [1, 2, 3] and b"{" not in rest


def test_a_body_may_be_larger_than_one_request(client: httpx.Client, fleet: made.Fleet) -> None:
    """Streamed: only a line has the limit of a body."""
    made.gallery(client, "large")
    item = lines({"subject": "a", "inputs": [{"image_b64": "A" * 150_000}], "aligned": True})
    told = bulk(client, "large", item * 4)
    assert [one.problem["type"] for one in told] == ["bad-image"] * 4
    answer = client.post("/v1/galleries/large/subjects/a/templates", content=item * 4, headers=made.PNG)
    problem(answer, 413, "too-large")


def test_who_may_not(client: httpx.Client, fleet: made.Fleet) -> None:
    for route in ("templates:bulk", "import"):
        problem(client.post(f"/v1/galleries/nowhere/{route}", content=b"", headers=NDJSON), 404, "unknown-gallery")
        made_json = client.post(f"/v1/galleries/nowhere/{route}", json={})
        problem(made_json, 415, "unsupported-media")
    problem(client.get("/v1/galleries/nowhere/export"), 404, "unknown-gallery")


def test_a_gallery_that_is_deleted_meanwhile(client: httpx.Client, fleet: made.Fleet) -> None:
    made.gallery(client, "doomed")
    item = lines({"subject": "a", "inputs": [made.embedded(fleet.first, 0)]})
    gone = threading.Event()

    def slowly() -> Iterator[Any]:
        yield item
        while not client.get("/v1/galleries/doomed/subjects").json()["subjects"]:
            time.sleep(0.01)
        client.delete("/v1/galleries/doomed").raise_for_status()
        gone.set()
        yield item

    told = bulk(client, "doomed", slowly())
    assert gone.is_set() and told[0].problem is None
    assert told[1].problem and told[1].problem["type"] == "unknown-gallery"


def test_export_and_import(client: httpx.Client, fleet: made.Fleet) -> None:
    made.gallery(client, "from", retention_seconds=1e8)
    consent = {"basis": "contract", "reference": "7", "given": "2026-01-01"}
    for i in range(70):  # more than one piece
        made.enrol(client, "from", f"s{i:02}", made.embedded(fleet.first, i % 6))
    late = "2090-01-01T00:00:00Z"
    made.enrol(client, "from", "ann", made.image(0), attributes={"site": "n"}, consent=consent, expires=late)
    made.enrol(client, "from", "ann", made.embedded(fleet.first, 0))
    answer = client.get("/v1/galleries/from/export")
    assert answer.headers["content-type"] == "application/x-ndjson"
    header, *subjects, end = map(json.loads, answer.text.splitlines())
    assert (header["format"], header["gallery"], header["space"]["id"]) == (
        "pkd-gallery-1", "from", fleet.teacher.info.space.id,
    )  # fmt: skip
    assert header["retention_seconds"] == 1e8
    assert end == {"end": True, "subjects": 71}
    assert [one["subject"] for one in subjects] == sorted(one["subject"] for one in subjects)
    ann = subjects[0]
    assert (ann["attributes"], ann["consent"], len(ann["templates"])) == ({"site": "n"}, consent, 2)
    vector = decode(ann["templates"][0]["embedding"], "b64_f16", made.made.DIM)
    assert vector @ fleet.teacher.embed(CROPS[:1])[0] == pytest.approx(1, abs=1e-5)

    made.gallery(client, "to")
    for replayed in (False, True):
        told = bulk(client, "to", answer.content, "import")
        assert len(told) == 71 and {one.replayed for one in told} == {replayed}
    copied = [json.loads(line) for line in client.get("/v1/galleries/to/export").text.splitlines()[1:-1]]
    for one, other in zip(subjects, copied, strict=True):
        assert {k: one[k] for k in ("subject", "attributes", "consent")} == {
            k: other[k] for k in ("subject", "attributes", "consent")
        }
        kept = [{k: t[k] for k in ("encoder", "space", "expires", "embedding")} for t in other["templates"]]
        assert kept == [{k: t[k] for k in ("encoder", "space", "expires", "embedding")} for t in one["templates"]]


def test_an_import_adds_what_is_not_there_and_nothing_twice(client: httpx.Client, fleet: made.Fleet) -> None:
    def templates(name: str) -> Any:
        exported = [json.loads(line) for line in client.get(f"/v1/galleries/{name}/export").text.splitlines()[1:-1]]
        return {one["subject"]: [template["embedding"] for template in one["templates"]] for one in exported}

    for name in ("grows", "follows"):
        made.gallery(client, name)
    made.enrol(client, "grows", "ann", made.embedded(fleet.first, 0), made.image(3))
    made.enrol(client, "grows", "bob", made.embedded(fleet.first, 1))
    exported = client.get("/v1/galleries/grows/export").content
    bulk(client, "follows", exported, "import")
    made.enrol(client, "grows", "ann", made.embedded(fleet.first, 2), expires="2090-01-01T00:00:00Z")
    grown = client.get("/v1/galleries/grows/export").content
    rewritten = lines(*map(json.loads, grown.splitlines()))  # the same content in other bytes
    assert rewritten != grown
    for content in (grown, rewritten, exported):
        for name in ("grows", "follows"):
            told = bulk(client, name, content, "import")
            assert all(one.problem is None for one in told)
            assert templates(name) == templates("grows")
    assert {subject: len(vectors) for subject, vectors in templates("follows").items()} == {"ann": 3, "bob": 1}
    client.delete("/v1/galleries/follows/subjects/ann").raise_for_status()
    bulk(client, "follows", grown, "import")
    assert templates("follows") == templates("grows")


def test_an_import_leaves_out_what_has_expired_and_names_the_line_it_cannot_read(
    client: httpx.Client, fleet: made.Fleet
) -> None:
    made.gallery(client, "old")
    for subject in ("ann", "bob"):
        made.enrol(client, "old", subject, made.embedded(fleet.first, 0), made.embedded(fleet.first, 1))
    header, ann, bob, end = map(json.loads, client.get("/v1/galleries/old/export").text.splitlines())
    ann["templates"][0]["expires"] = "2020-01-01T00:00:00Z"
    made.gallery(client, "young")
    told = bulk(client, "young", lines(header, ann, bob, end), "import")
    assert [len(one.templates) for one in told] == [1, 2]
    assert client.get("/v1/galleries/young").json()["templates"] == {fleet.first.info.id: 3}
    bob["templates"] = "?"
    told = bulk(client, "young", lines(header, ann, bob, end), "import")
    assert [one.problem and one.problem["type"] for one in told] == [None, "invalid-request"]


def test_an_import_that_was_cut_off_says_so(client: httpx.Client, fleet: made.Fleet) -> None:
    made.gallery(client, "half")
    made.enrol(client, "half", "a", made.embedded(fleet.first, 0))
    made.enrol(client, "half", "b", made.embedded(fleet.first, 1))
    whole = client.get("/v1/galleries/half/export").content.splitlines(keepends=True)
    for missing in (3, 2):  # the last line; a subject
        told = bulk(client, "half", b"".join(line for i, line in enumerate(whole) if i != missing), "import")
        assert told[-1].problem["type"] == "invalid-request" and "cut off" in told[-1].problem["detail"]
        assert all(one.problem is None for one in told[:-1])


def test_an_import_into_another_space(client: httpx.Client, fleet: made.Fleet) -> None:
    made.gallery(client, "source")
    made.enrol(client, "source", "a", made.embedded(fleet.first, 0))
    made.gallery(client, "elsewhere", space=fleet.following.info.space.id)
    exported = client.get("/v1/galleries/source/export").content
    (told,) = bulk(client, "elsewhere", exported, "import")
    assert told.problem["type"] == "space-mismatch" and told.problem["works"]


@pytest.mark.parametrize("reason", made.BAD_VECTORS)
def test_bad_vectors_in_lines(client: httpx.Client, fleet: made.Fleet, reason: str) -> None:
    name = f"v-{reason.replace(chr(32), chr(45))}"
    made.gallery(client, name)
    sent = made.sent(fleet.first, made.BAD_VECTORS[reason])
    (told,) = bulk(client, name, lines({"subject": "a", "inputs": [sent]}))
    assert told.problem["type"] == "bad-vector" and reason in told.problem["detail"]
    template = {**sent, "space": fleet.first.info.space.id}
    told, cut = bulk(client, name, lines({"subject": "a", "templates": [template]}), "import")
    assert told.problem["type"] == "bad-vector" and reason in told.problem["detail"]
    assert cut.line is None and "last line" in cut.problem["detail"]
    assert client.get(f"/v1/galleries/{name}").json()["subjects"] == 0


def test_writers_beside_one_another(client: httpx.Client, fleet: made.Fleet) -> None:
    made.gallery(client, "busy")

    def send(worker: Any) -> Any:
        items = [{"subject": f"w{worker}-{i}", "inputs": [made.embedded(fleet.first, i % 6)]} for i in range(20)]
        return bulk(client, "busy", lines(*items))

    with ThreadPoolExecutor(4) as pool:
        told = [one for each in pool.map(send, range(4)) for one in each]
    assert all(one.problem is None for one in told)
    assert client.get("/v1/galleries/busy").json()["subjects"] == 80


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_lines_however_they_are_cut(size: int) -> None:
    body = b"one\n\ntwo two\r\n" + b"x" * 30 + b"\nlast"

    async def collect() -> Any:
        async def pieces() -> AsyncIterator[Any]:
            for start in range(0, len(body), size):
                yield body[start : start + size]

        return [item async for item in split_lines(pieces(), 20)]

    items = asyncio.run(collect())
    assert [item.number for item in items] == [1, 3, 4, 5]
    assert [item.content for item in items if not isinstance(item.content, PkdError)] == [b"one", b"two two\r", b"last"]
    assert isinstance(items[2].content, TooLarge)
