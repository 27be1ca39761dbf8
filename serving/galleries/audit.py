r"""The audit log: what was done to galleries, as a chain of hashes. SQLite keeps it among its tables, AuditFile apart.

Each record holds the hash of the one before it, so that changing, removing or inserting one breaks the chain there.
What a chain cannot show is that its *end* was cut off, or that all of it was made anew: note the head (sequence and
hash) outside from time to time, and give it to ``verify``. Who holds the database and no noted head can rewrite it all.

The hash is SHA-256 over these bytes, integers big-endian and unsigned::

    "pkd-audit-1\n" · previous hash (32) · sequence (8) · time in µs since 1970 (8) · templates (8) · rows (8)
    · then of actor, action, gallery, subject: length (4) and bytes (UTF-8; the subject's are its pseudonym)

A subject appears as HMAC-SHA256 under a key derived from the gallery's (crypto.py): with that key an operator can find
a subject's records; once it is destroyed, nobody can tell whose they were. Sequences count 1, 2, 3 …: order is that of
the sequence, never of the clock.
"""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pkd.serving.core.gallery_schemas import ReceiptAnswer
from pkd.serving.galleries.failures import BUSY_SECONDS, explained, transaction
from pkd.toolkit.core.errors import InputError, NotTrusted

Action = Literal[
    "create",
    "enrol",
    "enrol-doubtful",
    "refuse",
    "map",
    "move-in",
    "move-out",
    "set-mapping",
    "delete-templates",
    "delete-subject",
    "delete-gallery",
    "expire",
    "begin-migration",
    "end-migration",
    "purge",
    "rekey",
]
"""Events that are recorded. ``purge``: what was deleted of the gallery has left the files of a store that only marks it
at first. ``enrol-doubtful``: enrolled against the gallery's rules; ``refuse``: not enrolled because of them.
``rekey``: all gallery keys were wrapped by another master key."""
DELETIONS: tuple[Action, ...] = (
    "delete-templates", "move-out", "delete-subject", "delete-gallery", "expire", "end-migration", "rekey",
)  # fmt: skip
"""After these a store may still hold what it does not give any more, until ``purge`` is recorded."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS audit (
    sequence INTEGER PRIMARY KEY, time INTEGER NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
    gallery TEXT NOT NULL, subject BLOB, templates INTEGER NOT NULL, rows INTEGER NOT NULL,
    previous BLOB NOT NULL, hash BLOB NOT NULL
) STRICT
"""
FIRST = bytes(32)
"""Bytes in the place of a previous hash in the first record."""


@dataclass(frozen=True)
class Head:
    """Name the newest record: what to note outside."""

    sequence: int
    """Number of the last record; 0 if the log is empty."""
    hash: str
    """Hex."""

    def receipt(
        self, gallery: str, subject: str | None, templates: int, rows: int, covers: tuple[str, ...]
    ) -> ReceiptAnswer:
        """Make the receipt of a deletion whose record this is."""
        return ReceiptAnswer(
            gallery=gallery, subject=subject, templates=templates, rows=rows, covers=covers,
            sequence=self.sequence, hash=self.hash,
        )  # fmt: skip


@dataclass(frozen=True)
class Record:
    """Hold one change. ``time``: µs since 1970. ``subject``: a pseudonym; None where no single one is meant."""

    sequence: int
    time: int
    actor: str
    action: str
    gallery: str
    subject: bytes | None
    templates: int
    """Number of templates that were added or deleted."""
    rows: int
    """Number of rows that were deleted."""
    previous: bytes
    hash: bytes

    def computed(self) -> bytes:
        """Compute the hash that the record should have."""
        numbers = (self.sequence, self.time, self.templates, self.rows)
        texts = (self.actor.encode(), self.action.encode(), self.gallery.encode(), self.subject or b"")
        parts = [b"pkd-audit-1\n", self.previous, struct.pack(">4Q", *numbers)]
        for text in texts:
            parts += (struct.pack(">I", len(text)), text)
        return hashlib.sha256(b"".join(parts)).digest()


def append(
    db: sqlite3.Connection,
    actor: str,
    action: Action,
    gallery: str,
    *,
    subject: bytes | None = None,
    templates: int = 0,
    rows: int = 0,
) -> Head:
    """Record a change, in the transaction that makes it: ``db`` must be in one that may write."""
    last = head(db)
    now = max(0, time.time_ns() // 1000)
    blank = Record(
        last.sequence + 1, now, actor, action, gallery, subject, templates, rows, bytes.fromhex(last.hash), b""
    )
    hash = blank.computed()
    db.execute(
        "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (blank.sequence, now, actor, action, gallery, subject, templates, rows, blank.previous, hash),
    )
    return Head(blank.sequence, hash.hex())


def head(db: sqlite3.Connection) -> Head:
    """Read the newest record's sequence and hash."""
    found = db.execute("SELECT sequence, hash FROM audit ORDER BY sequence DESC LIMIT 1").fetchone()
    return Head(found[0], found[1].hex()) if found else Head(0, FIRST.hex())


def records(db: sqlite3.Connection, after: int = 0) -> Iterator[Record]:
    """Yield every record after that sequence, oldest first."""
    rows = db.execute("SELECT * FROM audit WHERE sequence > ? ORDER BY sequence", (after,))
    return (Record(*row) for row in rows)


def newest(db: sqlite3.Connection, before: int | None, limit: int) -> list[Record]:
    """List at most ``limit`` records before that sequence, newest first; the newest of all for None."""
    last = 2**63 - 1 if before is None else before
    rows = db.execute("SELECT * FROM audit WHERE sequence < ? ORDER BY sequence DESC LIMIT ?", (last, limit))
    return [Record(*row) for row in rows]


def verify(db: sqlite3.Connection, noted: Head | None = None) -> Head:
    """Walk the chain and return its head; raises NotTrusted that names the first broken record.

    ``noted``: a head from before, kept outside. Without it a log whose end was cut off looks whole.
    """
    previous, sequence = FIRST, 0
    for record in records(db):
        if record.sequence != sequence + 1:
            raise NotTrusted(f"audit record {sequence + 1}: is missing; the next is {record.sequence}.")
        if not hmac.compare_digest(record.previous, previous):
            raise NotTrusted(f"audit record {record.sequence}: does not follow the record before it.")
        if not hmac.compare_digest(record.computed(), record.hash):
            raise NotTrusted(f"audit record {record.sequence}: was changed after it was written.")
        previous, sequence = record.hash, record.sequence
        if noted and noted.sequence == sequence and noted.hash != previous.hex():
            raise NotTrusted(f"audit record {sequence}: is not the one that was noted outside; the log was rewritten.")
    if noted and noted.sequence > sequence:
        raise NotTrusted(f"audit record {sequence + 1}: is missing, and {noted.sequence} was noted outside: cut off.")
    return Head(sequence, previous.hex())


class AuditFile:
    """Keep one log, of what the processes of one machine change, in an SQLite file beside a store that cannot.

    Thread-safe; several processes may have it open.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Open the file. Raises InputError where none is there nor to be created, StoreUnavailable for another."""
        if not create and not path.is_file():
            raise InputError(f"{path}: is no audit log. Give the file that pkd-serve --audit was given.")
        self.path = path
        self._one = threading.Lock()
        with explained():
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA cache_size = -256")  # KiB
            self._db.execute(SCHEMA)

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
            return append(db, actor, action, gallery, subject=subject, templates=templates, rows=rows)

    def unpurged(self) -> Mapping[str, int]:
        """Map galleries to the sequence of their newest deletion, where no ``purge`` came after it."""
        with self._transaction("DEFERRED") as db:
            return _unpurged(db)

    def purged(self, gallery: str, sequence: int) -> bool:
        """Record that the store holds nothing of what was deleted up to ``sequence``; not if more was since."""
        with self._transaction() as db:
            latest = _unpurged(db).get(gallery) == sequence
            if latest:
                append(db, "retention", "purge", gallery)
            return latest

    def head(self) -> Head:
        """Read the newest record's sequence and hash."""
        with self._transaction("DEFERRED") as db:
            return head(db)

    def verify(self, noted: Head | None = None) -> Head:
        """Walk the chain and return its head; raises NotTrusted."""
        with self._transaction("DEFERRED") as db:  # servers go on writing meanwhile
            return verify(db, noted)

    def newest(self, before: int | None, limit: int) -> list[Record]:
        """List at most ``limit`` records before that sequence, newest first."""
        with self._transaction("DEFERRED") as db:
            return newest(db, before, limit)

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
        with self._one, transaction(self._db, kind):
            yield self._db


def _unpurged(db: sqlite3.Connection) -> dict[str, int]:
    rows = db.execute(
        "SELECT gallery, max(sequence) FILTER (WHERE action <> 'purge') AS deleted, "
        "max(sequence) FILTER (WHERE action = 'purge') AS purged "
        f"FROM audit WHERE action IN ('purge', {', '.join('?' * len(DELETIONS))}) "
        "GROUP BY gallery HAVING deleted > coalesce(purged, 0)",
        DELETIONS,
    )
    return {gallery: deleted for gallery, deleted, _ in rows}
