"""The galleries that there are in Milvus, a row each, and how a row changes: created, migrated, its key wrapped anew.

A migration begins with a second collection of templates, and ends in two steps of the gallery's row. The first says
that it is *ending*: one space is taken no more, but both still have their collections. Whoever enrolled before it is
seen now, whoever does so after it sees the row and withdraws; so a look at all subjects decides, and the second step
names the kept collection alone. What no row names is dropped, at once or by a sweep.
"""

from __future__ import annotations

import os
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from pkd.serving.core.errors import GalleryConflict, ServingError, StoreUnavailable
from pkd.serving.galleries.audit import Head
from pkd.serving.galleries.crypto import DecryptionError, MasterKey
from pkd.serving.galleries.milvus.client import Consistency, MilvusConnection, NoCollection, Row
from pkd.serving.galleries.milvus.gallery import MilvusGallery
from pkd.serving.galleries.milvus.records import MOVED, TEMPLATE_FIELDS, Ending, GalleryRow, hash_name
from pkd.serving.galleries.store import Space
from pkd.serving.galleries.templates import cannot_begin, left_behind, not_migrating, unknown_gallery

FIELDS = {"id": 64, "name": 64, "data": 60_000}
ROW_SECONDS = 0.3
"""Time that a gallery's row is believed before it is read again, seconds."""
DECIDING = 40
"""Looks, 0.05 s apart, at a name that two create at once, before one of the rows is taken: their creators have died."""
NOBODY = "check"
"""An id that no gallery has."""


class Catalogue:
    """Read and write the galleries' rows, and remember them for ``row_seconds``. Thread-safe; one a process.

    Every call raises StoreUnavailable where the collection was dropped: with it the keys of all galleries.
    """

    def __init__(self, connection: MilvusConnection, row_seconds: float = ROW_SECONDS) -> None:
        self._connection, self.table, self._row_seconds = connection, f"{connection.prefix}_galleries", row_seconds
        self._known: dict[str, tuple[float, GalleryRow]] = {}
        self._ready, self._starting = False, threading.Lock()

    def row(self, name: str, consistency: Consistency) -> GalleryRow:
        """Return a gallery's row, as read a moment ago unless ``consistency`` is strong. Raises UnknownGallery."""
        read, row = self._known.get(name, (0.0, None))
        if row is None or consistency == "strong" or time.monotonic() - read > self._row_seconds:
            read, row = time.monotonic(), self.find(name, consistency)
            if row is None:
                self.forget(name)
                raise unknown_gallery(name)
            self._known[name] = read, row
        return row

    def find(self, name: str, consistency: Consistency) -> GalleryRow | None:
        """Read a gallery's row now.

        Where two create one name at once there are two rows until one is withdrawn, and nobody but their creators knows
        which: that moment is waited for.
        """
        rows = self._rows(f'name == "{hash_name(name)}"', consistency)
        for _ in range(DECIDING):
            if len(rows) < 2:
                break
            time.sleep(0.05)
            rows = self._rows(f'name == "{hash_name(name)}"', "strong")
        return GalleryRow.read(min(rows, key=lambda row: str(row["id"]))) if rows else None

    def rows(self, consistency: Consistency) -> Sequence[GalleryRow]:
        """Read all rows, in no order."""
        return [GalleryRow.read(row) for row in self._rows('id > ""', consistency)]

    def add(self, row: GalleryRow) -> bool:
        """Add a gallery. False: another was being created under its name, so that this one was withdrawn.

        Raises StoreUnavailable where Milvus does not give the row that it has just acknowledged.
        """
        with self._there():
            self._connection.insert(self.table, [row.row()])
        # Two that create the same name at once: whoever sees the other withdraws, so that at most one stays.
        seen = [found["id"] for found in self._rows(f'name == "{hash_name(row.name)}"', "strong")]
        if seen == [row.id]:
            return True
        self._delete(row.id)
        if row.id not in seen:
            raise StoreUnavailable(
                f"Milvus acknowledged the row of gallery {row.name} and does not give it: its query nodes do not "
                "follow. Look at Milvus' log and restart it."
            )
        return False

    def change(self, row: GalleryRow) -> None:
        """Write a gallery's row anew. Raises GalleryConflict where somebody else does at this moment."""
        with self._there():
            self._connection.upsert(self.table, [row.row()])
        self.forget(row.name)
        self.require(row)

    def require(self, row: GalleryRow) -> None:
        """Raise GalleryConflict unless the gallery's row is this still: nothing may be decided on an old one."""
        if self.find(row.name, "strong") != row:
            self.forget(row.name)
            raise GalleryConflict(f"gallery {row.name} is being changed by others. Look and try again.")

    def remove(self, row: GalleryRow) -> None:
        """Remove a gallery's row."""
        self._delete(row.id)
        self.forget(row.name)

    def forget(self, name: str) -> None:
        """Forget a row, so that it is read anew the next time."""
        self._known.pop(name, None)

    def check(self) -> None:
        """Read and write once. Raises StoreUnavailable where Milvus cannot."""
        self._rows(f'id == "{NOBODY}"', "bounded")
        self._delete(NOBODY)  # goes through all that a write goes through, and leaves no row

    def rekey(self, before: MasterKey, after: MasterKey) -> int:
        """Wrap every gallery's key with another master key; returns how many. May be run again after an interruption.

        No server may run meanwhile. Raises DecryptionError for a key that neither of the two decrypts.
        """
        done = 0
        for row in self.rows("strong"):
            wrapped = row.wrapped_key
            try:
                key = before.gallery(row.name, wrapped)
            except DecryptionError:
                after.gallery(row.name, wrapped)
                continue
            self.change(replace(row, wrapped=b64encode(after.wrap(key)).decode()))
            done += 1
        return done

    def _rows(self, where: str, consistency: Consistency) -> Sequence[Row]:
        with self._starting:
            if not self._ready:
                self._connection.create(self.table, FIELDS)
                self._ready = True
        with self._there():
            return list(self._connection.pages(self.table, where, ["id", "data"], consistency))

    def _delete(self, id: str) -> None:
        with self._there():
            self._connection.delete(self.table, [id])

    @contextmanager
    def _there(self) -> Iterator[None]:
        try:
            yield
        except NoCollection:
            raise StoreUnavailable("The list of galleries is not in Milvus any more.") from None


@dataclass(frozen=True)
class MigrationRemains:
    """Say what a migration that has ended leaves to be deleted."""

    table: str
    moved: list[str]
    templates: int
    rows: int
    head: Head
    """The audit record."""

    def clear(self, gallery: MilvusGallery) -> None:
        """Delete what was left. A sweep does it otherwise."""
        gallery.connection.drop(self.table)
        gallery.connection.delete(gallery.records, self.moved)


def new_id() -> str:
    """Make an id for a gallery or a collection: the time in µs as 16 hex digits, and 8 random ones."""
    return f"{time.time_ns() // 1000:016x}{os.urandom(4).hex()}"


def begin_migration(catalogue: Catalogue, gallery: MilvusGallery, row: GalleryRow, space: Space) -> bool:
    """Take templates of a second space, too; False where it does already. Raises GalleryConflict."""
    if _begun(row, space):
        return False
    connection = gallery.connection
    connection.delete(gallery.records, moved_notes(gallery))  # left by a migration before this one
    table = f"{connection.prefix}_{row.id}_{new_id()}"
    connection.create(table, TEMPLATE_FIELDS, space.dim)
    try:
        # Making a collection takes Milvus over a second.
        now = catalogue.find(row.name, "strong")
        if now is None or now.id != row.id:
            raise unknown_gallery(row.name)
        if _begun(now, space):
            connection.drop(table)
            return False
        catalogue.change(replace(now, moving_to=space, tables={**now.tables, space.id: table}))
    except ServingError as error:
        if not isinstance(error, StoreUnavailable):  # then nobody knows whether the row names it
            connection.drop(table)
        raise
    return True


def end_migration(
    catalogue: Catalogue, gallery: MilvusGallery, row: GalleryRow, abandon: bool, record: Callable[[int, int], Head]
) -> MigrationRemains:
    """Keep the second space alone, with ``abandon`` the first one; go on where it was interrupted.

    ``record``: writes to the audit log how many templates and rows go. Raises GalleryConflict while a subject would
    be left without a template.
    """
    before, ending = _ending(row, abandon)
    if not row.ending:
        _require_moved(gallery, before, ending.space)
        catalogue.require(before)  # looking at all subjects may have taken minutes
        catalogue.change(ending)
    try:
        _require_moved(gallery, ending, ending.space)
    except ServingError:
        with suppress(ServingError):  # then it stays as it is, and can be ended once more
            catalogue.require(ending)
            catalogue.change(before)
        raise
    assert ending.ending
    table, moved = ending.tables[ending.ending.left.id], moved_notes(gallery)
    try:
        templates = gallery.connection.count(table, 'id > ""', "strong")
    except NoCollection:  # another one ended it at the same time
        templates = 0
    catalogue.require(ending)  # or another one ended it at the same time, or gave up
    kept = {ending.space.id: ending.tables[ending.space.id]}
    catalogue.change(replace(ending, ending=None, tables=kept))
    rows = templates + len(moved)
    return MigrationRemains(table, moved, templates, rows, record(templates, rows))


def second_space(row: GalleryRow) -> Space:
    """Return the space that the gallery moves to; raises GalleryConflict where there is none."""
    if row.ending:
        raise GalleryConflict(f"the migration of gallery {row.name} is being ended. End it once more.")
    if row.moving_to is None:
        raise not_migrating(row.name)
    return row.moving_to


def moved_notes(gallery: MilvusGallery) -> list[str]:
    """List the notes of subjects who have moved, by their keys."""
    return [row["id"] for row in gallery.connection.pages(gallery.records, f"kind == {MOVED}", ["id"], "strong")]


def _begun(row: GalleryRow, space: Space) -> bool:
    if row.moving_to == space:
        return True
    if row.ending:
        raise GalleryConflict(f"gallery {row.name} is still ending a migration. End that first, or choose another.")
    if row.moving_to or row.space.id == space.id:
        raise cannot_begin(row.name, row.moving_to)
    return False


def _ending(row: GalleryRow, abandon: bool) -> tuple[GalleryRow, GalleryRow]:
    """Return the gallery's row as it was before the migration is ended, and while it is."""
    if not row.ending:
        kept, left = (row.space, second_space(row)) if abandon else (second_space(row), row.space)
        return row, replace(row, space=kept, moving_to=None, ending=Ending(time.time(), left, abandon))
    if row.ending.abandon != abandon:
        state = "being abandoned" if row.ending.abandon else "being ended, not abandoned"
        raise GalleryConflict(f"the migration of gallery {row.name} is {state}. Send that once more.")
    first, then = (row.space, row.ending.left) if abandon else (row.ending.left, row.space)
    return replace(row, space=first, moving_to=then, ending=None), row


def _require_moved(gallery: MilvusGallery, row: GalleryRow, space: Space) -> None:
    for behind in gallery.without(row, space.id, "", 1, "strong"):
        raise left_behind(row.name, behind, space.id)
