"""Stores on the Milvus server of the tests, and what looks beside them at what Milvus holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import pytest

from pkd.serving.galleries.audit import AuditFile
from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.milvus.catalogue import Catalogue
from pkd.serving.galleries.milvus.client import MilvusConnection, Row
from pkd.serving.galleries.milvus.gallery import MilvusGallery
from pkd.serving.galleries.milvus.records import COMMIT, JOURNAL, MOVED, SUBJECT, GalleryRow
from pkd.serving.galleries.milvus.store import MilvusOptions, MilvusStore
from tests.support.milvus_server import MilvusServer

MASTER = MasterKey(bytes(range(32)))
PATIENCE = 60.0
"""Seconds that a call may take on a busy machine."""
STALE_SECONDS = 0.1
"""How old another store's write may be and still be missed: the tests' server brings its nodes up to date sooner."""
SWEEPING = MilvusOptions(sweep_seconds=-60.0, stopped_seconds=-60.0)
"""Takes everybody else for dead."""
Hook = Callable[[str, str, Sequence[Any]], None]
"""Called with an operation, a collection, and rows or keys."""


class Open(Protocol):
    """Opens a store on one set of galleries."""

    def __call__(self, options: MilvusOptions = ..., connection: MilvusConnection | None = None) -> MilvusStore: ...


class HookedConnection(MilvusConnection):
    """Calls ``before`` and ``after`` around everything that changes Milvus; they may raise, or change it, too."""

    before: Hook | None = None
    after: Hook | None = None

    def insert(self, name: str, rows: Sequence[Row]) -> None:
        self._around("insert", name, rows, lambda: super(HookedConnection, self).insert(name, rows))

    def upsert(self, name: str, rows: Sequence[Row]) -> None:
        self._around("upsert", name, rows, lambda: super(HookedConnection, self).upsert(name, rows))

    def delete(self, name: str, keys: Sequence[str]) -> None:
        self._around("delete", name, keys, lambda: super(HookedConnection, self).delete(name, keys))

    def create(self, name: str, *args: Any, **more: Any) -> None:
        self._around("create", name, (), lambda: super(HookedConnection, self).create(name, *args, **more))

    def drop(self, name: str) -> None:
        self._around("drop", name, (), lambda: super(HookedConnection, self).drop(name))

    def _around(self, operation: str, name: str, rows: Sequence[Any], change: Callable[[], None]) -> None:
        if self.before:
            self.before(operation, name, rows)
        change()
        if self.after:
            self.after(operation, name, rows)


class Backdoor:
    """Who has the master key, and looks at and changes rows beside every store."""

    def __init__(self, server: MilvusServer) -> None:
        self.connection = MilvusConnection(server.uri, timeout=PATIENCE)
        self.catalogue = Catalogue(self.connection, row_seconds=0)

    def row(self, name: str = "staff") -> GalleryRow:
        return self.catalogue.row(name, "strong")

    def gallery(self, name: str = "staff") -> MilvusGallery:
        row = self.row(name)
        return MilvusGallery(self.connection, row.id, MASTER.gallery(name, row.wrapped_key))

    def pseudonym(self, subject: str) -> str:
        return self.gallery().cipher.subject(subject)

    def count(self, kind: int, name: str = "staff") -> int:
        """How many records of a kind there are."""
        return self.connection.count(self.gallery(name).records, f"kind == {kind}", "strong")

    def templates(self, name: str = "staff") -> int:
        tables = self.row(name).tables.values()
        return sum(self.connection.count(table, 'id > ""', "strong") for table in tables)

    def left(self) -> dict[str, int]:
        """How many rows Milvus has of each kind."""
        kinds = {"journals": JOURNAL, "commits": COMMIT, "subjects": SUBJECT}
        return {**{name: self.count(kind) for name, kind in kinds.items()}, "templates": self.templates()}

    def moved(self) -> int:
        return self.count(MOVED)

    def empty(self) -> None:
        """Drop every gallery's collections and forget the galleries, whoever's keys they are under."""
        for row in self.catalogue.rows("strong"):
            self.catalogue.remove(row)
        for name in self.connection.names():
            if name != self.catalogue.table:
                self.connection.drop(name)

    def close(self) -> None:
        self.connection.close()


@pytest.fixture
def backdoor(milvus_server: MilvusServer) -> Iterator[Backdoor]:
    """Beside all stores; the server has no gallery at first."""
    with closing(Backdoor(milvus_server)) as backdoor:
        backdoor.empty()
        yield backdoor


@pytest.fixture
def connect(milvus_server: MilvusServer) -> Callable[[], HookedConnection]:
    """Make connections with hooks."""
    return lambda: HookedConnection(milvus_server.uri, timeout=PATIENCE, stale_seconds=STALE_SECONDS)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AuditFile]:
    """Make the audit log that all stores of ``milvus_opened`` write."""
    with closing(AuditFile(tmp_path / "audit.db")) as log:
        yield log


@pytest.fixture
def milvus_opened(backdoor: Backdoor, connect: Callable[[], HookedConnection], log: AuditFile) -> Iterator[Open]:
    """Open stores on one set of galleries, empty at first."""
    stores: list[MilvusStore] = []

    def open(options: MilvusOptions = MilvusOptions(), connection: MilvusConnection | None = None) -> MilvusStore:  # noqa: B008
        stores.append(MilvusStore(connection or connect(), AuditFile(log.path), MASTER, options))
        return stores[-1]

    yield open
    for store in stores:
        store.close()
