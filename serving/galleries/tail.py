"""Tail: keeps what a process has in memory like what is in the database, whoever wrote it.

Before a search, ``PRAGMA data_version`` tells in microseconds whether anything was committed since. If so, templates
newer than the newest known are read, and the log of changes for what went. The first reading is the same code.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from threadpoolctl import threadpool_limits

from pkd.serving.galleries.gallery import Attributes
from pkd.serving.galleries.memory_index import MemoryIndex, Rows, template_id
from pkd.serving.galleries.sqlite_file import SqliteFile, explained
from pkd.serving.galleries.vault import GalleryKey, Sealed, SubjectKey
from pkd.serving.settings import usable_cores

STORED = np.dtype("<f2")
"""Element type of a stored vector."""
AT_ONCE = 8192
"""Templates read and decrypted at a time."""

logger = logging.getLogger("pkd.serving")


@dataclass
class Followed:
    """A gallery in memory. ``id``: its row."""

    id: int
    name: str
    key: GalleryKey
    index: MemoryIndex


@dataclass(frozen=True)
class _Row:
    """A template as the database has it."""

    gallery: int
    encoder: str
    template: int
    subject: int
    name: str
    key: bytes
    attributes: str
    sealed: bytes


class Tail:
    """Thread-safe. One a process."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file
        self._db = file.connect()
        self._lock = threading.Lock()
        self._cores = ThreadPoolExecutor(usable_cores(), thread_name_prefix="pkd-search")
        # Matrix products are cut so small that BLAS' own threads would only wait for each other, at 100 times the cost.
        threadpool_limits(1, user_api="blas")
        self._forget()

    def _forget(self) -> None:
        self._version = -1
        self._template = 0
        self._change = -1
        self._by_id: dict[int, Followed] = {}
        self._by_name: dict[str, Followed] = {}
        self.unreadable: dict[int, str] = {}
        """Templates that do not decrypt and so take no part in searches → why."""

    def close(self) -> None:
        """End the threads of searches."""
        self._cores.shutdown()

    def gallery(self, name: str) -> Followed | None:
        """A gallery as of the last catching up."""
        return self._by_name.get(name)

    def catch_up(self, patience: float = -1) -> None:
        """Take in all that has been committed. Raises store-unavailable; what was known stays.

        ``patience``: seconds to wait for another thread that is at it, then go on with what is known; -1: as long as
        it takes.
        """
        if not self._lock.acquire(timeout=patience):
            return
        try:
            with explained():
                (version,) = self._db.execute("PRAGMA data_version").fetchone()
                if version != self._version:
                    with _snapshot(self._db):
                        self._read()
                    self._version = version
        finally:
            self._lock.release()

    def _read(self) -> None:
        changes = self._changes()
        if changes is None:
            self._forget()
            (newest,) = self._db.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'changes'").fetchone()
            self._change, changes = newest or 0, []
            self._galleries()
        if any(what == "gallery" for _, what, _, _ in changes):
            self._galleries()
        self._apply_removals(changes)
        self._add()
        for _, what, gallery, which in changes:
            if what == "subject" and gallery in self._by_id:
                found = self._db.execute("SELECT attributes FROM subjects WHERE id = ?", (which,)).fetchone()
                if found:
                    self._by_id[gallery].index.describe(which, json.loads(found[0]))
        if changes:
            self._change = changes[-1][0]

    def _changes(self) -> Sequence[tuple[int, str, int | None, int]] | None:
        """Those since the last time; None if they are no longer all there, or at the beginning."""
        if self._change < 0:
            return None
        found = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'changes'").fetchone()
        newest = found[0] if found else 0
        rows: list[tuple[int, str, int | None, int]] = self._db.execute(
            "SELECT id, what, gallery, which FROM changes WHERE id > ? ORDER BY id", (self._change,)
        ).fetchall()
        return rows if len(rows) == newest - self._change else None

    def _galleries(self) -> None:
        rows = self._db.execute("SELECT id, name, key FROM galleries").fetchall()
        there = {id for id, _, _ in rows}
        for id in [id for id in self._by_id if id not in there]:
            del self._by_id[id]
        for id, name, wrapped in rows:
            if id not in self._by_id:
                try:
                    self._by_id[id] = self._follow(id, name, wrapped)
                except Sealed as error:
                    logger.error("%s It is not served.", error)
        self._by_name = {gallery.name: gallery for gallery in self._by_id.values()}

    def _follow(self, id: int, name: str, wrapped: bytes) -> Followed:
        return Followed(id, name, self._file.master.gallery(name, wrapped), MemoryIndex(self._cores.map))

    def _apply_removals(self, changes: Sequence[tuple[int, str, int | None, int]]) -> None:
        gone = sorted((gallery, which) for _, what, gallery, which in changes if what == "template" and gallery)
        for id, rows in groupby(gone, key=lambda row: row[0]):
            templates = [which for _, which in rows]
            for template in templates:
                self.unreadable.pop(template, None)
            if id in self._by_id:
                self._by_id[id].index.remove(np.array(templates, np.int64))

    def _add(self) -> None:
        cursor = self._db.execute(
            "SELECT s.gallery, e.name, t.id, s.id, s.name, s.key, s.attributes, t.sealed FROM templates t "
            "JOIN subjects s ON s.id = t.subject JOIN encoders e ON e.id = t.encoder WHERE t.id > ? ORDER BY t.id",
            (self._template,),
        )
        for chunk in iter(lambda: cursor.fetchmany(AT_ONCE), []):
            rows = [_Row(*row) for row in chunk]
            rows.sort(key=lambda row: (row.gallery, row.encoder, row.template))
            for (gallery, encoder), group in groupby(rows, key=lambda row: (row.gallery, row.encoder)):
                if gallery in self._by_id:
                    self._add_rows(self._by_id[gallery], encoder, list(group))
            self._template = chunk[-1][2]

    def _add_rows(self, gallery: Followed, encoder: str, rows: Sequence[_Row]) -> None:
        good, plain = [], []
        keys: dict[int, SubjectKey] = {}
        for row in rows:
            try:
                if row.subject not in keys:
                    keys[row.subject] = gallery.key.subject(row.name, row.key)
                plain.append(keys[row.subject].open(row.sealed, template_id(row.template), encoder))
                good.append(row)
            except Sealed as error:
                self.unreadable[row.template] = str(error)
                logger.error("%s It takes no part in searches.", error)
        if not good:
            return
        parsed: dict[str, Attributes] = {}
        for row in good:
            if row.attributes not in parsed:
                parsed[row.attributes] = json.loads(row.attributes)
        gallery.index.add(
            Rows(
                encoder,
                np.array([row.template for row in good], np.int64),
                np.array([row.subject for row in good], np.int64),
                {row.subject: row.name for row in good},
                {row.subject: parsed[row.attributes] for row in good},
                np.frombuffer(b"".join(plain), STORED).reshape(len(good), -1).astype(np.float32),
            )
        )


@contextmanager
def _snapshot(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN")
    try:
        yield
    finally:
        db.execute("ROLLBACK")
