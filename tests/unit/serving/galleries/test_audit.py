"""The audit log: its bytes, and that no change to it goes unnoticed."""

from __future__ import annotations

import hashlib
import sqlite3
import struct
from collections.abc import Iterator

import pytest

from pkd.serving.galleries import audit
from pkd.toolkit.core.errors import NotTrusted


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    """A log of four records."""
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
