"""The audit log: its bytes, that no change to it goes unnoticed, and the file beside a store that keeps none."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread

import pytest

from pkd.serving.galleries import audit
from pkd.serving.galleries.audit import DELETIONS, Action, AuditFile
from pkd.toolkit.core.errors import InputError, NotTrusted, PkdError
from tests.support.disks import small_disk

__all__ = ["small_disk"]


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    """Make a log of four records."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.execute(audit.SCHEMA)
    audit.append(db, "alice", "create", "staff")
    audit.append(db, "alice", "enrol", "staff", subject=b"p" * 32, templates=2)
    audit.append(db, "bob", "delete-subject", "staff", subject=b"p" * 32, templates=2, rows=3)
    audit.append(db, "bob", "delete-gallery", "staff", rows=1)
    yield db
    db.close()


def test_the_hash_is_over_the_bytes_that_are_written_down(db: sqlite3.Connection) -> None:
    (row,) = db.execute("SELECT time, previous, hash FROM audit WHERE sequence = 3").fetchall()
    time, previous, hash = row
    plain = b"pkd-audit-1\n" + previous + struct.pack(">QQQQ", 3, time, 2, 3)
    for text in (b"bob", b"delete-subject", b"staff", b"p" * 32):
        plain += struct.pack(">I", len(text)) + text
    assert hashlib.sha256(plain).digest() == hash
    assert audit.verify(db) == audit.head(db)


@pytest.mark.parametrize("sequence", [1, 2, 4])
@pytest.mark.parametrize(
    "change",
    [
        *("time = time + 1", "actor = 'eve'", "action = 'expire'", "gallery = 'x'", "subject = x'00'"),
        *("templates = 9", "rows = 9", "previous = hash", "hash = zeroblob(32)"),
    ],
)
def test_a_changed_record_is_named(db: sqlite3.Connection, sequence: int, change: str) -> None:
    db.execute(f"UPDATE audit SET {change} WHERE sequence = ?", (sequence,))
    with pytest.raises(NotTrusted, match=f"audit record {sequence}:"):
        audit.verify(db)


def test_a_removed_record_is_named(db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM audit WHERE sequence = 2")
    with pytest.raises(NotTrusted, match="audit record 2: is missing"):
        audit.verify(db)


def test_texts_do_not_run_into_each_other(db: sqlite3.Connection) -> None:
    db.execute("UPDATE audit SET actor = 'alicec', action = 'reate' WHERE sequence = 1")
    with pytest.raises(NotTrusted, match="audit record 1: was changed"):
        audit.verify(db)


def test_an_end_that_was_cut_off_is_seen_only_with_a_noted_head(db: sqlite3.Connection) -> None:
    noted = audit.head(db)
    db.execute("DELETE FROM audit WHERE sequence > 2")
    assert audit.verify(db).sequence == 2
    with pytest.raises(NotTrusted, match="audit record 3: is missing, and 4 was noted"):
        audit.verify(db, noted)


def test_a_log_made_anew_is_seen_only_with_a_noted_head(db: sqlite3.Connection) -> None:
    noted = audit.head(db)
    db.execute("DELETE FROM audit")
    for _ in range(5):
        audit.append(db, "eve", "create", "other")
    audit.verify(db)
    with pytest.raises(NotTrusted, match="audit record 4: is not the one that was noted"):
        audit.verify(db, noted)


def test_a_clock_set_back_does_not_change_the_order(db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 1_000_000)
    head = audit.append(db, "alice", "create", "guests")
    assert head.sequence == 5
    assert audit.verify(db) == head
    assert [record.sequence for record in audit.records(db, after=3)] == [4, 5]


def test_several_processes_write_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.db"
    with closing(AuditFile(path)) as first, closing(AuditFile(path, create=False)) as second:
        logs = [first, second] * 2
        writers = [
            Thread(target=lambda log=log: [log.append("alice", "enrol", "staff") for _ in range(10)]) for log in logs
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        head = first.append("bob", "delete-subject", "staff", subject=b"p" * 32, templates=1, rows=2)
        assert head.sequence == 41
        assert second.verify(head) == head
        with closing(sqlite3.connect(path)) as db:
            db.execute("UPDATE audit SET actor = 'eve' WHERE sequence = 7")
            db.commit()
        with pytest.raises(NotTrusted, match="audit record 7:"):
            second.verify()


@pytest.mark.parametrize("action", DELETIONS)
def test_a_deletion_is_unpurged_until_a_purge_is_recorded_after_it(tmp_path: Path, action: Action) -> None:
    with closing(AuditFile(tmp_path / "audit.db")) as log:
        log.append("alice", "create", "staff")
        log.append("alice", "enrol", "staff")
        assert log.unpurged() == {}
        first = log.append("alice", action, "staff").sequence
        log.append("alice", "enrol", "staff")
        assert log.unpurged() == {"staff": first}
        second = log.append("bob", action, "staff").sequence
        other = log.append("bob", action, "guests").sequence
        assert not log.purged("staff", first)  # what came after it was not looked at
        assert log.unpurged() == {"staff": second, "guests": other}
        assert log.purged("staff", second)
        assert not log.purged("staff", second)
        assert log.unpurged() == {"guests": other}
        third = log.append("bob", action, "staff").sequence
        assert log.unpurged() == {"staff": third, "guests": other}
        log.verify()


def test_a_walk_along_the_chain_keeps_nobody_from_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.db"
    with closing(AuditFile(path)) as server, closing(AuditFile(path)) as operator:
        server.append("alice", "create", "staff")
        walk = audit.verify

        def slow(db: sqlite3.Connection, noted: audit.Head | None = None) -> audit.Head:
            found = walk(db, noted)
            server.append("alice", "enrol", "staff")  # would wait for its end, and give up
            return found

        monkeypatch.setattr(audit, "verify", slow)
        assert operator.verify().sequence == 1
        assert server.head().sequence == 2


def test_a_full_disk_is_called_so(small_disk: Path) -> None:
    with closing(AuditFile(small_disk / "audit.db")) as log:
        log.append("alice", "create", "staff")
        (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 50_000))
        with pytest.raises(PkdError, match="disk is full"):
            for _ in range(200):
                log.append("alice", "enrol", "staff" * 100)
        assert log.verify() == log.head()


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.db: is no audit log"):
        AuditFile(tmp_path / "missing.db", create=False)
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"not a database at all, " * 100)
    with pytest.raises(PkdError, match="damaged or not pkd's"):
        AuditFile(broken)
    with pytest.raises(PkdError, match="cannot be opened"):
        AuditFile(tmp_path / "no" / "audit.db")
