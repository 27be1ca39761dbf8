"""The change follower: it keeps what a process has in memory like what is in the database, whoever wrote it.

Before a search, and twice a second in any case, ``PRAGMA data_version`` tells in microseconds whether anything was
committed since. If so, templates newer than the newest known are read, and the log of changes for what went. The first
reading is the same code.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
from threadpoolctl import threadpool_limits

from pkd.serving.core.errors import ServingError
from pkd.serving.core.options import usable_cores
from pkd.serving.galleries.crypto import DecryptionError, GalleryKey
from pkd.serving.galleries.failures import explained
from pkd.serving.galleries.index.exact_index import ParallelMap
from pkd.serving.galleries.index.memory_index import MemoryIndex, Rows, template_id
from pkd.serving.galleries.sqlite.database import SqliteFile
from pkd.serving.galleries.sqlite.rows import read_gallery
from pkd.serving.galleries.store import Gallery
from pkd.serving.galleries.templates import unit_rows

AT_ONCE = 8192
"""Templates read and decrypted together."""

FOLLOW_SECONDS = 0.5
"""Time between looks at what others committed, so that a process without searches forgets what was deleted, too."""

IndexFactory = Callable[[ParallelMap], MemoryIndex]
logger = logging.getLogger("pkd.serving")


@dataclass
class LoadedGallery:
    """Hold a gallery in memory. ``id``: its row's number."""

    id: int
    name: str
    key: GalleryKey
    index: MemoryIndex
    described: Gallery
    """The gallery as it was last read, but for its counts."""
    unreadable: dict[int, str] = field(default_factory=dict)
    """Number of each template that does not decrypt, and so takes no part in searches → why."""

    def remembered(self) -> Gallery:
        """Describe the gallery by what is in memory, for when the database cannot be read."""
        return replace(self.described, subjects=self.index.subjects, templates=self.index.counts())


@dataclass
class _Known:
    """Remember what was read so far. ``template``, ``change``: the newest; -1: nothing was."""

    template: int = 0
    change: int = -1
    by_id: dict[int, LoadedGallery] = field(default_factory=dict)
    by_name: dict[str, LoadedGallery] = field(default_factory=dict)


_Row = tuple[int, str, int, int, str, bytes, str, bytes]
"""Gallery, encoder, template, subject, their id, key and attributes, ciphertext."""
_Change = tuple[int, str, int | None, int]
"""Number, what kind, gallery, which row."""


class ChangeFollower:
    """Follow what is committed to a database. Thread-safe; one a process."""

    def __init__(self, file: SqliteFile, seconds: float = FOLLOW_SECONDS, index: IndexFactory = MemoryIndex) -> None:
        """Begin with nothing. ``seconds``: between looks, once ``watch`` is called. ``index``: makes a gallery's."""
        self._file, self._seconds, self._index = file, seconds, index
        self._db = file.connect()
        self._lock = threading.Lock()
        self._cores = ThreadPoolExecutor(usable_cores(), thread_name_prefix="pkd-search")
        # Matrix products are cut so small that BLAS' own threads would only wait for each other, at 100 times the cost.
        threadpool_limits(1, user_api="blas")
        self._version = -1
        self._known = _Known()
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="pkd-follower", daemon=True)

    def watch(self) -> None:
        """Catch up regularly from now on."""
        self._watcher.start()

    def close(self) -> None:
        """End all threads and close the connection."""
        self._closing.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._cores.shutdown()
        self._file.disconnect(self._db)

    def gallery(self, name: str) -> LoadedGallery | None:
        """Return a gallery as of the last catching up."""
        return self._known.by_name.get(name)

    def galleries(self) -> Sequence[LoadedGallery]:
        """Return all galleries as of the last catching up."""
        return list(self._known.by_id.values())

    def catch_up(self, patience: float = -1) -> None:
        """Take in all that has been committed. Raises StoreUnavailable; what was known stays.

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
        except Exception as error:
            if not isinstance(error, ServingError):  # out of memory, say, half-way: all is read anew
                self._known.change = -1
            raise
        finally:
            self._lock.release()

    def _watch(self) -> None:
        failed = False
        while not self._closing.wait(self._seconds):
            try:
                self.catch_up()
                failed = False
            except Exception as error:  # whatever it is, deletions by other processes must go on being followed
                if not failed:
                    said = error if isinstance(error, ServingError) else type(error).__name__
                    logger.warning("what is in memory may be behind: %s", said)
                failed = True

    def _read(self) -> None:
        known = self._known
        changes = self._changes(known)
        if changes is None:  # all of it, beside what answers meanwhile
            (newest,) = self._db.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'changes'").fetchone()
            known, changes = _Known(change=newest or 0), []
        if not known.by_id or any(what == "gallery" for _, what, _, _ in changes):
            self._galleries(known)
        _remove(known, changes)
        self._add(known)
        for _, what, gallery, which in changes:
            if what == "subject" and gallery in known.by_id:
                found = self._db.execute("SELECT attributes FROM subjects WHERE id = ?", (which,)).fetchone()
                if found:
                    known.by_id[gallery].index.describe(which, json.loads(found[0]))
        if changes:
            known.change = changes[-1][0]
        self._known = known

    def _changes(self, known: _Known) -> Sequence[_Change] | None:
        """Read the changes since the last time; None if they are no longer all there, or at the beginning."""
        if known.change < 0:
            return None
        found = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'changes'").fetchone()
        rows: list[_Change] = self._db.execute(
            "SELECT id, what, gallery, which FROM changes WHERE id > ? ORDER BY id", (known.change,)
        ).fetchall()
        return rows if len(rows) == (found[0] if found else 0) - known.change else None

    def _galleries(self, known: _Known) -> None:
        rows = self._db.execute("SELECT id, name, key FROM galleries").fetchall()
        there = {id for id, _, _ in rows}
        known.by_id = {id: followed for id, followed in known.by_id.items() if id in there}
        for id, name, wrapped in rows:
            if id not in known.by_id:
                try:
                    key = self._file.master.gallery(name, wrapped)
                    described = read_gallery(self._db, name)
                    known.by_id[id] = LoadedGallery(id, name, key, self._index(self._cores.map), described)
                except DecryptionError:  # which names the gallery, and no log does
                    logger.error("The key of a gallery does not decrypt: it is not served. Run pkd-gallery verify.")
        known.by_name = {followed.name: followed for followed in known.by_id.values()}

    def _add(self, known: _Known) -> None:
        cursor = self._db.execute(
            "SELECT s.gallery, e.name, t.id, s.id, s.name, s.key, s.attributes, t.sealed FROM templates t "
            "JOIN subjects s ON s.id = t.subject JOIN encoders e ON e.id = t.encoder WHERE t.id > ? ORDER BY t.id",
            (known.template,),
        )
        for chunk in iter(lambda: cursor.fetchmany(AT_ONCE), []):
            groups: dict[tuple[int, str], list[_Row]] = defaultdict(list)
            for row in chunk:
                groups[row[:2]].append(row)
            for (gallery, encoder), rows in groups.items():
                if gallery in known.by_id:
                    _add_rows(known.by_id[gallery], encoder, rows)
            known.template = chunk[-1][2]


def _remove(known: _Known, changes: Sequence[_Change]) -> None:
    gone = sorted((gallery, which) for _, what, gallery, which in changes if what == "template" and gallery)
    for id, rows in groupby(gone, key=lambda row: row[0]):
        if id in known.by_id:
            templates = [which for _, which in rows]
            known.by_id[id].index.remove(np.array(templates, np.int64))
            for template in templates:
                known.by_id[id].unreadable.pop(template, None)


def _add_rows(gallery: LoadedGallery, encoder: str, rows: Sequence[_Row]) -> None:
    ciphertexts = ((name, key, template_id(template), data) for _, _, template, _, name, key, _, data in rows)
    plain = list(gallery.key.templates(ciphertexts, encoder))
    for row, found in zip(rows, plain, strict=True):
        if isinstance(found, DecryptionError):
            gallery.unreadable[row[2]] = str(found)
            logger.error("Template %s does not decrypt: it takes no part in searches.", template_id(row[2]))
    good = [row for row, found in zip(rows, plain, strict=True) if not isinstance(found, DecryptionError)]
    if not good:
        return
    data = b"".join(found for found in plain if not isinstance(found, DecryptionError))
    _, _, templates, subjects, names, _, attributes, _ = zip(*good, strict=True)
    numbers = {text: number for number, text in enumerate(dict.fromkeys(attributes))}
    gallery.index.add(
        Rows(
            encoder,
            np.array(templates, np.int64),
            np.array(subjects, np.int64),
            names,
            [json.loads(text) for text in numbers],
            np.array([numbers[text] for text in attributes], np.int64),
            unit_rows(data, len(good)),
        )
    )


@contextmanager
def _snapshot(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN")
    try:
        yield
    finally:
        db.execute("ROLLBACK")
