"""Results are replaced as a whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkd.toolkit.core.results_folder import replaced


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_results_of_before_go_and_other_files_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replaced(out, ["*.json", "parts/*.txt"]) as new:
        (new / "a.json").write_text("1")
        (new / "parts").mkdir()
        (new / "parts/x.txt").write_text("1")
    (out / "notes.md").write_text("mine")
    with replaced(out, ["*.json", "parts/*.txt"]) as new:
        (new / "b.json").write_text("2")
    assert contents(out) == {"b.json": "2", "notes.md": "mine"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_all_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    with replaced(tmp_path, ["*.json"]) as new:
        (new / "a.json").write_text("1")
    with pytest.raises(error), replaced(tmp_path, ["*.json"]) as new:
        (new / "a.json").write_text("2")
        (new / "b.json").write_text("2")
        raise error
    assert contents(tmp_path) == {"a.json": "1"}
