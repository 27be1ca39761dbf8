"""SqliteStore when something breaks: plain reasons, nothing half-written, and answers as long as there is memory."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pkd.serving.core.errors import InvalidRequest, StoreUnavailable
from pkd.serving.galleries import audit
from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.failures import explained
from pkd.serving.galleries.index.exact_index import Ints
from pkd.serving.galleries.index.memory_index import MemoryIndex, Rows
from pkd.serving.galleries.sqlite.database import NAME
from pkd.serving.galleries.sqlite.store import SqliteOptions, SqliteStore
from pkd.toolkit.core.errors import BadVector, InputError, PkdError
from tests.support.disks import damage, empty_log, fragile_disk, mounted, small_disk
from tests.support.gallery_examples import ALICE, ENCODER, OLD, enrolled, one, refused, soon, unit

__all__ = ["fragile_disk", "small_disk"]
MASTER = MasterKey(bytes(range(32)))
NAMED = "an-unmistakable-name"
OPEN_FILES = Path("/proc/self/fd")


ALONE = SqliteOptions(follow_seconds=3600.0)
"""Nobody catches up regularly."""
FORGETFUL = replace(ALONE, changes_kept_seconds=-10)
"""Forgets changes at the first sweep, however new they are."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    """Make a store with a gallery of twenty subjects."""
    store = filled(tmp_path / "store")
    yield store
    store.close()


def filled(folder: Path, options: SqliteOptions = ALONE) -> SqliteStore:
    store = SqliteStore(folder, MASTER, options)
    store.create("staff", OLD, None, ALICE)
    enrolled(store.enrol("staff", [one(f"s{i:02d}", unit(i)[0]) for i in range(20)], ALICE))
    return store


def wrong(folder: Path) -> list[str]:
    with closing(SqliteStore(folder, MASTER, ALONE, create=False, load=False)) as store:
        return store.verify().wrong


def test_a_full_disk_refuses_writes_until_there_is_space(small_disk: Path) -> None:
    store = filled(small_disk / "store")
    with closing(store):
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 150_000))
        acknowledged = []
        with refused(StoreUnavailable) as caught:
            for i in range(10_000):
                enrolled(store.enrol("staff", [one(f"more{i:04d}", unit(i)[0])] * 3, ALICE))
                acknowledged.append(f"more{i:04d}")
        assert "disk is full" in str(caught.value)
        assert acknowledged
        there = list(store.subjects("staff", after="more", limit=10_000))
        assert [name for name in there if name.startswith("more")] == acknowledged
        assert store.search("staff", ENCODER, unit(7), 1)[0].hits[0].subject in ("s07", "more0007")
        assert store.search("staff", ENCODER, unit(7), 1)[0].searched == 20 + 3 * len(acknowledged)
        ballast.unlink()
        store.check()
        enrolled(store.enrol("staff", [one("late", unit(99)[0])], ALICE))
        assert "wal" in store.delete_subject("staff", "s00", ALICE).covers
    assert wrong(small_disk / "store") == []


def test_a_check_notices_a_full_disk(small_disk: Path) -> None:
    with closing(filled(small_disk / "store")) as store:
        empty_log(small_disk / "store")  # needs new space for its first page
        store.check()
        empty_log(small_disk / "store")
        (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
        with refused(StoreUnavailable):
            store.check()
        (small_disk / "ballast").unlink()
        store.check()


def test_a_file_system_that_became_read_only_refuses_writes_and_answers_searches(fragile_disk: Path) -> None:
    with closing(filled(fragile_disk / "store")) as store:
        aborted = subprocess.run(["mount", "-o", "remount,abort", str(fragile_disk)], capture_output=True)
        if aborted.returncode:
            pytest.skip("this file system cannot be made to fail")
        for attempt in (store.check, lambda: store.enrol("staff", [one("late", unit(50)[0])], ALICE)):
            with refused(StoreUnavailable):
                attempt()
        assert store.search("staff", ENCODER, unit(7), 1)[0].hits[0].subject == "s07"
        assert store.get("staff").subjects == 20


def test_a_file_system_mounted_read_only_is_refused_at_the_start(tmp_path: Path) -> None:
    filled(tmp_path / "store").close()
    for folder in mounted(tmp_path / "view", "--bind", str(tmp_path / "store")):
        done = subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting read-only is refused here")
        with refused(StoreUnavailable) as caught:
            SqliteStore(folder, MASTER)
        assert "read-only" in str(caught.value) or "cannot be opened" in str(caught.value)


def test_a_damaged_page_is_reported_and_searches_go_on(store: SqliteStore, tmp_path: Path) -> None:
    vectors = unit(500, 200)
    enrolled(store.enrol("staff", [one(f"t{i:03d}", vectors[i]) for i in range(200)], ALICE))
    damage(tmp_path / "store", "templates")
    with refused(StoreUnavailable) as caught:
        store.subject("staff", "t000", vectors=True)
    assert "damaged" in str(caught.value)
    (found,) = store.search("staff", ENCODER, vectors[7:8], 1)
    assert (found.hits[0].subject, found.searched) == ("t007", 220)
    with refused(StoreUnavailable) as caught:
        SqliteStore(tmp_path / "store", MASTER, ALONE)
    assert "damaged" in str(caught.value)


def test_templates_that_were_swapped_take_no_part(store: SqliteStore, tmp_path: Path) -> None:
    store.close()
    with closing(sqlite3.connect(tmp_path / "store" / NAME)) as db:
        (first, second) = db.execute("SELECT id, sealed FROM templates ORDER BY id LIMIT 2").fetchall()
        db.execute("UPDATE templates SET sealed = ? WHERE id = ?", (first[1], second[0]))
        db.execute("UPDATE templates SET sealed = ? WHERE id = ?", (second[1], first[0]))
        db.commit()
    with closing(SqliteStore(tmp_path / "store", MASTER, ALONE)) as again:
        assert len(again.unreadable) == 2
        assert again.search("staff", ENCODER, unit(0), 20)[0].searched == 18
        with refused(StoreUnavailable):
            again.subject("staff", "s00", vectors=True)
        found = wrong(tmp_path / "store")
        assert sum("does not decrypt" in line for line in found) == 2
        again.delete_subject("staff", "s00", ALICE)
        again.delete_subject("staff", "s01", ALICE)
        assert again.unreadable == []
    assert wrong(tmp_path / "store") == []


def test_a_lock_that_is_held_too_long_is_named(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", replace(ALONE, busy_seconds=0.05))
    with closing(store), closing(sqlite3.connect(tmp_path / "store" / NAME, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with refused(StoreUnavailable) as caught:
            store.enrol("staff", [one("late", unit(50)[0])], ALICE)
        assert "another process" in str(caught.value)
        assert store.search("staff", ENCODER, unit(7), 1)[0].hits[0].subject == "s07"
        other.execute("ROLLBACK")
        enrolled(store.enrol("staff", [one("late", unit(50)[0])], ALICE))


def test_nothing_of_a_deleted_subject_is_left_in_the_files(store: SqliteStore, tmp_path: Path) -> None:
    asked = one(NAMED, unit(50)[0], attributes={"badge": f"badge of {NAMED}"}, key=f"key of {NAMED}", digest="d")
    enrolled(store.enrol("staff", [asked], ALICE))
    with closing(sqlite3.connect(tmp_path / "store" / NAME)) as db:
        (key,) = db.execute("SELECT key FROM subjects WHERE name = ?", (NAMED,)).fetchone()
        (sealed,) = db.execute("SELECT sealed FROM templates ORDER BY id DESC LIMIT 1").fetchone()
    secrets = (NAMED.encode(), key[:40], sealed[:40])

    def bytes_of_files() -> bytes:
        return b"".join(path.read_bytes() for path in sorted((tmp_path / "store").iterdir()))

    before = bytes_of_files()
    assert all(secret in before for secret in secrets)
    receipt = store.delete_subject("staff", NAMED, ALICE)
    assert receipt.covers == ("rows", "key", "index", "wal")
    assert receipt.rows == 3  # key, template, idempotency key
    after = bytes_of_files()
    assert not any(secret in after for secret in secrets)


def test_a_receipt_does_not_claim_the_log_while_another_reads(store: SqliteStore, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "store" / NAME, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM subjects").fetchone()
        assert store.delete_subject("staff", "s03", ALICE).covers == ("rows", "key", "index")
        start = time.monotonic()
        for number in range(4, 9):  # who reads for long is waited for once, not by everyone who deletes
            assert "wal" not in store.delete_subject("staff", f"s{number:02}", ALICE).covers
        assert time.monotonic() - start < 0.9
    assert (tmp_path / "store" / f"{NAME}-wal").stat().st_size
    assert store.expire(0) == 0  # makes up for it
    assert not (tmp_path / "store" / f"{NAME}-wal").stat().st_size


def test_an_export_that_nobody_reads_does_not_hold_the_log(store: SqliteStore, tmp_path: Path) -> None:
    export = store.export("staff")
    assert "wal" not in store.delete_subject("staff", "s03", ALICE).covers
    del export
    half = store.export("staff")
    next(half)
    half.close()  # type: ignore[attr-defined]
    assert "wal" in store.delete_subject("staff", "s04", ALICE).covers
    assert sum(path.is_symlink() and NAME in str(path.readlink()) for path in OPEN_FILES.iterdir()) <= 3 * 4


def test_several_can_open_a_new_folder_at_once(tmp_path: Path) -> None:
    opened: list[SqliteStore] = []
    threads = [threading.Thread(target=lambda: opened.append(SqliteStore(tmp_path / "new", MASTER))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(opened) == 6
    opened[0].create("staff", OLD, None, ALICE)
    assert [len(store.list()) for store in opened] == [1] * 6
    for store in opened:
        store.close()


def test_a_query_that_cannot_be_one_is_refused_alone(store: SqliteStore) -> None:
    for query in (unit(1, dim=8), unit(1) * 2, unit(1) * float("nan")):
        with refused(BadVector):
            store.search("staff", ENCODER, query, 1)
    with refused(InvalidRequest):
        store.search("staff", ENCODER, unit(1), 0)


def test_a_deletion_that_memory_could_not_follow_does_not_claim_the_index(tmp_path: Path) -> None:
    broken = threading.Event()

    class Index(MemoryIndex):
        def remove(self, templates: Ints) -> None:
            if broken.is_set():
                raise sqlite3.OperationalError("disk I/O error")
            super().remove(templates)

    with closing(filled(tmp_path / "store", replace(ALONE, index=Index))) as store:
        broken.set()
        assert "index" not in store.delete_subject("staff", "s03", ALICE).covers
        assert store.search("staff", ENCODER, unit(3), 1)[0].searched == 20  # answered by what was known
        broken.clear()
        assert store.search("staff", ENCODER, unit(3), 1)[0].searched == 19


def test_reading_everything_anew_is_not_seen_half_done(tmp_path: Path) -> None:
    sleepers: list[SqliteStore] = []
    seen: list[int] = []

    class Index(MemoryIndex):
        def add(self, rows: Rows) -> None:
            seen.extend(sleeper.loaded["staff"] for sleeper in sleepers)
            super().add(rows)
            seen.extend(sleeper.loaded["staff"] for sleeper in sleepers)

    store = filled(tmp_path / "store", FORGETFUL)
    with closing(store), closing(SqliteStore(tmp_path / "store", MASTER, replace(ALONE, index=Index))) as sleeper:
        store.delete_subject("staff", "s03", ALICE)
        store.expire(0)
        sleepers.append(sleeper)
        assert sleeper.search("staff", ENCODER, unit(3), 1)[0].searched == 19
        assert seen == [20, 20]


def test_a_process_without_searches_forgets_what_was_deleted(store: SqliteStore, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with closing(SqliteStore(tmp_path / "store", MASTER, SqliteOptions(follow_seconds=0.05))) as idle:
        assert idle.loaded == {"staff": 20}
        store.delete_subject("staff", "s03", ALICE)
        assert soon(lambda: idle.loaded == {"staff": 19})
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) <= before


def test_a_process_that_was_silent_too_long_reads_everything_anew(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", FORGETFUL)
    with closing(store), closing(SqliteStore(tmp_path / "store", MASTER, ALONE)) as sleeper:
        store.delete_subject("staff", "s03", ALICE)
        enrolled(store.enrol("staff", [one("late", unit(50)[0])], ALICE))
        store.expire(0)
        store.delete_subject("staff", "s04", ALICE)
        (found,) = sleeper.search("staff", ENCODER, unit(3), 50)
        assert [hit.subject for hit in found.hits if hit.subject in ("s03", "s04", "late")] == ["late"]
        assert found.searched == 19


def test_a_clock_that_jumps_changes_neither_order_nor_what_is_kept(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    store.create("guests", OLD, 3600.0, ALICE)
    sequences = []
    for i, clock in enumerate((now, now - 1e8, now + 1e8, now)):
        monkeypatch.setattr("time.time", lambda clock=clock: clock)
        (answer,) = enrolled(store.enrol("guests", [one(f"g{i}", unit(i)[0])], ALICE))
        sequences.append(answer.sequence)
        assert store.search("guests", ENCODER, unit(i), 1)[0].hits[0].subject == f"g{i}"
    assert sequences == sorted(set(sequences))
    assert store.expire(now - 1e9) == 0
    assert store.expire(now + 60) == 1  # the one enrolled when the clock was three years behind
    assert list(store.subjects("guests")) == ["g0", "g2", "g3"]
    assert store.get("staff").subjects == 20


def test_another_master_key_is_refused_at_the_start(store: SqliteStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"master key {MASTER.id}, given is"):
        SqliteStore(tmp_path / "store", MasterKey(bytes(32)))


def test_an_unknown_schema_is_refused_by_name(store: SqliteStore, tmp_path: Path) -> None:
    store.close()
    with closing(sqlite3.connect(tmp_path / "store" / NAME)) as db:
        db.execute("UPDATE about SET value = '7' WHERE name = 'schema'")
        db.commit()
    with pytest.raises(InputError, match="has schema 7, this pkd knows 1"):
        SqliteStore(tmp_path / "store", MASTER)


def test_what_is_no_database_of_pkd_is_left_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / NAME)) as db:
        db.execute("CREATE TABLE theirs (x)")
    with pytest.raises(InputError, match="not a database of pkd"):
        SqliteStore(tmp_path, MASTER)
    (tmp_path / NAME).write_bytes(b"something else entirely" * 100)
    with refused(StoreUnavailable):
        SqliteStore(tmp_path, MASTER)
    with pytest.raises(InputError, match="no such database"):
        SqliteStore(tmp_path / "none", MASTER, create=False)


def test_a_changed_master_key_stops_those_who_have_the_old_one(store: SqliteStore, tmp_path: Path) -> None:
    after = MasterKey(bytes(32))
    with closing(SqliteStore(tmp_path / "store", MASTER, ALONE, load=False)) as operator:
        assert operator.rekey(after) == 1
    with refused(StoreUnavailable) as caught:
        store.create("guests", OLD, None, ALICE)
    assert "Restart" in str(caught.value)
    with closing(SqliteStore(tmp_path / "store", after)) as again:
        assert again.search("staff", ENCODER, unit(7), 1)[0].hits[0].subject == "s07"
        again.create("guests", OLD, None, ALICE)


def test_an_error_in_the_middle_leaves_nothing(store: SqliteStore, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "store" / NAME)) as db:
        db.execute(
            "CREATE TRIGGER full AFTER INSERT ON templates WHEN (SELECT count(*) FROM templates) > 21 "
            "BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
        )
        db.commit()
    with refused(StoreUnavailable):
        store.enrol("staff", [one("late", unit(1)[0]), one("later", unit(2)[0])], ALICE)
    assert store.get("staff").subjects == 20
    assert store.search("staff", ENCODER, unit(1), 50)[0].searched == 20


def test_what_sqlite_says_beyond_the_list_is_passed_on() -> None:
    with pytest.raises(PkdError, match="SQLite says: something new"), explained():
        raise sqlite3.OperationalError("something new")


def test_retention_goes_on_past_a_gallery_whose_key_does_not_open(store: SqliteStore, tmp_path: Path) -> None:
    store.create("bad", OLD, None, ALICE)
    for name in ("bad", "staff"):
        enrolled(store.enrol(name, [one("gone", unit(60)[0], expires=5.0)], ALICE))
    with closing(sqlite3.connect(tmp_path / "store" / NAME)) as db:
        db.execute("UPDATE galleries SET key = zeroblob(60) WHERE name = 'bad'")
        db.commit()
    with closing(SqliteStore(tmp_path / "store", MASTER, ALONE)) as again:
        assert again.expire(6.0) == 2
        assert "gone" not in again.subjects("staff")
        with closing(sqlite3.connect(tmp_path / "store" / NAME)) as db:
            audit.verify(db)
            assert db.execute("SELECT count(*) FROM templates WHERE expires < 6").fetchone() == (0,)


def test_a_mass_of_expired_templates_does_not_keep_others_from_writing(tmp_path: Path) -> None:
    """A transaction is as long as its subjects are many; between two there is a pause for other processes."""
    options = replace(ALONE, expired_at_once=10, pause_seconds=0.3)
    with closing(filled(tmp_path / "store", options)) as store:
        enrolled(store.enrol("staff", [one(f"e{i}", unit(i)[0], expires=5.0) for i in range(35)], ALICE))
        assert store.expire(6.0) == 35
    with closing(sqlite3.connect(tmp_path / "store" / NAME)) as db:
        times = [time for (time,) in db.execute("SELECT time FROM audit WHERE action = 'expire' ORDER BY sequence")]
    pauses = [number for number, gap in enumerate(np.diff(times), 1) if gap >= 300_000]
    assert (len(times), pauses) == (35, [10, 20, 30])


def test_memory_that_runs_out_half_way_leaves_nothing_twice(tmp_path: Path) -> None:
    failing = threading.Event()

    class Index(MemoryIndex):
        def add(self, rows: Rows) -> None:
            super().add(rows)
            if failing.is_set():
                failing.clear()
                raise MemoryError

    with closing(filled(tmp_path / "store", replace(ALONE, index=Index))) as store:
        failing.set()
        enrolled(store.enrol("staff", [one("late", unit(70)[0])], ALICE))  # durable, so it is acknowledged
        assert not failing.is_set()
        (found,) = store.search("staff", ENCODER, unit(70), 30)
        assert found.searched == len(store.subjects("staff")) == 21
        assert found.hits[0].subject == "late"
        assert store.verify().wrong == []
    assert wrong(tmp_path / "store") == []


def test_a_damaged_list_of_galleries_stops_no_search(store: SqliteStore, tmp_path: Path) -> None:
    """Whoever searches asks for the gallery first, as the server does."""
    damage(tmp_path / "store", "galleries")
    for _ in range(2):
        described = store.get("staff")
        assert (described.space, described.subjects, dict(described.templates)) == (OLD, 20, {ENCODER: 20})
        assert store.search("staff", ENCODER, unit(7), 1)[0].hits[0].subject == "s07"
    with refused(StoreUnavailable) as caught:
        store.enrol("staff", [one("late", unit(50)[0])], ALICE)
    assert "damaged" in str(caught.value)


@pytest.mark.parametrize("size", [0, 512, 4096, 40_960])
def test_a_truncated_file_is_not_taken_for_a_new_one(store: SqliteStore, tmp_path: Path, size: int) -> None:
    empty_log(tmp_path / "store")
    os.truncate(tmp_path / "store" / NAME, size)
    assert store.get("staff").subjects == 20
    assert store.search("staff", ENCODER, unit(7), 1)[0].hits[0].subject == "s07"
    with refused(StoreUnavailable):
        store.enrol("staff", [one("late", unit(50)[0])], ALICE)
    with pytest.raises(PkdError, match=r"is empty|damaged") as caught:
        SqliteStore(tmp_path / "store", MASTER, ALONE)
    assert "backup" in str(caught.value)


def test_a_check_notices_that_no_enrolment_finds_space(small_disk: Path) -> None:
    """The log has room for a few bytes still, as long as it was not cut."""
    with closing(filled(small_disk / "store")) as store:
        (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
        with pytest.raises(StoreUnavailable):
            for i in range(1_000):
                enrolled(store.enrol("staff", [one(f"more{i:04d}", unit(i)[0])], ALICE))
        for _ in range(3):
            with refused(StoreUnavailable):
                store.check()
