"""Milvus hangs, dies and comes back: every call ends in time and says so, and nothing that was acknowledged is lost."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pymilvus import MilvusException

from pkd.serving.core.errors import StoreUnavailable, UnknownSubject
from pkd.serving.galleries.audit_file import AuditFile
from pkd.serving.galleries.milvus.client import NO_COLLECTION, NoTable, Row, Tables
from pkd.serving.galleries.milvus.purge import purge
from pkd.serving.galleries.milvus.records import COMMIT, RECORDS
from pkd.serving.galleries.milvus.store import MilvusStore
from tests.support.gallery_examples import ALICE, ENCODER, NEW, OLD, enrolled, one, refused, unit
from tests.support.milvus_server import MilvusServer
from tests.support.milvus_stores import MASTER, Open, milvus_opened  # noqa: F401 - a fixture


@pytest.fixture
def opened(milvus_opened: Open) -> Open:  # noqa: F811
    return milvus_opened


TIMEOUT = 1.0
BOUND = 4 * TIMEOUT
"""Seconds within which every call must end; the machine of the tests may be busy."""


def calls(store: MilvusStore) -> list[Callable[[], object]]:
    """Every call that needs Milvus."""
    return [
        lambda: store.create("guests", OLD, None, ALICE),
        lambda: store.get("staff"),
        lambda: store.list(),
        lambda: store.delete("staff", ALICE),
        lambda: store.enrol("staff", [one("bo", unit(2)[0])], ALICE),
        lambda: store.subject("staff", "ann"),
        lambda: store.subjects("staff"),
        lambda: store.delete_subject("staff", "ann", ALICE),
        lambda: store.search("staff", ENCODER, unit(1), 1),
        lambda: store.begin_migration("staff", NEW, ALICE),
        lambda: store.expire(0),
        lambda: list(store.export("staff")),
        lambda: store.check(),
    ]


def all_unavailable(some: Sequence[Callable[[], object]]) -> None:
    for number, call in enumerate(some):
        started = time.monotonic()
        with refused(StoreUnavailable):
            call()
        assert time.monotonic() - started < BOUND, f"call {number}"


def comes_back(store: MilvusStore, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            store.check()
            assert store.search("staff", ENCODER, unit(1), 1)[0].hits[0].subject == "ann"
            store.create("back", OLD, None, ALICE)
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_milvus_hangs_and_dies_and_comes_back(
    milvus_server: MilvusServer,
    milvus_opened: Open,  # noqa: F811
    tmp_path: Path,
) -> None:
    tables = Tables(milvus_server.uri)
    milvus_opened().create("staff", OLD, None, ALICE)
    store = MilvusStore(tables, AuditFile(tmp_path / "audit.db"), MASTER)
    enrolled(store.enrol("staff", [one("ann", unit(1)[0], key="k", digest="d")], ALICE))
    before, patience = store.subject("staff", "ann"), tables.timeout

    tables.timeout = TIMEOUT
    milvus_server.send(signal.SIGSTOP)  # it takes connections still, and answers nothing
    try:
        all_unavailable([call for number, call in enumerate(calls(store)) if number in (1, 4, 8, 12)])
    finally:
        milvus_server.stop()  # SIGKILL, seconds after an enrolment was acknowledged
    try:
        all_unavailable(calls(store))
    finally:
        milvus_server.start()
    tables.timeout = patience
    comes_back(store)
    assert store.subject("staff", "ann") == before
    (again,) = enrolled(store.enrol("staff", [one("ann", unit(1)[0], key="k", digest="d")], ALICE))
    assert again.replayed
    enrolled(store.enrol("staff", [one("cy", unit(3)[0])], ALICE))
    store.close()
    assert {gallery.name for gallery in milvus_opened().list()} == {"back", "staff"}  # and for one who comes new


def test_a_server_that_is_not_there_is_named_when_it_is_needed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    started = time.monotonic()
    store = MilvusStore(Tables(f"http://127.0.0.1:{port}", timeout=TIMEOUT), AuditFile(tmp_path / "audit.db"), MASTER)
    with refused(StoreUnavailable):
        store.check()
    assert time.monotonic() - started < BOUND
    store.close()


@pytest.mark.parametrize("uri", ["nowhere", "", "ftp://127.0.0.1:1"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, uri: str) -> None:
    store = MilvusStore(Tables(uri, timeout=TIMEOUT), AuditFile(tmp_path / "audit.db"), MASTER)
    with refused(StoreUnavailable):
        store.check()
    store.close()


def test_too_many_requests_are_no_missing_collection(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened()
    store.create("staff", OLD, None, ALICE)
    client = store._tables._connected()
    insert, query = client.insert, client.query

    def committed(name: str, rows: list[Row], **more: Any) -> Any:
        done = insert(name, rows, **more)
        if rows[0].get("kind") == COMMIT:
            monkeypatch.setattr(client, "query", busy)
        return done

    def busy(*args: Any, **more: Any) -> Any:
        monkeypatch.setattr(client, "query", query)
        raise MilvusException(4, "request limit exceeded[limit=1024]")

    monkeypatch.setattr(client, "insert", committed)
    with refused(StoreUnavailable):
        store.enrol("staff", [one("ann", unit(1)[0])], ALICE)
    assert len(store.subject("staff", "ann").templates) == 1  # it may have taken place, but not twice
    for call in (
        lambda: client.query("pkd_nowhere", filter='id > ""', limit=1),
        lambda: client.search("pkd_nowhere", data=[[0.0] * OLD.dim], limit=1),
        lambda: client.insert("pkd_nowhere", [{"id": "a"}]),
        lambda: client.upsert("pkd_nowhere", [{"id": "a"}]),
        lambda: client.delete("pkd_nowhere", ["a"]),
        lambda: client.flush("pkd_nowhere"),
        lambda: client.get_collection_stats("pkd_nowhere"),
    ):
        with pytest.raises(MilvusException) as caught:
            call()
        assert caught.value.code == NO_COLLECTION or "collection not found" in str(caught.value)

    def gone(name: str, *args: Any) -> Any:
        raise NoTable(name)

    monkeypatch.setattr(store._tables, "query", gone)
    for call in (lambda: store.get("staff"), store.list, lambda: store.delete("staff", ALICE), store.check):
        with refused(StoreUnavailable):
            call()


def test_a_deletion_that_fails_halfway_is_on_record(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened()
    store.create("staff", OLD, None, ALICE)
    enrolled(store.enrol("staff", [one("ann", unit(1)[0]), one("bo", unit(2)[0])], ALICE))
    entry = store._catalogue.entry("staff", "ALL")
    delete = store._tables.delete

    def broken(name: str, *keys: Any) -> None:
        if name in entry.tables.values():
            raise StoreUnavailable("Milvus does not delete: code 1.")
        delete(name, *keys)

    with monkeypatch.context() as patch:
        patch.setattr(store._tables, "delete", broken)
        receipt = store.delete_subject("staff", "ann", ALICE)
    assert (receipt.templates, receipt.rows, receipt.covers) == (1, 3, ("index",))
    assert receipt.hash == store._log.head().hash
    with refused(UnknownSubject):
        store.delete_subject("staff", "ann", ALICE)
    # Its template is given still. So it is no time yet to say that Milvus' files hold nothing of it.
    monkeypatch.setattr("pkd.serving.galleries.milvus.purge.STOPPED_SECONDS", -60.0)
    purge(store._tables, store._catalogue, store._log)
    assert dict(store._log.unpurged()) == {"staff": receipt.sequence}
    monkeypatch.setattr("pkd.serving.galleries.milvus.store.SWEEP_SECONDS", -60.0)
    store.expire(0)
    assert dict(store._log.unpurged()) == {"staff": receipt.sequence + 1}  # the sweep's rows are looked for, too
    assert store._tables.count(entry.tables[OLD.id], 'id > ""', "ALL") == 1
    with monkeypatch.context() as patch:
        patch.setattr(store, "_drop", lambda id: broken(entry.tables[OLD.id]))
        receipt = store.delete("staff", ALICE)
    assert (receipt.templates, receipt.covers, receipt.hash) == (1, ("index",), store._log.head().hash)
    monkeypatch.setattr("pkd.serving.galleries.milvus.retention.SWEEP_SECONDS", -60.0)
    store.expire(0)
    assert not [name for name in store._tables.names() if entry.id in name]


def test_a_record_that_does_not_decrypt_stands_in_nobodys_way(opened: Open) -> None:
    store, now = opened(), time.time()
    for name in ("a", "b"):
        store.create(name, OLD, None, ALICE)
        people = [one(subject, unit(i)[0], expires=now + 60) for i, subject in enumerate(("ann", "bo", "cy"))]
        enrolled(store.enrol(name, [*people, one("di", unit(9)[0])], ALICE))
    entry = store._catalogue.entry("a", "ALL")
    gallery, tables = store._open(entry), store._tables
    broken = {gallery.seal.subject(subject) for subject in ("bo", "cy")}
    for row in tables.pages(gallery.records, f"kind == {COMMIT}", [*RECORDS, "vector"], "ALL"):
        if row["subject"] in broken:
            tables.upsert(gallery.records, [{**row, "data": row["data"][:-8] + "AAAAAAAA"}])
    assert [hit.subject for hit in store.search("a", ENCODER, unit(1), 5)[0].hits] != []
    assert sorted(store.subjects("a")) == ["ann", "di"]
    assert sorted(subject.id for subject in store.export("a")) == ["ann", "di"]
    assert store.delete_subject("a", "bo", ALICE).templates == 1
    assert store.expire(now + 120) == 5  # what is past its time goes in both galleries, also where it does not open
    assert [list(store.subjects(name)) for name in ("a", "b")] == [["di"], ["di"]]
    assert tables.count(entry.tables[OLD.id], 'id > ""', "ALL") == 1
    store._catalogue.change(replace(entry, wrapped=store._catalogue.entry("b", "ALL").wrapped))  # nor does its key
    store._opened.clear()
    enrolled(store.enrol("b", [one("ed", unit(5)[0], expires=now)], ALICE))
    assert store.expire(now + 120) == 1
    store._catalogue.change(entry)
