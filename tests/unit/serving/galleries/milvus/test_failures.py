"""Milvus hangs, dies and comes back: every call ends in time and says so, and nothing that was acknowledged is lost."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pymilvus import MilvusClient, MilvusException

from pkd.serving.core.errors import StoreUnavailable, UnknownSubject
from pkd.serving.galleries.audit import AuditFile
from pkd.serving.galleries.milvus.client import NO_COLLECTION, MilvusConnection, NoCollection, Row
from pkd.serving.galleries.milvus.records import COMMIT, RECORD_FIELDS
from pkd.serving.galleries.milvus.store import MilvusOptions, MilvusStore
from tests.support.gallery_examples import ALICE, ENCODER, NEW, OLD, enrolled, one, refused, unit
from tests.support.milvus_server import MilvusServer
from tests.support.milvus_stores import MASTER, STALE_SECONDS, SWEEPING, Backdoor, HookedConnection, Open

Connect = Callable[[], HookedConnection]


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


@pytest.fixture
def killed_server(milvus_server: MilvusServer) -> Iterator[MilvusServer]:
    """Give a server that a test may kill: the tests after it get a new one."""
    yield milvus_server
    milvus_server.renew()


def test_milvus_hangs_and_dies_and_comes_back(
    killed_server: MilvusServer,
    milvus_opened: Open,
    tmp_path: Path,
) -> None:
    connection = MilvusConnection(killed_server.uri)
    milvus_opened().create("staff", OLD, None, ALICE)
    store = MilvusStore(connection, AuditFile(tmp_path / "audit.db"), MASTER)
    enrolled(store.enrol("staff", [one("ann", unit(1)[0], key="k", digest="d")], ALICE))
    before, patience = store.subject("staff", "ann"), connection.timeout

    connection.timeout = TIMEOUT
    killed_server.send(signal.SIGSTOP)  # it takes connections still, and answers nothing
    try:
        all_unavailable([call for number, call in enumerate(calls(store)) if number in (1, 4, 8, 12)])
    finally:
        killed_server.stop()  # SIGKILL, seconds after an enrolment was acknowledged
    try:
        all_unavailable(calls(store))
    finally:
        killed_server.start()
    connection.timeout = patience
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
    store = MilvusStore(
        MilvusConnection(f"http://127.0.0.1:{port}", timeout=TIMEOUT), AuditFile(tmp_path / "audit.db"), MASTER
    )
    with refused(StoreUnavailable):
        store.check()
    assert time.monotonic() - started < BOUND
    store.close()


@pytest.mark.parametrize("uri", ["nowhere", "", "ftp://127.0.0.1:1"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, uri: str) -> None:
    store = MilvusStore(MilvusConnection(uri, timeout=TIMEOUT), AuditFile(tmp_path / "audit.db"), MASTER)
    with refused(StoreUnavailable):
        store.check()
    store.close()


class BusyClient(MilvusClient):  # type: ignore[misc]
    """Has too many requests at the first query after a commit."""

    busy = False

    def insert(self, name: str, rows: list[Row], **more: Any) -> Any:
        done = super().insert(name, rows, **more)
        self.busy = rows[0].get("kind") == COMMIT
        return done

    def query(self, *args: Any, **more: Any) -> Any:
        if self.busy:
            self.busy = False
            raise MilvusException(4, "request limit exceeded[limit=1024]")
        return super().query(*args, **more)


class EmptyConnection(MilvusConnection):
    """Finds no collection."""

    def query(self, name: str, *args: Any) -> list[Row]:
        raise NoCollection(name)


def test_too_many_requests_are_no_missing_collection(milvus_opened: Open, milvus_server: MilvusServer) -> None:
    store = milvus_opened(connection=MilvusConnection(milvus_server.uri, client=BusyClient))
    store.create("staff", OLD, None, ALICE)
    with refused(StoreUnavailable):
        store.enrol("staff", [one("ann", unit(1)[0])], ALICE)
    assert len(store.subject("staff", "ann").templates) == 1  # it may have taken place, but not twice
    client = MilvusClient(milvus_server.uri)
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
            call()  # type: ignore[no-untyped-call]
        assert caught.value.code == NO_COLLECTION or "collection not found" in str(caught.value)

    client.close()
    store = milvus_opened(connection=EmptyConnection(milvus_server.uri))
    for call in (lambda: store.get("staff"), store.list, lambda: store.delete("staff", ALICE), store.check):
        with refused(StoreUnavailable):
            call()


def test_a_deletion_that_fails_halfway_is_on_record(
    milvus_opened: Open, connect: Connect, backdoor: Backdoor, log: AuditFile
) -> None:
    connection = connect()
    store, sweeping = milvus_opened(connection=connection), milvus_opened(SWEEPING)
    store.create("staff", OLD, None, ALICE)
    enrolled(store.enrol("staff", [one("ann", unit(1)[0]), one("bo", unit(2)[0])], ALICE))
    row = backdoor.row()

    def broken(operation: str, name: str, keys: Sequence[Any]) -> None:
        if name in row.tables.values():
            raise StoreUnavailable("Milvus does not delete: code 1.")

    connection.before = broken
    receipt = store.delete_subject("staff", "ann", ALICE)
    assert (receipt.templates, receipt.rows, receipt.covers) == (1, 3, ("index",))
    assert receipt.hash == log.head().hash
    with refused(UnknownSubject):
        store.delete_subject("staff", "ann", ALICE)
    # Its template is given still. So it is no time yet to say that Milvus' files hold nothing of it.
    milvus_opened(MilvusOptions(first_purge_seconds=0, stopped_seconds=-60.0)).expire(0)
    assert dict(log.unpurged()) == {"staff": receipt.sequence}
    sweeping.expire(0)
    assert dict(log.unpurged()) == {"staff": receipt.sequence + 1}  # the sweep's rows are looked for, too
    assert backdoor.templates() == 1
    receipt = store.delete("staff", ALICE)
    assert (receipt.templates, receipt.covers, receipt.hash) == (1, ("index",), log.head().hash)
    assert [name for name in backdoor.connection.names() if row.id in name]
    sweeping.expire(0)
    assert not [name for name in backdoor.connection.names() if row.id in name]


def test_a_record_that_does_not_decrypt_stands_in_nobodys_way(milvus_opened: Open, backdoor: Backdoor) -> None:
    store, now = milvus_opened(), time.time()
    for name in ("a", "b"):
        store.create(name, OLD, None, ALICE)
        people = [one(subject, unit(i)[0], expires=now + 60) for i, subject in enumerate(("ann", "bo", "cy"))]
        enrolled(store.enrol(name, [*people, one("di", unit(9)[0])], ALICE))
    gallery, connection = backdoor.gallery("a"), backdoor.connection
    broken = {gallery.cipher.subject(subject) for subject in ("bo", "cy")}
    for record in connection.pages(gallery.records, f"kind == {COMMIT}", [*RECORD_FIELDS, "vector"], "strong"):
        if record["subject"] in broken:
            connection.upsert(gallery.records, [{**record, "data": record["data"][:-8] + "AAAAAAAA"}])
    time.sleep(STALE_SECONDS + 0.1)
    assert [hit.subject for hit in store.search("a", ENCODER, unit(1), 5)[0].hits] != []
    assert sorted(store.subjects("a")) == ["ann", "di"]
    assert sorted(subject.id for subject in store.export("a")) == ["ann", "di"]
    assert store.delete_subject("a", "bo", ALICE).templates == 1
    assert store.expire(now + 120) == 5  # what is past its time goes in both galleries, also where it does not open
    assert [list(store.subjects(name)) for name in ("a", "b")] == [["di"], ["di"]]
    assert backdoor.templates("a") == 1
    row = backdoor.row("a")
    backdoor.catalogue.change(replace(row, wrapped=backdoor.row("b").wrapped))  # nor does its key
    store = milvus_opened()
    enrolled(store.enrol("b", [one("ed", unit(5)[0], expires=now)], ALICE))
    assert store.expire(now + 120) == 1


class BehindConnection(MilvusConnection):
    """Gives no row, as a query node does that has ceased to follow."""

    def query(self, name: str, *args: Any) -> list[Row]:
        return []


def test_a_row_that_is_acknowledged_and_not_given_is_no_rival(milvus_opened: Open, milvus_server: MilvusServer) -> None:
    store = milvus_opened(connection=BehindConnection(milvus_server.uri))
    with pytest.raises(StoreUnavailable, match="acknowledged the row of gallery staff"):
        store.create("staff", OLD, None, ALICE)
    assert not milvus_opened().list()
