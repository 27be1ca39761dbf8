"""MilvusStore keeps the promises of a GalleryStore, against a real Milvus server."""

from __future__ import annotations

import pytest

from tests.support.gallery_conformance import Conformance
from tests.support.gallery_examples import Open


class TestMilvusStore(Conformance):
    """Every promise, kept by Milvus, but for those that it says it cannot keep."""

    erased = frozenset({"rows", "index"})
    ascending = False
    of_one_moment = False

    @pytest.fixture
    def opened(self, milvus_opened: Open) -> Open:
        return milvus_opened
