"""The database file of a SqliteStore: this module holds its schema, connections and transactions.

One log of changes, ``changes``, tells every process what else than new templates happened: triggers write it, so that
no way of deleting can forget to. A template's number is never used again (AUTOINCREMENT): "newer than the newest I
know" finds all that were added since.
"""

from __future__ import annotations

import os
import queue
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from pkd.serving.core.errors import StoreUnavailable
from pkd.serving.galleries import audit
from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.failures import BUSY_SECONDS, explained, transaction
from pkd.toolkit.core.errors import InputError

NAME = "galleries.db"
VERSION = 1
READ_CACHE, WRITE_CACHE = 256, 1024
"""KiB of pages that a connection keeps; each fills as the file grows, and the system caches the file once for all."""

SCHEMA = f"""
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE galleries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, key BLOB NOT NULL,
    space TEXT NOT NULL, dim INTEGER NOT NULL, next_space TEXT, next_dim INTEGER,
    created REAL NOT NULL, retention REAL, subjects INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE encoders (
    id INTEGER PRIMARY KEY AUTOINCREMENT, gallery INTEGER NOT NULL REFERENCES galleries ON DELETE CASCADE,
    name TEXT NOT NULL, space TEXT NOT NULL, templates INTEGER NOT NULL DEFAULT 0, UNIQUE (gallery, name)
) STRICT;
CREATE TABLE subjects (
    id INTEGER PRIMARY KEY AUTOINCREMENT, gallery INTEGER NOT NULL REFERENCES galleries ON DELETE CASCADE,
    name TEXT NOT NULL, key BLOB NOT NULL, attributes TEXT NOT NULL, consent TEXT, UNIQUE (gallery, name)
) STRICT;
CREATE TABLE templates (
    id INTEGER PRIMARY KEY AUTOINCREMENT, subject INTEGER NOT NULL REFERENCES subjects ON DELETE CASCADE,
    encoder INTEGER NOT NULL REFERENCES encoders ON DELETE CASCADE,
    created REAL NOT NULL, expires REAL, sealed BLOB NOT NULL
) STRICT;
CREATE INDEX templates_of_subject ON templates (subject);
CREATE INDEX templates_of_encoder ON templates (encoder, subject);
CREATE INDEX templates_by_expiry ON templates (expires) WHERE expires IS NOT NULL;
CREATE TABLE answers (
    gallery INTEGER NOT NULL REFERENCES galleries ON DELETE CASCADE, key TEXT NOT NULL,
    subject INTEGER NOT NULL REFERENCES subjects ON DELETE CASCADE, digest TEXT NOT NULL, templates TEXT NOT NULL,
    sequence INTEGER NOT NULL, created REAL NOT NULL, PRIMARY KEY (gallery, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX answers_of_subject ON answers (subject);
CREATE TABLE changes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, what TEXT NOT NULL, gallery INTEGER, which INTEGER NOT NULL,
    time INTEGER NOT NULL DEFAULT (unixepoch())
) STRICT;
CREATE TRIGGER template_added AFTER INSERT ON templates BEGIN
    UPDATE encoders SET templates = templates + 1 WHERE id = NEW.encoder;
END;
CREATE TRIGGER template_gone AFTER DELETE ON templates BEGIN
    UPDATE encoders SET templates = templates - 1 WHERE id = OLD.encoder;
    INSERT INTO changes (what, gallery, which)
        VALUES ('template', (SELECT gallery FROM encoders WHERE id = OLD.encoder), OLD.id);
END;
CREATE TRIGGER subject_added AFTER INSERT ON subjects BEGIN
    UPDATE galleries SET subjects = subjects + 1 WHERE id = NEW.gallery;
END;
CREATE TRIGGER subject_gone AFTER DELETE ON subjects BEGIN
    UPDATE galleries SET subjects = subjects - 1 WHERE id = OLD.gallery;
END;
CREATE TRIGGER subject_described AFTER UPDATE OF attributes ON subjects BEGIN
    INSERT INTO changes (what, gallery, which) VALUES ('subject', NEW.gallery, NEW.id);
END;
CREATE TRIGGER gallery_added AFTER INSERT ON galleries BEGIN
    INSERT INTO changes (what, gallery, which) VALUES ('gallery', NEW.id, NEW.id);
END;
CREATE TRIGGER gallery_gone AFTER DELETE ON galleries BEGIN
    INSERT INTO changes (what, gallery, which) VALUES ('gallery', OLD.id, OLD.id);
END;
{audit.SCHEMA};
"""

MAPPINGS = """
CREATE TABLE IF NOT EXISTS mappings (
    gallery INTEGER PRIMARY KEY REFERENCES galleries ON DELETE CASCADE, state TEXT NOT NULL
) STRICT
"""
"""Added to databases that were made before there were mapped templates; older versions of pkd leave it alone."""


class SqliteFile:
    """Keep connections to one database. Safe to use from several threads; opened once a process.

    ``busy_seconds``: how long a write waits for those of other processes.
    """

    def __init__(
        self, folder: Path, master: MasterKey, *, create: bool = True, busy_seconds: float = BUSY_SECONDS
    ) -> None:
        """Open or create ``folder``/galleries.db.

        Raises InputError: no database there and not to be created, an empty file, made by another version of pkd, or
        another master key's; StoreUnavailable where the file cannot be used.
        """
        self.path = folder / NAME
        self.master = master
        self._busy_seconds = busy_seconds
        if not create and not self.path.is_file():
            raise InputError(f"{self.path}: no such database. Give the folder that pkd-serve --gallery was given.")
        if create:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if not self.path.exists():
                    self._create()
            except OSError as error:
                raise InputError(f"{folder}: {error.strerror}. Choose a folder you can write to.") from None
        if self.path.is_file() and not self.path.stat().st_size:
            raise InputError(f"{self.path}: is empty, so it was cut off. Restore a backup, or remove it to begin anew.")
        self._writing = threading.Lock()
        self._spare: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        self._all: list[sqlite3.Connection] = []
        self._closed = False
        with explained():
            self._writer = self.connect(WRITE_CACHE)
            try:
                self._check_origin()
            except BaseException:
                self.close()
                raise

    def connect(self, cache: int = READ_CACHE) -> sqlite3.Connection:
        """Open a further connection with ``cache`` KiB of pages; the caller uses it in one thread at a time."""
        db = sqlite3.connect(self.path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False)
        self._all.append(db)
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA secure_delete = ON")  # freed pages are overwritten with zeros
        db.execute("PRAGMA synchronous = FULL")  # a commit is on the disk before it is acknowledged
        db.execute(f"PRAGMA cache_size = -{cache}")
        return db

    def disconnect(self, db: sqlite3.Connection) -> None:
        """Close a connection."""
        if db in self._all:
            self._all.remove(db)
        db.close()

    def close(self) -> None:
        """Close every connection. Idempotent."""
        self._closed = True
        while self._all:
            self._all.pop().close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction that may write: committed at the end, undone by any exception. Raises StoreUnavailable."""
        with self._writing, transaction(self._writer, "IMMEDIATE"):
            yield self._writer

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give a connection within one read transaction, whose data are of one moment. Raises StoreUnavailable."""
        with explained():
            try:
                db = self._spare.get_nowait()
            except queue.Empty:
                db = self.connect()
            try:
                db.execute("BEGIN")
                yield db
            finally:
                if not self._closed:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    self._spare.put(db)

    def truncate(self, patience: float = 1.0) -> bool:
        """Move the write-ahead log into the database and cut it to nothing; False: readers or writers are in the way.

        Deleted pages are then neither in the log nor, thanks to secure_delete, in the database.
        """
        with self._writing, explained():
            self._writer.execute(f"PRAGMA busy_timeout = {int(patience * 1000)}")
            try:
                busy, _, _ = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except sqlite3.OperationalError:  # locked, or no space to checkpoint into: the deletion itself is durable
                return False
            finally:
                self._writer.execute(f"PRAGMA busy_timeout = {int(self._busy_seconds * 1000)}")
            return not busy

    def rekey(self, master: MasterKey) -> int:
        """Wrap every gallery's key with another master key, in one step; returns how many.

        Copies of the database from before still open with the old key: destroy them, or it, as the reason demands.
        """
        with self.writing() as db:
            self.require_master(db)
            galleries = db.execute("SELECT id, name, key FROM galleries").fetchall()
            for id, name, wrapped in galleries:
                rewrapped = master.wrap(self.master.gallery(name, wrapped))
                db.execute("UPDATE galleries SET key = ? WHERE id = ?", (rewrapped, id))
            db.execute("UPDATE about SET value = ? WHERE name = 'master'", (master.id,))
            audit.append(db, "pkd-gallery", "rekey", "", rows=len(galleries))
        self.master = master
        self.truncate()
        return len(galleries)

    def require_master(self, db: sqlite3.Connection) -> None:
        """Raise StoreUnavailable if the master key was changed by another process: ours would wrap in vain."""
        if dict(db.execute("SELECT name, value FROM about"))["master"] != self.master.id:
            raise StoreUnavailable("The master key was changed. Restart this server with the new one.")

    def _create(self) -> None:
        """Make the database beside its place and put it there whole: an empty file is never a new one."""
        handle, name = tempfile.mkstemp(prefix=f"{NAME}.", dir=self.path.parent)
        os.close(handle)
        try:
            with explained(), closing(sqlite3.connect(name)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.executescript(SCHEMA)
                db.execute(MAPPINGS)
                about = {"schema": str(VERSION), "master": self.master.id, "heartbeat": "0"}
                db.executemany("INSERT INTO about VALUES (?, ?)", about.items())
                db.commit()
            with suppress(FileExistsError):  # another process was first
                os.link(name, self.path)
        finally:
            Path(name).unlink()

    def _check_origin(self) -> None:
        db = self._writer
        db.execute("PRAGMA journal_mode = WAL")
        try:
            about = dict(db.execute("SELECT name, value FROM about"))
        except sqlite3.OperationalError:
            raise InputError(f"{self.path}: not a database of pkd's galleries. Choose another folder.") from None
        if about.get("schema") != str(VERSION):
            raise InputError(
                f"{self.path}: has schema {about.get('schema')}, this pkd knows {VERSION}. Use the pkd that made it."
            )
        if about.get("master") != self.master.id:
            raise InputError(
                f"{self.path}: was written with master key {about.get('master')}, given is {self.master.id}. "
                "Give the key file it was made with."
            )
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'mappings'").fetchone():
            db.execute(MAPPINGS)
