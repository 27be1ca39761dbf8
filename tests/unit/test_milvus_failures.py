"""Milvus hangs, dies and comes back: every call ends in time and says so, and nothing that was acknowledged is lost."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from gallery_conformance import ALICE, ENCODER, NEW, OLD, enrolled, one, refused, unit
from milvus_server import MilvusServer
from milvus_stores import MASTER, Open, milvus_opened  # noqa: F401 - a fixture

from pkd.serving.galleries.audit_file import AuditFile
from pkd.serving.galleries.milvus_store import MilvusStore
from pkd.serving.galleries.milvus_tables import Tables

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
        with refused("store-unavailable"):
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
    with refused("store-unavailable"):
        store.check()
    assert time.monotonic() - started < BOUND
    store.close()


@pytest.mark.parametrize("uri", ["nowhere", "", "ftp://127.0.0.1:1"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, uri: str) -> None:
    store = MilvusStore(Tables(uri, timeout=TIMEOUT), AuditFile(tmp_path / "audit.db"), MASTER)
    with refused("store-unavailable"):
        store.check()
    store.close()
