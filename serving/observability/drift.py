"""Keep what was observed of each certificate: sums, for every worker process, over restarts, without a score.

A row per certificate, kind and operating point holds how often it was reached, how often at most it should have been,
and the logarithms of what was bet on it (toolkit/certificates/drift.py). No score is kept, and nobody's name.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pkd.toolkit.certificates.drift import RATIOS, Observation
from pkd.toolkit.core.errors import InputError

Kind = Literal["identify", "verify"]
"""Kind of request that an observation was made in."""
AT_ONCE = 50
"""Observations after which a process adds what it has seen to the file."""
_COLUMNS = ("observed", "exceeded", "expected", "promised", *(f"log{i}" for i in range(len(RATIOS))))
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS drift (
    certificate TEXT NOT NULL, kind TEXT NOT NULL, fmr REAL NOT NULL,
    {", ".join(f"{one} REAL NOT NULL" for one in _COLUMNS)},
    PRIMARY KEY (certificate, kind, fmr)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS watched (certificate TEXT PRIMARY KEY, since REAL NOT NULL, peak REAL NOT NULL) STRICT;
"""


@dataclass
class Sums:
    """Hold what was observed at one operating point in one kind of request."""

    observed: float = 0.0
    exceeded: float = 0.0
    expected: float = 0.0
    """Times that it would have been reached by the certificate's own rate."""
    promised: float = 0.0
    """Most times, by what the certificate allows."""
    logs: list[float] = field(default_factory=lambda: [0.0] * len(RATIOS))

    def add(self, seen: Observation) -> None:
        """Add one observation."""
        self.observed += 1
        self.exceeded += seen.exceeded
        self.expected += seen.expected
        self.promised += seen.promised
        self.logs = [a + b for a, b in zip(self.logs, seen.logs, strict=True)]


@dataclass(frozen=True)
class Watched:
    """Hold all that was observed of one certificate."""

    since: float | None
    """Seconds since 1970 of the first observation; None: nothing was seen."""
    peak: float
    """Largest evidence so far: an alarm stays one."""
    sums: dict[tuple[Kind, float], Sums]
    """Kind and operating point → what was observed."""


class DriftLedger:
    """Add up observations, in a file that all processes of a machine share, or in memory. Thread-safe."""

    def __init__(self, path: Path | None = None) -> None:
        """Open or create the file; None: memory, of this process alone. Raises InputError."""
        self._lock, self._pending, self._count = threading.Lock(), dict[tuple[str, Kind, float], Sums](), 0
        try:
            self._db = sqlite3.connect(path or ":memory:", timeout=5.0, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA cache_size = -256")  # KiB
            if path:
                self._db.execute("PRAGMA journal_mode = WAL")
                path.chmod(0o600)
            self._db.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise InputError(f"{path}: {error}. Remove it, or choose a folder you can write to.") from None

    def observe(self, certificate: str, kind: Kind, seen: Sequence[Observation]) -> bool:
        """Take in what one request showed of a certificate; True once it is time to ``flush``."""
        with self._lock:
            for one in seen:
                self._pending.setdefault((certificate, kind, one.fmr), Sums()).add(one)
            self._count += bool(seen)
            return self._count >= AT_ONCE

    def flush(self) -> set[str]:
        """Add what is pending to the file; returns which certificates it concerns. What fails is tried again later."""
        with self._lock:
            pending, self._pending, self._count = self._pending, {}, 0
            if not pending:
                return set()
            try:
                self._db.execute("BEGIN IMMEDIATE")
                for (certificate, kind, fmr), sums in pending.items():
                    values = (sums.observed, sums.exceeded, sums.expected, sums.promised, *sums.logs)
                    added = ", ".join(f"{one} = {one} + excluded.{one}" for one in _COLUMNS)
                    self._db.execute(
                        f"INSERT INTO drift VALUES ({', '.join('?' * (3 + len(_COLUMNS)))}) "
                        f"ON CONFLICT DO UPDATE SET {added}",
                        (certificate, kind, fmr, *values),
                    )
                    self._db.execute("INSERT OR IGNORE INTO watched VALUES (?, ?, 1.0)", (certificate, time.time()))
                self._db.execute("COMMIT")
            except sqlite3.Error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self._pending = pending
                return set()
            return {certificate for certificate, _, _ in pending}

    def watched(self, certificate: str) -> Watched:
        """Read the sums of one certificate, those of this process included."""
        self.flush()
        with self._lock:
            rows = self._db.execute("SELECT * FROM drift WHERE certificate = ?", (certificate,)).fetchall()
            about = self._db.execute("SELECT since, peak FROM watched WHERE certificate = ?", (certificate,)).fetchone()
        sums = {(kind, fmr): Sums(a, b, c, d, list(logs)) for _, kind, fmr, a, b, c, d, *logs in rows}
        return Watched(about[0] if about else None, about[1] if about else 1.0, sums)

    def raise_peak(self, certificate: str, reached: float) -> None:
        """Remember the largest evidence, so that an alarm stays one."""
        with self._lock:
            try:
                self._db.execute(
                    "UPDATE watched SET peak = max(peak, ?) WHERE certificate = ?", (min(reached, 1e300), certificate)
                )
            except sqlite3.Error:  # locked: the next look says it again
                return

    def close(self) -> None:
        """Add what is pending, and let go of the file."""
        self.flush()
        with self._lock:
            self._db.close()
