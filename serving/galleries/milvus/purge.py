"""Purge: what was deleted leaves Milvus' files, and the audit log says when it had.

Milvus marks rows as deleted and goes on holding them until it writes their segment anew. So galleries with a deletion
on record are looked at from time to time: where Milvus holds more rows than it gives, it is asked to write them anew;
where it does not, that is recorded. The files from before it removes later, by its own settings (docs/milvus.md).
"""

from __future__ import annotations

import contextlib
import logging
import time

from pkd.serving.core.errors import ServingError
from pkd.serving.galleries.audit_file import AuditFile
from pkd.serving.galleries.milvus.catalogue import Catalogue
from pkd.serving.galleries.milvus.client import NoTable, Tables
from pkd.serving.galleries.milvus.collection import records_of
from pkd.serving.galleries.milvus.records import JOURNAL, Entry

logger = logging.getLogger(__name__)
STOPPED_SECONDS = 60.0
"""How old a journal is that most likely nobody will cross out but a sweep."""


def purge(tables: Tables, catalogue: Catalogue, log: AuditFile) -> None:
    """Look at every gallery that this machine's log has deletions of. What Milvus cannot do now is tried next time."""
    held: dict[str, bool] = {}
    for gallery, sequence in log.unpurged().items():
        try:
            entry = catalogue.find(gallery, "ALL")
            # A deleted gallery's own collections are dropped; its wrapped key was a row of the catalogue.
            names = [records_of(tables, entry.id), *entry.tables.values()] if entry else []
            if entry and _under_way(tables, entry):
                continue
            for name in {catalogue.table, *names} - held.keys():
                held[name] = tables.holds_deleted(name)
        except NoTable:  # it is being deleted at this moment
            continue
        except ServingError as error:
            logger.warning("Milvus: whether deleted rows have left its files is looked at later: %s", error)
            continue
        if not any(held[name] for name in (catalogue.table, *names)):
            log.purged(gallery, sequence)
    # Not before all are flushed: 2.3 compacts every collection at each request, and leaves out a segment that it is
    # busy with, maybe without the newest deletions.
    for name in (name for name, holds in held.items() if holds):
        with contextlib.suppress(NoTable, ServingError):
            tables.compact(name)


def _under_way(tables: Tables, entry: Entry) -> bool:
    """Whether a change stopped halfway: the rows that a sweep will delete are given still."""
    where = f"kind == {JOURNAL} and created < {int((time.time() - STOPPED_SECONDS) * 1e6)}"
    return tables.count(records_of(tables, entry.id), where, "ALL") > 0
