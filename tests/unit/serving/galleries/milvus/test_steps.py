"""A Milvus gallery when a process dies between two steps, or two change it at once; and what Milvus learns."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pkd.serving.core.errors import GalleryConflict, IdempotencyConflict, StoreUnavailable, TooLarge
from pkd.serving.galleries.audit_file import AuditFile
from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.milvus.client import STALE_SECONDS, Row, Tables
from pkd.serving.galleries.milvus.collection import records_of
from pkd.serving.galleries.milvus.records import COMMIT, JOURNAL, SUBJECT
from pkd.serving.galleries.milvus.retention import sweep as sweep_rows
from pkd.serving.galleries.milvus.store import MilvusStore
from pkd.serving.galleries.store import Consent, Enrolled, Enrolment, NewTemplate, Space
from pkd.toolkit.core.errors import PkdError, SpaceMismatch
from tests.support.gallery_examples import ALICE, BOB, ENCODER, NEW, NEXT, OLD, enrolled, one, refused, unit
from tests.support.milvus_server import MilvusServer
from tests.support.milvus_stores import MASTER, Open, milvus_opened  # noqa: F401 - a fixture


@pytest.fixture
def opened(milvus_opened: Open) -> Open:  # noqa: F811
    return milvus_opened


class Died(BaseException):
    """The process is gone: nothing catches this to clean up."""


class MortalTables(Tables):
    """Dies at the write of that number, before it is made."""

    writes_left = 10_000

    def _write(self, operation: str, name: str, rows: Any) -> None:
        if rows:
            self.writes_left -= 1
            if self.writes_left < 0:
                raise Died
        super()._write(operation, name, rows)


@pytest.fixture
def mortal(milvus_server: MilvusServer, tmp_path: Path, opened: Open) -> MilvusStore:
    """A store that dies when its tables say so; ``opened`` has cleared the server."""
    return MilvusStore(MortalTables(milvus_server.uri), AuditFile(tmp_path / "mortal.db"), MASTER)


def dying(store: MilvusStore, change: Callable[[], object], after: int) -> bool:
    """Whether ``change`` died when only so many writes were granted."""
    tables = store._tables
    assert isinstance(tables, MortalTables)
    tables.writes_left = after
    try:
        change()
    except Died:
        return True
    finally:
        tables.writes_left = 10_000
        time.sleep(STALE_SECONDS + 0.3)  # until other stores see as far as it came
    return False


def sweep(store: MilvusStore, gallery: str = "staff") -> None:
    """As an hour later."""
    entry = store._catalogue.entry(gallery, "ALL")
    sweep_rows(store._open(entry), entry, time.time() + 60)


def left(store: MilvusStore, gallery: str = "staff") -> dict[str, int]:
    """How many rows Milvus has of each kind."""
    entry = store._catalogue.entry(gallery, "ALL")
    opened = store._open(entry)
    count = store._tables.count
    kinds = {"journals": JOURNAL, "commits": COMMIT, "subjects": SUBJECT}
    rows = {name: count(opened.records, f"kind == {kind}", "ALL") for name, kind in kinds.items()}
    return {**rows, "templates": sum(count(table, 'id > ""', "ALL") for table in entry.tables.values())}


def test_an_enrolment_that_dies_at_any_step_is_whole_or_absent(opened: Open, mortal: MilvusStore) -> None:
    store, vectors = opened(), unit(1, 70)
    store.create("staff", OLD, None, ALICE)
    enrolled(store.enrol("staff", [one("old", vectors[0], attributes={"site": "a"})], ALICE))
    steps = 0
    for steps in range(20):
        new, again = f"new{steps}", vectors[3 * steps + 1 : 3 * steps + 4]
        templates = [NewTemplate(ENCODER, OLD.id, vector) for vector in again[:2]]
        asked = [Enrolment(new, templates), one("old", again[2], attributes={"site": f"s{steps}"})]
        before = len(store.subject("staff", "old").templates)
        died = dying(mortal, lambda asked=asked: mortal.enrol("staff", asked, ALICE), steps)  # type: ignore[misc]
        there = new in store.subjects("staff")
        (found,) = store.search("staff", ENCODER, again[:1], 1)
        assert (found.hits[0].subject == new) == there
        (found,) = store.search("staff", ENCODER, again[2:], 50)
        assert ({hit.subject: hit.score for hit in found.hits}["old"] > 0.999) == there
        old = store.subject("staff", "old")
        assert len(old.templates) == before + there
        if there:
            assert len(store.subject("staff", new).templates) == 2
        # Whoever was enrolled is found by the attributes that hold now, whichever step came last.
        (found,) = store.search("staff", ENCODER, vectors[:1], 1, old.attributes)
        assert [hit.subject for hit in found.hits] == ["old"]
        assert found.hits[0].score > 0.999
        sweep(store)
        subjects = store.subjects("staff")
        total = sum(len(store.subject("staff", subject).templates) for subject in subjects)
        assert left(store) == {
            "journals": 0, "commits": left(store)["commits"], "subjects": len(subjects), "templates": total
        }  # fmt: skip
        assert store.get("staff").subjects == len(subjects)
        if not died:
            assert there
            break
    assert 5 <= steps < 19  # there were as many steps, and each of them was died at


def test_a_deletion_that_dies_at_any_step_is_finished(opened: Open, mortal: MilvusStore) -> None:
    store = opened()
    store.create("staff", OLD, None, ALICE)
    enrolled(store.enrol("staff", [one("bo", unit(9)[0])], ALICE))
    for steps in range(10):
        enrolled(store.enrol("staff", [one("ann", unit(1)[0]), one("ann", unit(2)[0])], ALICE))
        died = dying(mortal, lambda: mortal.delete_subject("staff", "ann", ALICE), steps)
        there = "ann" in store.subjects("staff")
        assert there == (steps < 2)  # from the second step on
        assert (len(store.search("staff", ENCODER, unit(1), 9)[0].hits) == 2) == there
        if there:
            assert len(store.subject("staff", "ann").templates) == 2
            store.delete_subject("staff", "ann", ALICE)
        sweep(store)
        assert left(store) == {"journals": 0, "commits": 1, "subjects": 1, "templates": 1}
        if not died:
            break
    assert 4 <= steps < 9


def test_an_enrolment_under_way_is_not_swept(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = opened(), opened()
    first.create("staff", OLD, None, ALICE)
    enrolled(first.enrol("staff", [one("ann", unit(1)[0])], ALICE))
    entry = first._catalogue.entry("staff", "ALL")
    subject = first._open(entry).seal.subject("ann")
    first._open(entry).note([subject], [])  # another one's, dead before its first step
    insert = first._tables.insert

    def slow(name: str, rows: list[Row]) -> None:
        if len(rows) and "encoder" not in rows[0] and rows[0]["kind"] == COMMIT:
            # Only the dead one's journal is old enough.
            sweep_rows(second._open(entry), entry, started)
        insert(name, rows)

    time.sleep(0.01)
    started = time.time()
    monkeypatch.setattr(first._tables, "insert", slow)
    enrolled(first.enrol("staff", [one("ann", unit(2)[0])], ALICE))
    assert len(second.subject("staff", "ann").templates) == 2
    assert left(first)["journals"] == 0


def test_two_create_one_gallery_at_once(opened: Open) -> None:
    stores, made = [opened(), opened()], []
    threads = [
        threading.Thread(target=lambda store=store: made.append(store.create("staff", OLD, None, ALICE)))  # type: ignore[misc]
        for store in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2
    assert made[0] == made[1]
    (gallery,) = stores[0].list()
    enrolled(stores[0].enrol("staff", [one("ann", unit(1)[0])], ALICE))
    assert len(stores[1].search("staff", ENCODER, unit(1), 1)[0].hits) == 1  # both have the same key
    assert len(stores[0]._tables.names()) == 3  # and nothing is left of the other one
    assert gallery == made[0]


def test_one_idempotency_key_in_two_processes_enrols_at_most_once(opened: Open) -> None:
    stores = [opened(), opened()]
    stores[0].create("staff", OLD, None, ALICE)
    asked = one("ann", unit(1)[0], key="k", digest="d")
    answers: list[Enrolled | PkdError] = []
    threads = [
        threading.Thread(target=lambda store=store: answers.extend(store.enrol("staff", [asked], ALICE)))  # type: ignore[misc]
        for store in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = [answer for answer in answers if isinstance(answer, Enrolled)]
    assert all(isinstance(answer, IdempotencyConflict) for answer in answers if isinstance(answer, PkdError))
    assert left(stores[0])["templates"] == len({answer.templates for answer in done}) <= 1
    (again,) = enrolled(stores[1].enrol("staff", [asked], ALICE))
    assert again.replayed == bool(done)
    assert left(stores[0])["templates"] == 1


def test_an_enrolment_in_a_space_that_is_being_left_is_not_lost_in_silence(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = opened(), opened()
    first.create("staff", OLD, None, ALICE)
    enrolled(first.enrol("staff", [one("ann", unit(1)[0])], ALICE))
    first.begin_migration("staff", NEW, ALICE)
    enrolled(first.enrol("staff", [one("ann", unit(2)[0], encoder=NEXT, space=NEW)], ALICE))
    change = second._catalogue.change

    def late(entry: Any) -> None:
        change(entry)
        if not entry.moving_to:  # the old space is left, but not yet dropped
            (answer,) = first.enrol("staff", [one("bo", unit(3)[0])], ALICE)
            assert isinstance(answer, PkdError)
            assert isinstance(answer, (GalleryConflict, SpaceMismatch))

    monkeypatch.setattr(second._catalogue, "change", late)
    first.search("staff", ENCODER, unit(1), 1)  # it knows of the migration, and will not look again at once
    monkeypatch.setattr("pkd.serving.galleries.milvus.catalogue.KNOWN_SECONDS", 60)
    second.end_migration("staff", ALICE)
    assert first._catalogue.find("staff", "ALL") == second._catalogue.find("staff", "ALL")
    monkeypatch.undo()
    assert list(first.subjects("staff")) == ["ann"]


def test_milvus_learns_no_name_no_attribute_and_no_vector(opened: Open) -> None:
    store, vectors = opened(), unit(1, 2)
    store.create("staff", OLD, None, ALICE)
    consent = Consent("contract", "drawer 3")
    asked = one(
        "ann@example", vectors[0], attributes={"site": "north wing"}, consent=consent, key="order 7", digest="d"
    )
    enrolled(store.enrol("staff", [asked, one("bo", vectors[1])], BOB))
    client, stolen, hidden = store._tables._connected(), "", []
    for name in store._tables.names():
        for row in client.query(name, filter='id > ""', output_fields=["*"], limit=100, consistency_level="Strong"):
            vector = row.pop("vector")
            if len(vector) == OLD.dim:
                hidden.append(np.asarray(vector))
            stolen += json.dumps(row)
    assert "staff" in stolen  # the names of galleries are plain, and this test reads what there is
    for secret in ("ann", "north", "site", "contract", "drawer", "order 7", ENCODER, ALICE, BOB):
        assert secret not in stolen, secret
    assert len(hidden) == 2
    for vector in hidden:
        assert np.abs(vectors - vector).max(1).min() > 0.1
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)  # templates are kept at length 1
    assert abs(hidden[0] @ hidden[1] - vectors[0] @ vectors[1] / lengths.prod()) < 1e-6
    assert MASTER.key.hex() not in stolen


def test_what_was_deleted_leaves_the_files_and_the_log_says_so(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process than the one that deleted: only one of a server's looks after this."""
    monkeypatch.setattr("pkd.serving.galleries.milvus.store.FIRST_PURGE_SECONDS", 0)
    monkeypatch.setattr("pkd.serving.galleries.milvus.store.PURGE_SECONDS", 0)
    deleting, sweeping = opened(), opened()
    for name in ("staff", "guests"):
        deleting.create(name, OLD, None, ALICE)
        enrolled(deleting.enrol(name, [one(f"s{i}", unit(i)[0]) for i in range(3)], ALICE))
    entry = deleting._catalogue.entry("staff", "ALL")
    tables, client = [records_of(deleting._tables, entry.id), *entry.tables.values()], deleting._tables._connected()
    deleting.delete_subject("staff", "s1", ALICE)
    deleting.delete("guests", ALICE)
    for table in tables:
        client.flush(table)
    assert client.get_collection_stats(tables[1])["row_count"] == 3  # marked as deleted, and still there
    assert set(sweeping._log.unpurged()) == {"staff", "guests"}
    deadline = time.monotonic() + 240
    while waiting := sweeping._log.unpurged():
        assert time.monotonic() < deadline, waiting
        sweeping.expire(0)  # Milvus may take a request for done, and do nothing: it is asked until it has
        time.sleep(3)
    for table in tables:
        given = client.query(table, filter="", output_fields=["count(*)"], consistency_level="Strong")[0]["count(*)"]
        assert client.get_collection_stats(table)["row_count"] == given
    assert len(sweeping.subject("staff", "s2", vectors=True).templates) == 1
    deleting.delete_subject("staff", "s2", ALICE)
    assert set(sweeping._log.unpurged()) == {"staff"}


def test_another_master_key_opens_nothing(milvus_server: MilvusServer, opened: Open, tmp_path: Path) -> None:
    opened().create("staff", OLD, None, ALICE)
    other = MilvusStore(Tables(milvus_server.uri), AuditFile(tmp_path / "other.db"), MasterKey(bytes(32)))
    for call in (lambda: other.search("staff", ENCODER, unit(1), 1), other.list, lambda: list(other.export("staff"))):
        with refused(StoreUnavailable) as caught:
            call()
        assert "key" in str(caught.value)
    other.close()


def test_templates_without_a_commit_do_not_crowd_out_others(opened: Open) -> None:
    store, vectors = opened(), unit(1, 60)
    store.create("staff", OLD, None, ALICE)
    enrolled(store.enrol("staff", [one(f"s{i}", vectors[i]) for i in range(3)], ALICE))
    entry = store._catalogue.entry("staff", "ALL")
    opened_, (table,) = store._open(entry), entry.tables.values()
    query = unit(5)
    near = opened_.rotation(OLD.id, OLD.dim).hide(query)[0]
    encoder = opened_.seal.hashed("encoder", ENCODER)
    stray = [
        {"id": f"{i:032x}.0", "subject": "f" * 64, "encoder": encoder, "tags": {}, "vector": near} for i in range(50)
    ]
    store._tables.insert(table, stray)
    (found,) = store.search("staff", ENCODER, query, 3)
    assert {hit.subject for hit in found.hits} == {"s0", "s1", "s2"}


def test_a_deletion_beside_an_enrolment_leaves_the_subject_counted(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = opened(), opened()
    first.create("staff", OLD, None, ALICE)
    enrolled(first.enrol("staff", [one("ann", unit(1)[0])], ALICE))
    delete = second._tables.delete

    def late(name: str, keys: list[str]) -> None:
        if any(key.startswith("~subject/") for key in keys):  # it has looked, and will say that ann is not there
            monkeypatch.undo()
            enrolled(first.enrol("staff", [one("ann", unit(2)[0])], ALICE))
        delete(name, keys)

    monkeypatch.setattr(second._tables, "delete", late)
    assert second.delete_subject("staff", "ann", BOB).templates == 1
    assert left(second) == {"journals": 0, "commits": 1, "subjects": 1, "templates": 1}


def test_a_page_is_full_though_subjects_are_deleted_meanwhile(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened()
    store.create("staff", OLD, None, ALICE)
    enrolled(store.enrol("staff", [one(f"s{i}", unit(i)[0]) for i in range(6)], ALICE))
    names = list(store.subjects("staff"))
    gallery = store._open(store._catalogue.entry("staff", "ALL"))
    page = gallery.page

    def slow(after: str, limit: int) -> list[str]:
        found = page(after, limit)
        monkeypatch.undo()
        store.delete_subject("staff", names[1], ALICE)
        return found

    monkeypatch.setattr(gallery, "page", slow)
    assert list(store.subjects("staff", limit=3)) == [names[0], *names[2:4]]


def test_a_subject_may_have_hundreds_of_templates_in_one_enrolment(opened: Open) -> None:
    store = opened()
    space, encoder = Space("antelopev2-r100@sha256:" + "b" * 64, OLD.dim), "edgeface-xs@sha256:" + "a" * 64
    store.create("staff", space, None, ALICE)
    vectors = unit(1, 3_000)
    some, many = (
        Enrolment(name, [NewTemplate(encoder, space.id, vector) for vector in vectors[:count]], key=name, digest="d")
        for name, count in (("ann", 1_000), ("bo", 3_000))
    )
    answer, refusal = store.enrol("staff", [some, many], ALICE)
    assert isinstance(refusal, PkdError)
    assert isinstance(refusal, TooLarge) and refusal.details["limit"] == 1_000
    assert isinstance(answer, Enrolled)
    assert [template.id for template in store.subject("staff", "ann").templates] == list(answer.templates)
    assert store.enrol("staff", [some], ALICE) == [replace(answer, replayed=True)]
    assert store.delete_subject("staff", "ann", ALICE).templates == 1_000
    assert left(store)["templates"] == 0
