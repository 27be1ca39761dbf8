"""A Milvus gallery when a process dies between two steps, or two change it at once; and what Milvus learns."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymilvus import MilvusClient

from pkd.serving.core.errors import GalleryConflict, IdempotencyConflict, StoreUnavailable, TooLarge
from pkd.serving.galleries.audit import AuditFile
from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.milvus.client import MilvusConnection, Row
from pkd.serving.galleries.milvus.commit import SWEEP_SECONDS
from pkd.serving.galleries.milvus.gallery import records_of
from pkd.serving.galleries.milvus.records import COMMIT, JOURNAL
from pkd.serving.galleries.milvus.store import MilvusOptions, MilvusStore
from pkd.serving.galleries.store import Consent, Enrolled, Enrolment, NewTemplate, Space
from pkd.toolkit.core.errors import PkdError, SpaceMismatch
from tests.support.gallery_examples import ALICE, BOB, ENCODER, NEW, NEXT, OLD, enrolled, one, refused, unit
from tests.support.milvus_server import MilvusServer
from tests.support.milvus_stores import MASTER, STALE_SECONDS, SWEEPING, Backdoor, HookedConnection, Open

Connect = Callable[[], HookedConnection]


class Died(BaseException):
    """The process is gone: nothing catches this to clean up."""


class Mortal:
    """Dies at the write of that number, before it is made."""

    writes_left = 10_000

    def __call__(self, operation: str, name: str, rows: Sequence[Any]) -> None:
        if rows:
            self.writes_left -= 1
            if self.writes_left < 0:
                raise Died

    def dies(self, change: Callable[[], object], after: int) -> bool:
        """Whether ``change`` died when only so many writes were granted."""
        self.writes_left = after
        try:
            change()
        except Died:
            return True
        finally:
            self.writes_left = 10_000
            time.sleep(STALE_SECONDS + 0.1)  # until other stores see as far as it came
        return False


@pytest.fixture
def thief(milvus_server: MilvusServer) -> Iterator[MilvusClient]:
    """Who reads Milvus and has no key."""
    client = MilvusClient(milvus_server.uri)
    yield client
    client.close()


@pytest.fixture
def mortal(connect: Connect, milvus_opened: Open) -> tuple[MilvusStore, Mortal]:
    """Make a store, and what it dies of."""
    connection, mortal = connect(), Mortal()
    connection.before = mortal
    return milvus_opened(connection=connection), mortal


def test_an_enrolment_that_dies_at_any_step_is_whole_or_absent(
    milvus_opened: Open, mortal: tuple[MilvusStore, Mortal], backdoor: Backdoor
) -> None:
    (dying, death), sweeper = mortal, milvus_opened(SWEEPING)
    store, vectors = milvus_opened(), unit(1, 70)
    store.create("staff", OLD, None, ALICE)
    enrolled(store.enrol("staff", [one("old", vectors[0], attributes={"site": "a"})], ALICE))
    steps = 0
    for steps in range(20):
        new, again = f"new{steps}", vectors[3 * steps + 1 : 3 * steps + 4]
        templates = [NewTemplate(ENCODER, OLD.id, vector) for vector in again[:2]]
        asked = [Enrolment(new, templates), one("old", again[2], attributes={"site": f"s{steps}"})]
        before = len(store.subject("staff", "old").templates)
        died = death.dies(lambda asked=asked: dying.enrol("staff", asked, ALICE), steps)  # type: ignore[misc]
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
        assert sweeper.expire(0) == 0
        subjects = store.subjects("staff")
        total = sum(len(store.subject("staff", subject).templates) for subject in subjects)
        left = backdoor.left()
        assert left == {"journals": 0, "commits": left["commits"], "subjects": len(subjects), "templates": total}
        assert store.get("staff").subjects == len(subjects)
        if not died:
            assert there
            break
    assert 5 <= steps < 19  # there were as many steps, and each of them was died at


def test_a_deletion_that_dies_at_any_step_is_finished(
    milvus_opened: Open, mortal: tuple[MilvusStore, Mortal], backdoor: Backdoor
) -> None:
    (dying, death), sweeper, store = mortal, milvus_opened(SWEEPING), milvus_opened()
    store.create("staff", OLD, None, ALICE)
    enrolled(store.enrol("staff", [one("bo", unit(9)[0])], ALICE))
    for steps in range(10):
        enrolled(store.enrol("staff", [one("ann", unit(1)[0]), one("ann", unit(2)[0])], ALICE))
        died = death.dies(lambda: dying.delete_subject("staff", "ann", ALICE), steps)
        there = "ann" in store.subjects("staff")
        assert there == (steps < 2)  # from the second step on
        assert (len(store.search("staff", ENCODER, unit(1), 9)[0].hits) == 2) == there
        if there:
            assert len(store.subject("staff", "ann").templates) == 2
            store.delete_subject("staff", "ann", ALICE)
        assert sweeper.expire(0) == 0
        assert backdoor.left() == {"journals": 0, "commits": 1, "subjects": 1, "templates": 1}
        if not died:
            break
    assert 4 <= steps < 9


def test_an_enrolment_under_way_is_not_swept(milvus_opened: Open, connect: Connect, backdoor: Backdoor) -> None:
    connection = connect()
    first, second = milvus_opened(connection=connection), milvus_opened()
    first.create("staff", OLD, None, ALICE)
    enrolled(first.enrol("staff", [one("ann", unit(1)[0])], ALICE))
    # Another one's journal, dead before its first step.
    cipher, created = backdoor.gallery().cipher, int((time.time() - 2 * SWEEP_SECONDS) * 1e6)
    dead = cipher.record(JOURNAL, "~journal/0/0", [[backdoor.pseudonym("ann")], []], created=created)
    backdoor.connection.insert(backdoor.gallery().records, [dead])
    swept: list[int] = []

    def sweep(operation: str, name: str, rows: Sequence[Any]) -> None:
        if operation == "insert" and rows[0].get("kind") == COMMIT:
            assert backdoor.left()["journals"] == 2
            second.expire(0)  # only the dead one's journal is old enough
            swept.append(backdoor.left()["journals"])

    connection.before = sweep
    enrolled(first.enrol("staff", [one("ann", unit(2)[0])], ALICE))
    assert swept == [1]
    assert len(second.subject("staff", "ann").templates) == 2
    assert backdoor.left()["journals"] == 0


def test_two_create_one_gallery_at_once(milvus_opened: Open, backdoor: Backdoor) -> None:
    stores, made = [milvus_opened(), milvus_opened()], []
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
    assert len(backdoor.connection.names()) == 3  # and nothing is left of the other one
    assert gallery == made[0]


def test_a_name_that_two_create_is_read_when_one_of_them_has_withdrawn(milvus_opened: Open, backdoor: Backdoor) -> None:
    milvus_opened().create("staff", OLD, None, ALICE)
    stays = backdoor.row()
    other = replace(stays, id="0" * len(stays.id), created=stays.created + 1)
    backdoor.connection.insert(backdoor.catalogue.table, [other.row()])
    withdrawal = threading.Timer(0.3, backdoor.catalogue.remove, (other,))
    withdrawal.start()
    assert backdoor.catalogue.find("staff", "strong") == stays
    withdrawal.join()


def test_one_idempotency_key_in_two_processes_enrols_at_most_once(milvus_opened: Open, backdoor: Backdoor) -> None:
    stores = [milvus_opened(), milvus_opened()]
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
    assert backdoor.templates() == len({answer.templates for answer in done}) <= 1
    (again,) = enrolled(stores[1].enrol("staff", [asked], ALICE))
    assert again.replayed == bool(done)
    assert backdoor.templates() == 1


def test_an_enrolment_in_a_space_that_is_being_left_is_not_lost_in_silence(
    milvus_opened: Open, connect: Connect, backdoor: Backdoor
) -> None:
    connection = connect()
    first, second = milvus_opened(MilvusOptions(row_seconds=60)), milvus_opened(connection=connection)
    first.create("staff", OLD, None, ALICE)
    enrolled(first.enrol("staff", [one("ann", unit(1)[0])], ALICE))
    first.begin_migration("staff", NEW, ALICE)
    enrolled(first.enrol("staff", [one("ann", unit(2)[0], encoder=NEXT, space=NEW)], ALICE))
    late: list[object] = []

    def enrol(operation: str, name: str, rows: Sequence[Any]) -> None:
        if name == backdoor.catalogue.table and not backdoor.row().moving_to:  # the old space is left, not yet dropped
            (answer,) = first.enrol("staff", [one("bo", unit(3)[0])], ALICE)
            late.append(answer)

    connection.after = enrol
    first.search("staff", ENCODER, unit(1), 1)  # it knows of the migration, and will not look again at once
    second.end_migration("staff", ALICE)
    assert late and all(isinstance(answer, (GalleryConflict, SpaceMismatch)) for answer in late)
    assert list(milvus_opened().subjects("staff")) == ["ann"]


def test_milvus_learns_no_name_no_attribute_and_no_vector(
    milvus_opened: Open, backdoor: Backdoor, thief: MilvusClient
) -> None:
    store, vectors = milvus_opened(), unit(1, 2)
    store.create("staff", OLD, None, ALICE)
    consent = Consent("contract", "drawer 3")
    asked = one(
        "ann@example", vectors[0], attributes={"site": "north wing"}, consent=consent, key="order 7", digest="d"
    )
    enrolled(store.enrol("staff", [asked, one("bo", vectors[1])], BOB))
    stolen, hidden = "", []
    for name in backdoor.connection.names():
        for row in thief.query(name, filter='id > ""', output_fields=["*"], limit=100, consistency_level="Strong"):
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


def test_what_was_deleted_leaves_the_files_and_the_log_says_so(
    milvus_opened: Open, backdoor: Backdoor, thief: MilvusClient, log: AuditFile
) -> None:
    """By another process than the one that deleted: only one of a server's looks after this."""
    deleting, sweeping = milvus_opened(), milvus_opened(MilvusOptions(first_purge_seconds=0, purge_seconds=0))
    for name in ("staff", "guests"):
        deleting.create(name, OLD, None, ALICE)
        enrolled(deleting.enrol(name, [one(f"s{i}", unit(i)[0]) for i in range(3)], ALICE))
    row = backdoor.row()
    tables, client = [records_of(backdoor.connection, row.id), *row.tables.values()], thief
    deleting.delete_subject("staff", "s1", ALICE)
    deleting.delete("guests", ALICE)
    for table in tables:
        client.flush(table)
    assert client.get_collection_stats(tables[1])["row_count"] == 3  # marked as deleted, and still there
    assert set(log.unpurged()) == {"staff", "guests"}
    deadline = time.monotonic() + 240
    while waiting := log.unpurged():
        assert time.monotonic() < deadline, waiting
        sweeping.expire(0)  # Milvus may take a request for done, and do nothing: it is asked until it has
        time.sleep(1)
    for table in tables:
        given = client.query(table, filter="", output_fields=["count(*)"], consistency_level="Strong")[0]["count(*)"]
        assert client.get_collection_stats(table)["row_count"] == given
    assert len(sweeping.subject("staff", "s2", vectors=True).templates) == 1
    deleting.delete_subject("staff", "s2", ALICE)
    assert set(log.unpurged()) == {"staff"}


def test_another_master_key_opens_nothing(milvus_server: MilvusServer, milvus_opened: Open, tmp_path: Path) -> None:
    milvus_opened().create("staff", OLD, None, ALICE)
    other = MilvusStore(MilvusConnection(milvus_server.uri), AuditFile(tmp_path / "other.db"), MasterKey(bytes(32)))
    for call in (lambda: other.search("staff", ENCODER, unit(1), 1), other.list, lambda: list(other.export("staff"))):
        with refused(StoreUnavailable) as caught:
            call()
        assert "key" in str(caught.value)
    other.close()


def test_templates_without_a_commit_do_not_crowd_out_others(milvus_opened: Open, backdoor: Backdoor) -> None:
    store, vectors = milvus_opened(), unit(1, 60)
    store.create("staff", OLD, None, ALICE)
    enrolled(store.enrol("staff", [one(f"s{i}", vectors[i]) for i in range(3)], ALICE))
    cipher, (table,) = backdoor.gallery().cipher, backdoor.row().tables.values()
    query = unit(5)
    near = cipher.rotation(OLD.id, OLD.dim).hide(query)[0]
    encoder = cipher.hashed("encoder", ENCODER)
    stray = [
        {"id": f"{i:032x}.0", "subject": "f" * 64, "encoder": encoder, "tags": {}, "vector": near} for i in range(50)
    ]
    backdoor.connection.insert(table, stray)
    time.sleep(STALE_SECONDS + 0.1)
    (found,) = store.search("staff", ENCODER, query, 3)
    assert {hit.subject for hit in found.hits} == {"s0", "s1", "s2"}


def test_a_deletion_beside_an_enrolment_leaves_the_subject_counted(
    milvus_opened: Open, connect: Connect, backdoor: Backdoor
) -> None:
    connection = connect()
    first, second = milvus_opened(), milvus_opened(connection=connection)
    first.create("staff", OLD, None, ALICE)
    enrolled(first.enrol("staff", [one("ann", unit(1)[0])], ALICE))

    def enrol(operation: str, name: str, keys: Sequence[Any]) -> None:
        if operation == "delete" and any(key.startswith("~subject/") for key in keys):
            connection.before = None  # it has looked, and will say that ann is not there
            enrolled(first.enrol("staff", [one("ann", unit(2)[0])], ALICE))

    connection.before = enrol
    assert second.delete_subject("staff", "ann", BOB).templates == 1
    assert connection.before is None
    assert backdoor.left() == {"journals": 0, "commits": 1, "subjects": 1, "templates": 1}


class PagingConnection(MilvusConnection):
    """Calls ``paged`` once, after a page of subjects was read."""

    paged: Callable[[], object] | None = None

    def query(self, name: str, where: str, *args: Any) -> list[Row]:
        found = super().query(name, where, *args)
        if self.paged and where.startswith(f'kind == {COMMIT} and id > ""'):
            paged, self.paged = self.paged, None
            paged()
        return found


def test_a_page_is_full_though_subjects_are_deleted_meanwhile(milvus_opened: Open, milvus_server: MilvusServer) -> None:
    connection = PagingConnection(milvus_server.uri, stale_seconds=STALE_SECONDS)
    store = milvus_opened(connection=connection)
    store.create("staff", OLD, None, ALICE)
    enrolled(store.enrol("staff", [one(f"s{i}", unit(i)[0]) for i in range(6)], ALICE))
    names = list(store.subjects("staff"))
    connection.paged = lambda: store.delete_subject("staff", names[1], ALICE)
    assert list(store.subjects("staff", limit=3)) == [names[0], *names[2:4]]
    assert connection.paged is None


def test_a_subject_may_have_hundreds_of_templates_in_one_enrolment(milvus_opened: Open, backdoor: Backdoor) -> None:
    store = milvus_opened()
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
    assert backdoor.templates() == 0
