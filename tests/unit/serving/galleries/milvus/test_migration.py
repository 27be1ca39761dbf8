"""A migration in Milvus that is interrupted, or that others change or enrol beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pkd.serving.core.errors import GalleryConflict, StoreUnavailable
from pkd.serving.galleries.milvus.client import Row
from pkd.serving.galleries.milvus.inspection import inspect
from pkd.serving.galleries.milvus.records import COMMIT, MOVED
from pkd.serving.galleries.milvus.store import MilvusStore
from pkd.serving.galleries.store import Space
from pkd.toolkit.core.errors import SpaceMismatch
from tests.support.gallery_examples import ALICE, BOB, DIM, ENCODER, NEW, NEXT, OLD, enrolled, one, refused, unit
from tests.support.milvus_stores import MASTER, Open, milvus_opened  # noqa: F401 - a fixture


class Died(BaseException):
    """The process is gone: nothing catches this to clean up."""


@pytest.fixture
def opened(milvus_opened: Open) -> Open:  # noqa: F811
    return milvus_opened


def moving(store: MilvusStore) -> None:
    """A gallery whose only subject has moved."""
    store.create("staff", OLD, None, ALICE)
    enrolled(store.enrol("staff", [one("ann", unit(1)[0])], ALICE))
    store.begin_migration("staff", NEW, ALICE)
    enrolled(store.enrol("staff", [one("ann", unit(2)[0], encoder=NEXT, space=NEW)], ALICE))


def moved_rows(store: MilvusStore) -> int:
    entry = store._catalogue.entry("staff", "ALL")
    return store._tables.count(store._open(entry).records, f"kind == {MOVED}", "ALL")


def actions(store: MilvusStore) -> list[str]:
    return [action for (action,) in store._log._db.execute("SELECT action FROM audit ORDER BY sequence")]


def dies_while_ending(dying: MilvusStore, monkeypatch: pytest.MonkeyPatch) -> None:
    change = dying._catalogue.change

    def once(entry: Any) -> None:
        change(entry)
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(dying._catalogue, "change", once)
        with pytest.raises(Died):
            dying.end_migration("staff", ALICE)


def test_an_end_is_undone_interrupted_and_gone_on_with(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    ending, store = opened(), opened()
    moving(ending)
    before, change = store._catalogue.entry("staff", "ALL"), ending._catalogue.change

    def late(entry: Any) -> None:
        monkeypatch.undo()
        enrolled(store.enrol("staff", [one("bo", unit(3)[0])], ALICE))
        change(entry)

    monkeypatch.setattr(ending._catalogue, "change", late)
    with refused(GalleryConflict) as caught:
        ending.end_migration("staff", ALICE)
    assert "bo" in str(caught.value)
    assert store._catalogue.entry("staff", "ALL") == before
    assert list(store.unmoved("staff")) == ["bo"]
    store.delete_subject("staff", "bo", ALICE)

    dies_while_ending(ending, monkeypatch)
    assert inspect(store._tables, store._log, MASTER).wrong == []
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
    entry = store._catalogue.entry("staff", "ALL")
    assert (entry.ending, entry.space, list(entry.tables)) == (None, NEW, [NEW.id])
    assert (actions(store).count("end-migration"), moved_rows(store)) == (1, 0)
    assert len([name for name in store._tables.names() if entry.id in name]) == 2


def test_an_end_is_finished_by_sweeps(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    dying, store = opened(), opened()
    moving(dying)
    old, names = store._catalogue.entry("staff", "ALL").tables[OLD.id], set(store._tables.names())
    dies_while_ending(dying, monkeypatch)
    store.expire(0)  # too soon
    assert store._catalogue.entry("staff", "ALL").ending

    def broken(name: str) -> None:
        raise StoreUnavailable("Milvus does not drop_collection: code 1.")

    for module in ("store", "migration"):
        monkeypatch.setattr(f"pkd.serving.galleries.milvus.{module}.SWEEP_SECONDS", -60.0)
    with monkeypatch.context() as patch:
        patch.setattr(store._tables, "drop", broken)
        store.expire(0)  # decides and records it, and then Milvus fails
    assert not store._catalogue.entry("staff", "ALL").ending
    assert actions(store)[-1] == "end-migration"
    assert "staff" in store._log.unpurged()
    assert store.get("staff").moved == 0
    assert (set(store._tables.names()), moved_rows(store)) == (names, 1)
    monkeypatch.setattr("pkd.serving.galleries.milvus.retention.SWEEP_SECONDS", -60.0)
    store.expire(0)
    assert (set(store._tables.names()), moved_rows(store)) == (names - {old}, 0)
    assert store.search("staff", NEXT, unit(2), 1)[0].hits[0].subject == "ann"


def test_an_enrolment_whose_commit_comes_after_the_end_is_withdrawn(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = opened(), opened()
    moving(first)
    insert = first._tables.insert

    def late(name: str, rows: list[Row]) -> None:
        if rows[0].get("kind") == COMMIT:  # its templates are in the old collection
            monkeypatch.undo()
            second.end_migration("staff", ALICE)
        insert(name, rows)

    keyed = one("bo", unit(3)[0], key="k", digest="d")
    asked = [keyed, keyed, one("di", unit(5)[0]), one("cy", unit(4)[0], encoder=NEXT, space=NEW)]
    monkeypatch.setattr(first._tables, "insert", late)
    *withdrawn, stays = first.enrol("staff", asked, ALICE)
    assert [type(answer) for answer in withdrawn] == [GalleryConflict] * 3
    assert not enrolled([stays])[0].replayed
    assert sorted(second.subjects("staff")) == ["ann", "cy"]
    assert len(second.subject("staff", "cy").templates) == 1  # and not twice
    assert first.get("staff").subjects == 2
    assert (actions(first).count("enrol"), actions(first).count("expire")) == (3, 1)  # for a purge to look for
    again = one("bo", unit(3)[0], encoder=NEXT, space=NEW, key="k", digest="d")
    assert [answer.replayed for answer in enrolled(first.enrol("staff", [again], ALICE))] == [False]


def test_two_migrations_begun_at_once_are_one(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = opened(), opened()
    first.create("staff", OLD, None, ALICE)
    second.get("staff")  # or the list of galleries would be the first that it creates
    create: Callable[..., None] = second._tables.create

    def slow(*args: Any) -> None:
        create(*args)
        monkeypatch.undo()
        first.begin_migration("staff", NEW, ALICE)

    monkeypatch.setattr(second._tables, "create", slow)
    with refused(GalleryConflict):
        second.begin_migration("staff", Space("third@sha256:3", DIM), BOB)
    entry = first._catalogue.entry("staff", "ALL")
    assert entry.moving_to == NEW
    assert len([name for name in first._tables.names() if entry.id in name]) == 3  # nothing of the other one
    assert actions(first).count("begin-migration") == 1
