"""Fixtures shared by all tests. Where the real data is missing, tests marked ``shared`` are skipped and say so."""

from __future__ import annotations

import os

# Two workers with two threads each spend most of their time waiting for each other. Read when numpy and torch load.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import hypothesis
import pytest

from tests.support.milvus_server import MilvusServer, missing
from tests.support.real_data import HAS_SHARED, NO_SHARED, SHARED

os.environ["PKD_PORT"] = "0"  # somebody on this machine may listen on 8000
# A loaded machine is no failure, and every run tries the same examples: what fails, fails again.
hypothesis.settings.register_profile(
    "pkd", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("pkd")
cv2.setNumThreads(1)  # tests run beside each other; OpenCV's own pool would only fight with them

MILVUS = pytest.StashKey[MilvusServer]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``make soak`` passes this."""
    parser.addoption("--soak", action="store_true", help="run tests marked soak in their long form")


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    """Say whether a test marked ``soak`` is to run in its long form."""
    return bool(request.config.getoption("--soak"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need Milvus, and skip ``shared`` ones, once here, so that none of them has to."""
    for item in items:
        if "milvus_server" in getattr(item, "fixturenames", ()):
            item.add_marker("milvus")
        if not HAS_SHARED and item.get_closest_marker("shared"):
            item.add_marker(pytest.mark.skip(reason=NO_SHARED))
    items.sort(key=lambda item: rank(unit_of_work(item.nodeid)))


def rank(unit: str) -> int:
    """Say when a unit of work begins: what takes minutes comes first, so that nobody waits for it at the end.

    Milvus' tests wait more than they compute; of the others those that run commands as processes take longest.
    """
    return 0 if unit == "milvus" else 1 if unit.startswith("tests/e2e/") else 2 if "/unit/" not in unit else 3


def unit_of_work(nodeid: str) -> str:
    """Name what stays on one worker: the tests of a file, and all that need Milvus, so that one server serves them."""
    file = nodeid.split("::", 1)[0]
    return "milvus" if "milvus" in file else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Start half as many workers again as there are cores: a third of the time is waiting for processes and servers.

    By ``-n logical`` as many as cores: the fast tests hardly wait, and each worker imports everything anew.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if config.option.numprocesses == "logical" else (3 * cores + 1) // 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute units of work, by ``--dist loadfile``."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return unit_of_work(nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Stop the Milvus of a worker after its last test: idle, it would use a twentieth of a core to the end."""
    yield
    over = nextitem is None or unit_of_work(nextitem.nodeid) != "milvus"
    if over and "PYTEST_XDIST_WORKER" in os.environ and (server := item.session.stash.get(MILVUS, None)):
        server.stop()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the real ``faces/`` and ``models/``. Mark the test ``shared``, too."""
    if not HAS_SHARED:
        pytest.skip(NO_SHARED)
    return SHARED


@pytest.fixture(scope="session")
def milvus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    """Hold a Milvus that is not started yet. Skips with a reason where none can be."""
    reason = missing()
    if reason:
        pytest.skip(f"no Milvus server: {reason}")
    server = request.session.stash[MILVUS] = MilvusServer(tmp_path_factory.mktemp("milvus"))
    yield server
    server.close()


@pytest.fixture
def milvus_server(milvus: MilvusServer) -> MilvusServer:
    """Start Milvus where it does not run; it may hold what other tests left."""
    if not milvus.pid:
        milvus.start()
    return milvus
