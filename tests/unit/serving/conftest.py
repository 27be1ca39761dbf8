"""Bundles of small encoders, and a real server on them: what most tests of serving ask for."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.support import gallery_fixtures, serving_bundles


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> serving_bundles.Family:
    """Bundles of a teacher and its students with certificates."""
    return serving_bundles.family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> gallery_fixtures.Fleet:
    """Bundles of a teacher, two generations of its students and the next teacher."""
    return gallery_fixtures.fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def client(fleet: gallery_fixtures.Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Run a server of the fleet on an empty store; the tests of one module share it."""
    with gallery_fixtures.serving(fleet, tmp_path_factory.mktemp("store")) as client:
        yield client
