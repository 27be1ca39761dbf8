"""Migrations in Milvus: a second collection of templates for a gallery, and the steps by which one of the two goes.

A migration ends in two steps of the gallery's row. The first says that it is *ending*: one space is taken no more, but
both still have their collections. Whoever enrolled before it is seen now, whoever does so after it sees the row and
withdraws; so a look at all subjects decides, and the second step names the kept collection alone. What no row names is
dropped, at once or by a sweep.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from pkd.serving.core.errors import GalleryConflict, ServingError, StoreUnavailable
from pkd.serving.galleries.audit import Head
from pkd.serving.galleries.milvus.catalogue import Catalogue
from pkd.serving.galleries.milvus.client import NoTable, Tables
from pkd.serving.galleries.milvus.collection import SWEEP_SECONDS, MilvusGallery
from pkd.serving.galleries.milvus.records import MOVED, TEMPLATES, Ending, Entry
from pkd.serving.galleries.store import Space
from pkd.serving.galleries.templates import unknown_gallery


@dataclass(frozen=True)
class Ended:
    """A migration that has ended, and what is still to be deleted of it."""

    table: str
    moved: list[str]
    templates: int
    rows: int
    head: Head
    """Of the audit record."""


def new_id() -> str:
    """For a gallery or a collection: when it was made, µs in 16 hex digits, and 8 random ones."""
    return f"{time.time_ns() // 1000:016x}{os.urandom(4).hex()}"


def begin(catalogue: Catalogue, gallery: MilvusGallery, entry: Entry, space: Space) -> bool:
    """Take templates of a second space, too; False where it does already. Raises a gallery-conflict."""
    if _begun(entry, space):
        return False
    tables = gallery.tables
    tables.delete(gallery.records, _moved(gallery))  # what is noted was left by a migration before this one
    table = f"{tables.prefix}_{entry.id}_{new_id()}"
    tables.create(table, TEMPLATES, space.dim)
    try:
        # Making a collection takes Milvus over a second.
        now = catalogue.find(entry.name, "ALL")
        if now is None or now.id != entry.id:
            raise unknown_gallery(entry.name)
        if _begun(now, space):
            tables.drop(table)
            return False
        catalogue.change(replace(now, moving_to=space, tables={**now.tables, space.id: table}))
    except ServingError as error:
        if not isinstance(error, StoreUnavailable):  # then nobody knows whether the row names it
            tables.drop(table)
        raise
    return True


def end(
    catalogue: Catalogue, gallery: MilvusGallery, entry: Entry, abandon: bool, log: Callable[[int, int], Head]
) -> Ended:
    """Keep the second space alone, with ``abandon`` the first one; go on where it was interrupted.

    ``log`` records how many templates and rows go. Raises a gallery-conflict while a subject would be left without.
    """
    before, ending = _ending(entry, abandon)
    if not entry.ending:
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
    table, moved = _left(ending), _moved(gallery)
    templates = _count(gallery.tables, table)
    catalogue.require(ending)  # or another one ended it at the same time, or gave up
    kept = {ending.space.id: ending.tables[ending.space.id]}
    catalogue.change(replace(ending, ending=None, tables=kept))
    return Ended(table, moved, templates, templates + len(moved), log(templates, templates + len(moved)))


def clear(gallery: MilvusGallery, ended: Ended) -> None:
    """Delete what was left. A sweep does it otherwise."""
    gallery.tables.drop(ended.table)
    gallery.tables.delete(gallery.records, ended.moved)


def interrupted(entry: Entry) -> bool:
    """Whether whoever was ending a migration has died, as far as time tells."""
    return entry.ending is not None and entry.ending.since < time.time() - SWEEP_SECONDS


def second(entry: Entry) -> Space:
    """The space that the gallery moves to; a gallery-conflict where there is none."""
    if entry.ending:
        raise GalleryConflict(f"the migration of gallery {entry.name} is being ended. End it once more.")
    if entry.moving_to is None:
        raise GalleryConflict(f"gallery {entry.name} is not being migrated. Begin a migration first.")
    return entry.moving_to


def _begun(entry: Entry, space: Space) -> bool:
    if entry.moving_to == space:
        return True
    if entry.moving_to or entry.ending or entry.space.id == space.id:
        state = f"moves to {entry.moving_to.id} already" if entry.moving_to else "has this space already"
        state = "is still ending a migration" if entry.ending else state
        raise GalleryConflict(f"gallery {entry.name} {state}. End that first, or choose another.")
    return False


def _ending(entry: Entry, abandon: bool) -> tuple[Entry, Entry]:
    """The gallery's row as it was before the migration is ended, and while it is."""
    if not entry.ending:
        kept, left = (entry.space, second(entry)) if abandon else (second(entry), entry.space)
        return entry, replace(entry, space=kept, moving_to=None, ending=Ending(time.time(), left, abandon))
    if entry.ending.abandon != abandon:
        state = "being abandoned" if entry.ending.abandon else "being ended, not abandoned"
        raise GalleryConflict(f"the migration of gallery {entry.name} is {state}. Send that once more.")
    first, then = (entry.space, entry.ending.left) if abandon else (entry.ending.left, entry.space)
    return replace(entry, space=first, moving_to=then, ending=None), entry


def _require_moved(gallery: MilvusGallery, entry: Entry, space: Space) -> None:
    for behind in gallery.without(entry, space.id, "", 1, "ALL"):
        raise GalleryConflict(
            f"gallery {entry.name}: subjects would be left without a template, {behind} first. "
            f"Enrol them in space {space.id}, or delete them."
        )


def _left(ending: Entry) -> str:
    assert ending.ending
    return ending.tables[ending.ending.left.id]


def _moved(gallery: MilvusGallery) -> list[str]:
    return [row["id"] for row in gallery.tables.pages(gallery.records, f"kind == {MOVED}", ["id"], "ALL")]


def _count(tables: Tables, table: str) -> int:
    try:
        return tables.count(table, 'id > ""', "ALL")
    except NoTable:  # another one ended it at the same time
        return 0
