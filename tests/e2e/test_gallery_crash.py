"""Processes killed while they enrol lose nothing they acknowledged. The long form is tests/soak/store_crash.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[1] / "soak"


def test_kill_9_under_load_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SOAK))
    import store_crash

    try:
        seen = store_crash.crash(tmp_path / "store", rounds=5, processes=1, seed=0)
        assert seen["wrong"] == []
        assert seen["enrolled"], "nothing was enrolled before the kill: the test proves nothing"
        # The check itself must be able to fail.
        assert store_crash.lost(tmp_path / "store", {7}, set(), set()) == ["subject 7 was enrolled and is lost"]
    finally:
        del sys.modules["store_crash"]
