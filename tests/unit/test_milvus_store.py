"""MilvusStore keeps the promises of a GalleryStore, against a real Milvus server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gallery_conformance import Conformance, Open
from milvus_server import MilvusServer

from pkd.serving.galleries.milvus_store import MilvusStore
from pkd.serving.galleries.milvus_tables import Tables
from pkd.serving.galleries.vault import MasterKey

MASTER = MasterKey(bytes(range(32)))


@pytest.fixture
def opened(milvus_server: MilvusServer, tmp_path: Path) -> Iterator[Open]:
    """Opens stores on one empty set of galleries."""
    stores: list[MilvusStore] = []

    def open() -> MilvusStore:
        stores.append(MilvusStore(Tables(milvus_server.uri), tmp_path / "audit.db", MASTER))
        return stores[-1]

    first = open()
    for gallery in first.list():
        first.delete(gallery.name, "the test before")
    yield open
    for store in stores:
        store.close()


class TestMilvusStore(Conformance):
    """Every promise, kept by Milvus, but for those that it says it cannot keep."""

    erased = frozenset({"rows", "index"})
    ascending = False
    of_one_moment = False

    @pytest.fixture
    def opened(self, opened: Open) -> Open:
        return opened
