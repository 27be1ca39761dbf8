"""Stores on the Milvus server of the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pkd.serving.galleries.audit_file import AuditFile
from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.milvus.client import Tables
from pkd.serving.galleries.milvus.store import MilvusStore
from tests.support.milvus_server import MilvusServer

Open = Callable[[], MilvusStore]
MASTER = MasterKey(bytes(range(32)))


@pytest.fixture
def milvus_opened(milvus_server: MilvusServer, tmp_path: Path) -> Iterator[Open]:
    """Opens stores on one empty set of galleries."""
    stores: list[MilvusStore] = []

    def open() -> MilvusStore:
        stores.append(MilvusStore(Tables(milvus_server.uri), AuditFile(tmp_path / "audit.db"), MASTER))
        return stores[-1]

    first = open()
    for gallery in first._catalogue.entries("ALL"):
        first.delete(gallery.name, "the test before")
    yield open
    for store in stores:
        store.close()


@pytest.fixture
def milvus_emptied(milvus_server: MilvusServer) -> Iterator[MilvusServer]:
    """The server without any collection, before and after: for galleries under other keys than MASTER."""
    _drop_all(milvus_server)
    yield milvus_server
    _drop_all(milvus_server)


def _drop_all(server: MilvusServer) -> None:
    with closing(Tables(server.uri)) as tables:
        for name in tables.names():
            tables.drop(name)
