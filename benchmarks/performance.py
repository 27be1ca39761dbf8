"""docs/performance.md, assembled from what the other benchmarks measured.

Run as: python benchmarks/performance.py

Each benchmark writes benchmarks/results/<name>.json and renders it with its own ``table(results) -> str``; this script
measures nothing. A result that is missing is named with the command that makes it.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"

PARTS = {
    "frozen_head": "Frozen head",
    "ten_million": "One step with ten million identities",
    "two_ranks": "Two ranks, half of the head each",
    "training_speed": "Training speed",
    "image_store": "Ten million images",
    "backbones": "Backbones",
    "cross_pairs": "All pairs of 100,000 images",
    "template_pairs": "The pair list of IJB-C",
    "evaluation_cost": "A whole evaluation of 100,000 images",
    "coverage": "How often intervals hold the truth",
    "halvings": "Do thresholds carry over to other people",
    "targets": "What each target costs and loses",
    "serving_cost": "What serving costs",
    "browser": "The browser as a device",
    "method_table": "Methods at equal budget",
    "search": "Searching a gallery in memory",
    "inheritance": "A teacher's own classifier against heads made from its embeddings",
}
"""Script and result in benchmarks/ → heading."""

OPENING = """\
# Performance

Here you can look up what each part of pkd costs and what it gains, against a named alternative. The script under
each heading measures it again; `python benchmarks/performance.py` assembles this page from benchmarks/results/.
Ratios are within one run on one machine. Times are CPU time, medians where repeated. Accuracy is measured on
research-only photographs that are not part of the project."""


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(RESULTS), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


def page(results: Path) -> str:
    """Write the page as Markdown, from the JSON files in ``results``."""
    sections = [f"## {heading}\n\n{section(results, name)}" for name, heading in PARTS.items()]
    return "\n\n".join([OPENING, *sections]) + "\n"


def section(results: Path, name: str) -> str:
    """One benchmark's table and the command that measures it."""
    command = f"`python benchmarks/{name}.py`"
    file = results / f"{name}.json"
    if not file.is_file():
        return f"Not measured yet: {command} makes this table."
    table: str = importlib.import_module(name).table(json.loads(file.read_text(encoding="utf-8")))
    return f"Measured by {command}.\n\n{table.strip()}"


if __name__ == "__main__":
    sys.exit(main())
