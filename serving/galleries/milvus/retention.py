"""Retention in Milvus: expired templates are deleted, and what dead processes and Milvus' own files still hold.

Milvus marks rows as deleted and holds them until it writes their segment anew. So galleries with a deletion on record
are looked at from time to time (``purge``): where Milvus holds more rows than it gives, it is asked to write them anew;
where it does not, that is recorded. The files from before it removes later, by its own settings (docs/milvus.md).
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator

from pkd.serving.core.errors import ServingError
from pkd.serving.galleries.audit import AuditFile
from pkd.serving.galleries.milvus.catalogue import Catalogue
from pkd.serving.galleries.milvus.client import MilvusConnection, NoCollection
from pkd.serving.galleries.milvus.commit import Removal, finish_removal, plan_removal, remove, repair
from pkd.serving.galleries.milvus.gallery import MilvusGallery, chunks, records_of
from pkd.serving.galleries.milvus.records import COMMIT, JOURNAL, MOVED, GalleryRow, current

ID = re.compile("[0-9a-f]{24}")
logger = logging.getLogger(__name__)


def expire(gallery: MilvusGallery, row: GalleryRow, now: float) -> Iterator[Removal]:
    """Delete what is past its time, some subjects at a time, and yield what went.

    A commit whose attributes or consent still hold stays, without its templates, while its subject has others.
    """
    where = f"kind == {COMMIT} and expires <= {int(now * 1e6)}"
    rows = gallery.connection.pages(gallery.records, where, ["id", "subject"], "bounded")
    expired = {one["id"]: one["subject"] for one in rows}
    key = gallery.cipher.commit_key
    for some in chunks(expired.values()):
        commits, stored = gallery.commits(some), gallery.stored(row, some)
        readable, of_some = {key(commit) for found in commits.values() for commit in found}, set(some)
        # One that does not decrypt goes by the time beside it; whether its attributes still hold nobody can say.
        gone = [id for id, subject in expired.items() if subject in of_some and id not in readable]
        emptied: list[str] = []
        for found in commits.values():
            past = [commit for commit in found if commit.expires is not None and commit.expires <= now]
            left = [commit for commit in found if commit not in past and set(commit.template_ids) & stored.keys()]
            described = current(found)
            for number, commit in enumerate(past):
                needed = left and current([*left, *past[number + 1 :]]) != described
                if not needed:
                    gone.append(key(commit))
                elif set(commit.template_ids) & stored.keys():
                    emptied.append(key(commit))
            if not left:
                gone += [key(commit) for commit in found if commit not in past]
        if gone or emptied:
            removal = plan_removal(gallery, row, gone, keep=emptied)
            finish_removal(gallery, row, removal, remove(gallery, removal))
            yield removal


def sweep(gallery: MilvusGallery, row: GalleryRow, before: float) -> int:
    """Finish what processes that died before then (seconds since 1970) have begun; returns how many rows went."""
    removed = repair(gallery, row, before)
    if row.moving_to is None and row.ending is None:  # of a migration that has ended
        where = f"kind == {MOVED} and created < {int(before * 1e6)}"
        moved = [one["id"] for one in gallery.connection.pages(gallery.records, where, ["id"], "strong")]
        gallery.connection.delete(gallery.records, moved)
        removed += len(moved)
    return removed


def sweep_collections(connection: MilvusConnection, catalogue: Catalogue, before: float) -> None:
    """Drop collections from before then (seconds since 1970) that no gallery names.

    They are of galleries or migrations never begun to the end, or not dropped to the end. Young ones stay, since a
    collection is made before its gallery's row names it.
    """
    names = connection.names()
    # Read after the names: what was named by then is not dropped, however long reading takes.
    rows = catalogue.rows("strong")
    galleries = {row.id for row in rows}
    named = {name for row in rows for name in row.tables.values()}
    for name in names:
        gallery, _, table = name.removeprefix(f"{connection.prefix}_").partition("_")
        if not ID.fullmatch(gallery) or name in named:
            continue
        made = table if gallery in galleries else gallery
        if ID.fullmatch(made) and int(made[:16], 16) < before * 1e6:
            connection.drop(name)


def purge(connection: MilvusConnection, catalogue: Catalogue, log: AuditFile, stopped_seconds: float) -> None:
    """Look at every gallery that this machine's log has deletions of. What Milvus cannot do now is tried next time.

    ``stopped_seconds``: how old a journal is that most likely only a sweep will clear.
    """
    held: dict[str, bool] = {}
    stopped = f"kind == {JOURNAL} and created < {int((time.time() - stopped_seconds) * 1e6)}"
    for gallery, sequence in log.unpurged().items():
        try:
            row = catalogue.find(gallery, "strong")
            # A deleted gallery's own collections are dropped; its wrapped key was a row of the catalogue.
            names = [records_of(connection, row.id), *row.tables.values()] if row else []
            if row and connection.count(
                names[0], stopped, "strong"
            ):  # the rows that a sweep will delete are given still
                continue
            for name in {catalogue.table, *names} - held.keys():
                held[name] = connection.holds_deleted(name)
        except NoCollection:  # it is being deleted at this moment
            continue
        except ServingError as error:
            logger.warning("Milvus: whether deleted rows have left its files is looked at later: %s", error)
            continue
        if not any(held[name] for name in (catalogue.table, *names)):
            log.purged(gallery, sequence)
    # Not before all are flushed: 2.3 compacts every collection at each request, and leaves out a segment that it is
    # busy with, maybe without the newest deletions.
    for name in (name for name, holds in held.items() if holds):
        with contextlib.suppress(NoCollection, ServingError):
            connection.compact(name)
