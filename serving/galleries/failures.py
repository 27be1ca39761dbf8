"""Storage that fails, in words for whoever runs the server: what SQLite's errors and undecryptable rows mean."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pkd.serving.core.errors import StoreUnavailable
from pkd.serving.galleries.crypto import DecryptionError

BUSY_SECONDS = 5.0
"""Longest time that a write waits for those of other processes, seconds."""
MEANING = {
    "disk is full": "the disk is full. Free some space; nothing of this request was kept",
    "readonly": "the database cannot be written to: file or file system is read-only",
    "locked": f"another process has been writing for more than {BUSY_SECONDS:g} s. Try again",
    "disk I/O error": "the disk reports an error",
    "malformed": "the database is damaged. Stop the server and restore a backup (pkd-gallery verify says what is lost)",
    "not a database": "the database is damaged or not pkd's. Restore a backup",
    "unable to open": "the database cannot be opened: is its folder there, and writable?",
    "no such table": "the database was replaced or emptied while in use. Restart the server",
}
"""Part of what SQLite says → what it means."""


@contextmanager
def transaction(db: sqlite3.Connection, kind: Literal["IMMEDIATE", "DEFERRED"]) -> Iterator[None]:
    """Commit what is done in a block; undo it after any exception. Raises StoreUnavailable as ``explained``."""
    with explained():
        db.execute(f"BEGIN {kind}")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # SQLite has undone it by itself where the disk was full
                db.execute("ROLLBACK")
            raise


@contextmanager
def explained() -> Iterator[None]:
    """Turn what SQLite raises, and rows that do not decrypt, into StoreUnavailable with a plain reason."""
    try:
        yield
    except DecryptionError as error:
        raise StoreUnavailable(f"Galleries: {error} Run pkd-gallery verify.") from error
    except sqlite3.Error as error:
        said = str(error)
        reason = next((meaning for part, meaning in MEANING.items() if part in said), f"SQLite says: {said}")
        raise StoreUnavailable(f"Galleries: {reason}.") from error
