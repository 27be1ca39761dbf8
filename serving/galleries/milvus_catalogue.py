"""Which galleries there are in Milvus: a collection that holds one row a gallery."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from pkd.serving.galleries.milvus_rows import Entry, hashed
from pkd.serving.galleries.milvus_tables import NOTHING, Freshness, Row, Tables
from pkd.serving.galleries.sqlite_rows import unknown_gallery
from pkd.serving.problems import Problem

COLUMNS = {"id": 64, "name": 64, "data": 60_000}
KNOWN_SECONDS = 0.3
"""How long a gallery's row is believed before it is read again."""
HEARTBEAT = "check"
"""A row that is no gallery."""


class Catalogue:
    """The rows, and what is remembered of them. Thread-safe; one a process."""

    def __init__(self, tables: Tables) -> None:
        self._tables, self._table = tables, f"{tables.prefix}_galleries"
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
        self._tables.insert(self._table, [entry.row()])
        # Two that create the same name at once: whoever sees the other withdraws, so that at most one stays.
        if len(self._rows(f'name == "{hashed(entry.name)}"', "ALL")) == 1:
            return True
        self._tables.delete(self._table, [entry.id])
        return False

    def change(self, entry: Entry) -> None:
        """Write a gallery's row anew. Raises a gallery-conflict where somebody else does at this moment."""
        self._tables.upsert(self._table, [entry.row()])
        self.forget(entry.name)
        if self.find(entry.name, "ALL") != entry:
            raise Problem("gallery-conflict", f"gallery {entry.name} is being changed by others. Look and try again.")

    def remove(self, entry: Entry) -> None:
        """Remove a gallery's row."""
        self._tables.delete(self._table, [entry.id])
        self.forget(entry.name)

    def forget(self, name: str) -> None:
        """Read it anew the next time."""
        self._known.pop(name, None)

    def check(self) -> None:
        """Read and write once. Raises a store-unavailable Problem where Milvus cannot."""
        self._rows(f'id == "{HEARTBEAT}"', "SEEN")
        self._tables.upsert(self._table, [{"id": HEARTBEAT, "name": "", "data": "", "vector": NOTHING}])

    def _rows(self, where: str, fresh: Freshness) -> Sequence[Row]:
        with self._starting:
            if not self._ready:
                self._tables.create(self._table, COLUMNS)
                self._ready = True
        rows = self._tables.pages(self._table, where, ["id", "data"], fresh)
        return [row for row in rows if row["id"] != HEARTBEAT]
