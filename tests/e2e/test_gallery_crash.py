"""Processes killed while they enrol lose nothing they acknowledged; in the long form fifty times, two at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[1] / "soak"


@pytest.mark.soak
def test_kill_9_under_load_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soak: bool) -> None:
    monkeypatch.syspath_prepend(str(SOAK))
    import store_crash

    try:
        seen = store_crash.crash(tmp_path / "store", rounds=50 if soak else 5, processes=2 if soak else 1, seed=0)
        assert seen["wrong"] == []
        assert seen["enrolled"], "nothing was enrolled before the kill: the test proves nothing"
        # The check itself must be able to fail.
        assert store_crash.lost(tmp_path / "store", {7}, set(), set()) == ["subject 7 was enrolled and is lost"]
    finally:
        del sys.modules["store_crash"]
