"""Which galleries there are in Milvus: a collection that holds one row a gallery."""

from __future__ import annotations

import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from pkd.serving.core.errors import GalleryConflict, StoreUnavailable
from pkd.serving.galleries.crypto import MasterKey, Sealed
from pkd.serving.galleries.milvus.client import Freshness, NoTable, Row, Tables
from pkd.serving.galleries.milvus.records import Entry, hashed
from pkd.serving.galleries.templates import unknown_gallery

COLUMNS = {"id": 64, "name": 64, "data": 60_000}
KNOWN_SECONDS = 0.3
"""How long a gallery's row is believed before it is read again."""
NOBODY = "check"
"""An id that no gallery has."""


class Catalogue:
    """The rows, and what is remembered of them. Thread-safe; one a process.

    Every call raises StoreUnavailable where the collection was dropped: with it the keys of all galleries.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables, self.table = tables, f"{tables.prefix}_galleries"
        self._known: dict[str, tuple[float, Entry]] = {}
        self._ready, self._starting = False, threading.Lock()

    def entry(self, name: str, fresh: Freshness) -> Entry:
        """A gallery's row; what was read a moment ago will do unless ``fresh`` is ALL. Raises unknown-gallery."""
        read, entry = self._known.get(name, (0.0, None))
        if entry is None or fresh == "ALL" or time.monotonic() - read > KNOWN_SECONDS:
            read, entry = time.monotonic(), self.find(name, fresh)
            if entry is None:
                self.forget(name)
                raise unknown_gallery(name)
            self._known[name] = read, entry
        return entry

    def find(self, name: str, fresh: Freshness) -> Entry | None:
        """A gallery's row, read now."""
        rows = self._rows(f'name == "{hashed(name)}"', fresh)
        return Entry.of(rows[0]) if rows else None

    def entries(self, fresh: Freshness) -> Sequence[Entry]:
        """All, in no order."""
        return [Entry.of(row) for row in self._rows('id > ""', fresh)]

    def add(self, entry: Entry) -> bool:
        """Add a gallery. False: another was being created under its name, so that this one was withdrawn."""
        with self._there():
            self._tables.insert(self.table, [entry.row()])
        # Two that create the same name at once: whoever sees the other withdraws, so that at most one stays.
        if len(self._rows(f'name == "{hashed(entry.name)}"', "ALL")) == 1:
            return True
        self._delete(entry.id)
        return False

    def change(self, entry: Entry) -> None:
        """Write a gallery's row anew. Raises a gallery-conflict where somebody else does at this moment."""
        with self._there():
            self._tables.upsert(self.table, [entry.row()])
        self.forget(entry.name)
        self.require(entry)

    def require(self, entry: Entry) -> None:
        """Raise a gallery-conflict unless the gallery's row is this still: nothing may be decided on an old one."""
        if self.find(entry.name, "ALL") != entry:
            self.forget(entry.name)
            raise GalleryConflict(f"gallery {entry.name} is being changed by others. Look and try again.")

    def remove(self, entry: Entry) -> None:
        """Remove a gallery's row."""
        self._delete(entry.id)
        self.forget(entry.name)

    def forget(self, name: str) -> None:
        """Read it anew the next time."""
        self._known.pop(name, None)

    def check(self) -> None:
        """Read and write once. Raises StoreUnavailable where Milvus cannot."""
        self._rows(f'id == "{NOBODY}"', "SEEN")
        self._delete(NOBODY)  # goes through all that a write goes through, and leaves no row

    def _rows(self, where: str, fresh: Freshness) -> Sequence[Row]:
        with self._starting:
            if not self._ready:
                self._tables.create(self.table, COLUMNS)
                self._ready = True
        with self._there():
            return list(self._tables.pages(self.table, where, ["id", "data"], fresh))

    def _delete(self, id: str) -> None:
        with self._there():
            self._tables.delete(self.table, [id])

    @contextmanager
    def _there(self) -> Iterator[None]:
        try:
            yield
        except NoTable:
            raise StoreUnavailable("The list of galleries is not in Milvus any more.") from None


def rewrap(catalogue: Catalogue, before: MasterKey, after: MasterKey) -> int:
    """Wrap every gallery's key with another master key; how many. Run again, it goes on where it was interrupted.

    No server may run meanwhile. Raises Sealed for a key that neither of the two opens.
    """
    done = 0
    for entry in catalogue.entries("ALL"):
        wrapped = b64decode(entry.wrapped)
        try:
            key = before.gallery(entry.name, wrapped)
        except Sealed:
            after.gallery(entry.name, wrapped)
            continue
        catalogue.change(replace(entry, wrapped=b64encode(after.wrap(key)).decode()))
        done += 1
    return done
