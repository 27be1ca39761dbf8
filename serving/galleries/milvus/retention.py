"""What goes by itself in Milvus: templates past their time, and what processes that died have left."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from pkd.serving.galleries.milvus.catalogue import Catalogue
from pkd.serving.galleries.milvus.client import Row, Tables
from pkd.serving.galleries.milvus.collection import SWEEP_SECONDS, MilvusGallery, Removal, chunks
from pkd.serving.galleries.milvus.records import COMMIT, JOURNAL, MOVED, PSEUDONYM, Entry, current

ID = re.compile("[0-9a-f]{24}")


def expire(gallery: MilvusGallery, entry: Entry, now: float) -> Iterator[Removal]:
    """Delete what is past its time, some subjects at a time, and say what went.

    A commit whose attributes or consent still hold stays, without its templates, while its subject has others.
    """
    where = f"kind == {COMMIT} and expires <= {int(now * 1e6)}"
    expired = {
        row["id"]: row["subject"] for row in gallery.tables.pages(gallery.records, where, ["id", "subject"], "SEEN")
    }
    for some in chunks(expired.values()):
        commits, stored = gallery.commits(some), gallery.stored(entry, some)
        opened = {gallery.row(commit) for found in commits.values() for commit in found}
        of_some = set(some)
        # One that does not open goes by the time beside it; whether its attributes still hold nobody can say.
        gone = [id for id, subject in expired.items() if subject in of_some and id not in opened]
        emptied: list[str] = []
        for found in commits.values():
            past = [commit for commit in found if commit.expires is not None and commit.expires <= now]
            left = [commit for commit in found if commit not in past and set(commit.template_ids) & stored.keys()]
            described = current(found)
            for number, commit in enumerate(past):
                needed = left and current([*left, *past[number + 1 :]]) != described
                if not needed:
                    gone.append(gallery.row(commit))
                elif set(commit.template_ids) & stored.keys():
                    emptied.append(gallery.row(commit))
            if not left:
                gone += [gallery.row(commit) for commit in found if commit not in past]
        if gone or emptied:
            removal = gallery.removal(entry, gone, keep=emptied)
            gallery.remove(entry, removal)
            yield removal


def sweep(gallery: MilvusGallery, entry: Entry, before: float) -> int:
    """Finish what processes that died before then (seconds since 1970) have begun; returns how many rows went."""
    rows = 0
    where = f"kind == {JOURNAL}"
    fields = ["id", "created", "data"]
    for journal, (pseudonyms, _) in list(gallery.seal.opened(_pages(gallery, where, fields))):
        if journal["created"] >= before * 1e6:
            continue
        stored = gallery.stored(entry, pseudonyms, fresh="ALL")
        alive = {row[PSEUDONYM:] for row in gallery.commit_rows(pseudonyms, "ALL")}
        # A journal is written before its templates: one that belongs to a template seen above is seen now.
        for other, (_, enrolments) in list(gallery.seal.opened(_pages(gallery, where, fields))):
            alive.update(enrolments if other["id"] != journal["id"] else [])
        for space, table in entry.tables.items():
            left = [id for id, row in stored.items() if row["space"] == space and id.split(".")[0] not in alive]
            gallery.tables.delete(table, left)
            rows += len(left)
        gallery.settle(entry, pseudonyms)
        gallery.cross_out(journal["id"])
    if entry.moving_to is None and entry.ending is None:  # of a migration that has ended
        moved = [row["id"] for row in _pages(gallery, f"kind == {MOVED} and created < {int(before * 1e6)}", ["id"])]
        gallery.tables.delete(gallery.records, moved)
        rows += len(moved)
    return rows


def sweep_collections(tables: Tables, catalogue: Catalogue) -> None:
    """Drop those that no gallery names: of galleries or migrations never begun to the end, or not dropped to the end.

    Only old ones, since a collection is made before its gallery's row names it.
    """
    names = tables.names()
    # Read after the names: what was named by then is not dropped, however long reading takes.
    entries = catalogue.entries("ALL")
    galleries = {entry.id for entry in entries}
    named = {name for entry in entries for name in entry.tables.values()}
    oldest = (time.time() - SWEEP_SECONDS) * 1e6
    for name in names:
        gallery, _, table = name.removeprefix(f"{tables.prefix}_").partition("_")
        if not ID.fullmatch(gallery) or name in named:
            continue
        made = table if gallery in galleries else gallery
        if ID.fullmatch(made) and int(made[:16], 16) < oldest:
            tables.drop(name)


def _pages(gallery: MilvusGallery, where: str, fields: list[str]) -> Iterator[Row]:
    return gallery.tables.pages(gallery.records, where, fields, "ALL")
