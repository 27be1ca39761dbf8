"""benchmarks/scale.py: arithmetic that can be followed, and no page where a figure is missing."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SEARCH = {
    "sizes": {"1000": {}, "100000": {"1": {"pkd": {"cpu_ms": 10.0}}, "memory_mb": 1024 * 1e5 / 2**20}},
    "start": {"disk_bytes": 2048},
}
ROUNDS = [{"crops/pkd-serve/8": {"cpu_ms": ms}, "photographs/pkd-serve/8": {"cpu_ms": 4 * ms}} for ms in (5, 6, 50)]


@pytest.fixture(scope="module")
def scale() -> Any:
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks/scale.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["scale"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(tmp_path: Path) -> Any:
    (tmp_path / "search.json").write_text(json.dumps(SEARCH))
    (tmp_path / "serving_cost.json").write_text(json.dumps({"rounds": ROUNDS}))
    return tmp_path


def test_figures_are_medians_and_per_million(scale: Any, results: Any) -> None:
    assert scale.figures(results) == {
        "bytes_per_template": 1024, "disk_per_template": 2048, "search_ms": 100, "crop_ms": 6, "photograph_ms": 24,
    }  # fmt: skip


def test_the_page_multiplies_out(scale: Any, results: Any) -> None:
    text = scale.page(scale.figures(results))
    # 100 million: 1e8 × 1 KiB = 95 GiB on two machines of 0.6 × 64 GiB … three, twice; a search 1e8/1e6 × 100 ms = 10 s
    assert math.ceil(95.4 / 38.4) == 3
    # 10 cores at 1/s fit beside that; 1,000 at 100/s and 10,000 at 1,000/s need 1/9.6 of that in machines
    assert "| 100 million | 95 GiB | 190 GiB | 3 | 10 s | 6 | 105 | 1,042 |" in text
    assert "| 1 billion | 950 GiB | 1,900 GiB | 25 | 100 s | 50 | 1,042 | 10,417 |" in text
    assert "| photograph | 24 | 2 | 2 | 3 |" in text


@pytest.mark.parametrize("missing", ["sizes", "start"])
def test_a_missing_figure_is_named_and_no_page_is_written(
    scale: Any, results: Any, missing: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "search.json").write_text(json.dumps({k: v for k, v in SEARCH.items() if k != missing}))
    monkeypatch.setattr(scale, "RESULTS", results)
    monkeypatch.setattr(scale, "PAGE", results / "scale.md")
    assert scale.main() == 1
    assert "from search.json: run python benchmarks/search.py" in capsys.readouterr().err
    assert not (results / "scale.md").exists()


@pytest.mark.parametrize("value", [0, -1, None, "fast", float("nan")])
def test_a_figure_that_cannot_be_is_missing(scale: Any, results: Any, value: Any) -> None:
    (results / "search.json").write_text(json.dumps({**SEARCH, "start": {"disk_bytes": value}}))
    with pytest.raises(scale.Missing, match=r"^disk_per_template"):
        scale.figures(results)


def test_all_that_is_missing_is_named_at_once(scale: Any, tmp_path: Path) -> None:
    with pytest.raises(scale.Missing) as missing:
        scale.figures(tmp_path)
    assert all(name in str(missing.value) for name in scale.FIGURES)
