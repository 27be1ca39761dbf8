"""SqliteStore keeps the promises of a GalleryStore."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.sqlite.store import SqliteStore
from tests.support.gallery_conformance import Conformance
from tests.support.gallery_examples import Open

MASTER = MasterKey(bytes(range(32)))


class TestSqliteStore(Conformance):
    """Every promise, kept by SQLite."""

    @pytest.fixture
    def opened(self, tmp_path: Path) -> Iterator[Open]:
        stores: list[SqliteStore] = []

        def open() -> SqliteStore:
            stores.append(SqliteStore(tmp_path / "store", MASTER))
            return stores[-1]

        yield open
        for store in stores:
            store.close()
