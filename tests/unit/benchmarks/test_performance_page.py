"""docs/performance.md is what benchmarks/performance.py makes of benchmarks/results/, and of missing results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def performance(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Load the script as a module, beside the benchmarks it imports."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import performance

    yield performance
    for name in set(sys.modules) - before:
        if (ROOT / "benchmarks" / f"{name}.py").is_file():
            del sys.modules[name]


def test_the_page_is_up_to_date(performance: ModuleType) -> None:
    made = performance.page(ROOT / "benchmarks" / "results")
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8") == made, "python benchmarks/performance.py"


def test_every_part_has_its_script(performance: ModuleType) -> None:
    missing = [name for name in performance.PARTS if not (ROOT / "benchmarks" / f"{name}.py").is_file()]
    assert not missing


def test_a_missing_result_names_the_command_that_makes_it(performance: ModuleType, tmp_path: Path) -> None:
    page = performance.page(tmp_path)
    for name, heading in performance.PARTS.items():
        assert f"## {heading}\n\nNot measured yet: `python benchmarks/{name}.py` makes this table." in page
