"""SqliteStore keeps the promises of a GalleryStore."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.sqlite.database import NAME
from pkd.serving.galleries.sqlite.store import SqliteStore
from pkd.serving.galleries.store import NOTHING_MAPPED
from tests.support.gallery_conformance import Conformance
from tests.support.gallery_examples import ALICE, OLD, Open

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


def test_a_database_from_before_mapped_templates_is_taken(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path, MASTER)) as store:
        store.create("staff", OLD, None, ALICE)
    with closing(sqlite3.connect(tmp_path / NAME)) as db:
        db.execute("DROP TABLE mappings")
        db.commit()
    with closing(SqliteStore(tmp_path, MASTER)) as store:
        assert store.get("staff").mapping == NOTHING_MAPPED
        store.set_mapping("staff", lambda state: state.model_copy(update={"staged": ("a",)}), ALICE)
        assert store.get("staff").mapping.staged == ("a",)
