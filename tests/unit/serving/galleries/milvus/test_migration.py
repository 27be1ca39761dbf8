"""A migration in Milvus that is interrupted, or that others change or enrol beside."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import pytest

from pkd.serving.core.errors import GalleryConflict, StoreUnavailable
from pkd.serving.galleries.audit import AuditFile
from pkd.serving.galleries.milvus.records import COMMIT
from pkd.serving.galleries.milvus.store import MilvusStore
from pkd.serving.galleries.store import Space
from pkd.toolkit.core.errors import SpaceMismatch
from tests.support.gallery_examples import ALICE, BOB, DIM, ENCODER, NEW, NEXT, OLD, enrolled, one, refused, unit
from tests.support.milvus_stores import SWEEPING, Backdoor, HookedConnection, Open

Connect = Callable[[], HookedConnection]


class Died(BaseException):
    """The process is gone: nothing catches this to clean up."""


def moving(store: MilvusStore) -> None:
    """Make a gallery whose only subject has moved."""
    store.create("staff", OLD, None, ALICE)
    enrolled(store.enrol("staff", [one("ann", unit(1)[0])], ALICE))
    store.begin_migration("staff", NEW, ALICE)
    enrolled(store.enrol("staff", [one("ann", unit(2)[0], encoder=NEXT, space=NEW)], ALICE))


def actions(log: AuditFile) -> list[str]:
    with closing(sqlite3.connect(log.path)) as db:
        return [action for (action,) in db.execute("SELECT action FROM audit ORDER BY sequence")]


def dies_while_ending(dying: MilvusStore, connection: HookedConnection, catalogue: str) -> None:
    def once(operation: str, name: str, rows: Sequence[Any]) -> None:
        if name == catalogue:
            raise Died

    connection.after = once
    with pytest.raises(Died):
        dying.end_migration("staff", ALICE)
    connection.after = None


def test_an_end_is_undone_interrupted_and_gone_on_with(
    milvus_opened: Open, connect: Connect, backdoor: Backdoor, log: AuditFile
) -> None:
    connection, catalogue = connect(), backdoor.catalogue.table
    ending, store = milvus_opened(connection=connection), milvus_opened()
    moving(ending)
    before = backdoor.row()

    def late(operation: str, name: str, rows: Sequence[Any]) -> None:
        if name == catalogue:
            connection.before = None
            enrolled(store.enrol("staff", [one("bo", unit(3)[0])], ALICE))

    connection.before = late
    with refused(GalleryConflict) as caught:
        ending.end_migration("staff", ALICE)
    assert "bo" in str(caught.value)
    assert backdoor.row() == before
    assert list(store.unmoved("staff")) == ["bo"]
    store.delete_subject("staff", "bo", ALICE)

    dies_while_ending(ending, connection, catalogue)
    assert store.verify().wrong == []
    (refusal,) = store.enrol("staff", [one("bo", unit(3)[0])], ALICE)
    assert isinstance(refusal, SpaceMismatch)
    assert store.search("staff", ENCODER, unit(1), 1)[0].hits[0].subject == "ann"  # nothing is lost yet
    for call in (
        lambda: store.begin_migration("staff", Space("third@sha256:3", DIM), ALICE),
        lambda: store.end_migration("staff", ALICE, abandon=True),
        lambda: store.unmoved("staff"),
    ):
        with refused(GalleryConflict):
            call()  # type: ignore[no-untyped-call]
    assert store.end_migration("staff", ALICE).templates == 1
    row = backdoor.row()
    assert (row.ending, row.space, list(row.tables)) == (None, NEW, [NEW.id])
    assert (actions(log).count("end-migration"), backdoor.moved()) == (1, 0)
    assert len([name for name in backdoor.connection.names() if row.id in name]) == 2


def test_an_end_is_finished_by_sweeps(
    milvus_opened: Open, connect: Connect, backdoor: Backdoor, log: AuditFile
) -> None:
    mortal, connection = connect(), connect()
    dying, store = milvus_opened(connection=mortal), milvus_opened(SWEEPING, connection)
    moving(dying)
    old, names = backdoor.row().tables[OLD.id], set(backdoor.connection.names())
    dies_while_ending(dying, mortal, backdoor.catalogue.table)
    milvus_opened().expire(0)  # too soon
    assert backdoor.row().ending

    def broken(operation: str, name: str, rows: Sequence[Any]) -> None:
        if operation == "drop":
            raise StoreUnavailable("Milvus does not drop_collection: code 1.")

    connection.before = broken
    with refused(StoreUnavailable):
        store.expire(0)  # decides and records it, and then Milvus fails
    connection.before = None
    assert not backdoor.row().ending
    assert actions(log)[-1] == "end-migration"
    assert "staff" in log.unpurged()
    assert store.get("staff").moved == 0
    assert (set(backdoor.connection.names()), backdoor.moved()) == (names, 1)
    store.expire(0)
    assert (set(backdoor.connection.names()), backdoor.moved()) == (names - {old}, 0)
    assert store.search("staff", NEXT, unit(2), 1)[0].hits[0].subject == "ann"


def test_an_enrolment_whose_commit_comes_after_the_end_is_withdrawn(
    milvus_opened: Open, connect: Connect, log: AuditFile
) -> None:
    connection = connect()
    first, second = milvus_opened(connection=connection), milvus_opened()
    moving(first)

    def late(operation: str, name: str, rows: Sequence[Any]) -> None:
        if operation == "insert" and rows[0].get("kind") == COMMIT:  # its templates are in the old collection
            connection.before = None
            second.end_migration("staff", ALICE)

    keyed = one("bo", unit(3)[0], key="k", digest="d")
    asked = [keyed, keyed, one("di", unit(5)[0]), one("cy", unit(4)[0], encoder=NEXT, space=NEW)]
    connection.before = late
    *withdrawn, stays = first.enrol("staff", asked, ALICE)
    assert [type(answer) for answer in withdrawn] == [GalleryConflict] * 3
    assert not enrolled([stays])[0].replayed
    assert sorted(second.subjects("staff")) == ["ann", "cy"]
    assert len(second.subject("staff", "cy").templates) == 1  # and not twice
    assert first.get("staff").subjects == 2
    assert (actions(log).count("enrol"), actions(log).count("expire")) == (3, 1)  # for a purge to look for
    again = one("bo", unit(3)[0], encoder=NEXT, space=NEW, key="k", digest="d")
    assert [answer.replayed for answer in enrolled(first.enrol("staff", [again], ALICE))] == [False]


def test_two_migrations_begun_at_once_are_one(
    milvus_opened: Open, connect: Connect, backdoor: Backdoor, log: AuditFile
) -> None:
    connection = connect()
    first, second = milvus_opened(), milvus_opened(connection=connection)
    first.create("staff", OLD, None, ALICE)
    second.get("staff")  # or the list of galleries would be the first that it creates

    def slow(operation: str, name: str, rows: Sequence[Any]) -> None:
        if operation == "create":
            connection.after = None
            first.begin_migration("staff", NEW, ALICE)

    connection.after = slow
    with refused(GalleryConflict):
        second.begin_migration("staff", Space("third@sha256:3", DIM), BOB)
    row = backdoor.row()
    assert row.moving_to == NEW
    assert len([name for name in backdoor.connection.names() if row.id in name]) == 3  # nothing of the other one
    assert actions(log).count("begin-migration") == 1
