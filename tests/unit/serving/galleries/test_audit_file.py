"""AuditFile: an audit log beside a store that keeps none, and what of it is still to be purged."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from threading import Thread

import pytest

from pkd.serving.galleries import audit
from pkd.serving.galleries.audit_file import DELETIONS, AuditFile
from pkd.serving.galleries.store import Action
from pkd.toolkit.core.errors import InputError, NotTrusted, PkdError


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


def test_a_full_disk_is_called_so(tmp_path: Path) -> None:
    with closing(AuditFile(tmp_path / "audit.db")) as log:
        log.append("alice", "create", "staff")
        (pages,) = log._db.execute("PRAGMA page_count").fetchone()
        log._db.execute(f"PRAGMA max_page_count = {pages}")
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
