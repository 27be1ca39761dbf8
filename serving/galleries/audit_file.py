"""AuditFile: the audit log as an SQLite file of its own, beside a store that cannot keep one."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pkd.serving.galleries import audit
from pkd.serving.galleries.audit import Head
from pkd.serving.galleries.database import BUSY_SECONDS, explained
from pkd.serving.galleries.store import Action
from pkd.toolkit.core.errors import InputError

DELETIONS: tuple[Action, ...] = ("delete-subject", "delete-gallery", "expire", "end-migration", "rekey")
"""After these a store may still hold what it does not give any more, until ``purge`` is recorded."""


class AuditFile:
    """One log, of what the processes of one machine change. Thread-safe; several processes may have it open."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Raises InputError where it is not there and not to be created, StoreUnavailable for another."""
        if not create and not path.is_file():
            raise InputError(f"{path}: is no audit log. Give the file that pkd-serve --audit was given.")
        self.path = path
        self._one = threading.Lock()
        with explained():
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute(audit.SCHEMA)

    def append(
        self,
        actor: str,
        action: Action,
        gallery: str,
        *,
        subject: bytes | None = None,
        templates: int = 0,
        rows: int = 0,
    ) -> Head:
        """Record a change. Durable when this returns."""
        with self._transaction() as db:
            return audit.append(db, actor, action, gallery, subject=subject, templates=templates, rows=rows)

    def unpurged(self) -> Mapping[str, int]:
        """Gallery → sequence of its newest deletion, of those without a ``purge`` after it."""
        with self._transaction("DEFERRED") as db:
            return _unpurged(db)

    def purged(self, gallery: str, sequence: int) -> bool:
        """Record that the store holds nothing of what was deleted up to ``sequence``; not if more was since."""
        with self._transaction() as db:
            latest = _unpurged(db).get(gallery) == sequence
            if latest:
                audit.append(db, "retention", "purge", gallery)
            return latest

    def head(self) -> Head:
        """The newest record."""
        with self._transaction("DEFERRED") as db:
            return audit.head(db)

    def verify(self, noted: Head | None = None) -> Head:
        """Walk the chain, as ``audit.verify``; raises NotTrusted."""
        with self._transaction("DEFERRED") as db:  # servers go on writing meanwhile
            return audit.verify(db, noted)

    def check(self) -> None:
        """Raise StoreUnavailable unless it can be written to right now."""
        with self._transaction():
            pass

    def close(self) -> None:
        """Let go of the file."""
        with self._one:
            self._db.close()

    @contextmanager
    def _transaction(self, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        with self._one, explained():
            self._db.execute(f"BEGIN {kind}")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite has undone it by itself where the disk was full
                    self._db.execute("ROLLBACK")
                raise


def _unpurged(db: sqlite3.Connection) -> dict[str, int]:
    rows = db.execute(
        "SELECT gallery, max(sequence) FILTER (WHERE action <> 'purge') AS deleted, "
        "max(sequence) FILTER (WHERE action = 'purge') AS purged "
        f"FROM audit WHERE action IN ('purge', {', '.join('?' * len(DELETIONS))}) "
        "GROUP BY gallery HAVING deleted > coalesce(purged, 0)",
        DELETIONS,
    )
    return {gallery: deleted for gallery, deleted, _ in rows}
