"""docs/scale.md: what large galleries and many requests cost, multiplied out from what other benchmarks measured.

Run as: python benchmarks/scale.py

It measures nothing, and guesses nothing either: a figure that is missing is named with the benchmark that makes it, and
no page is written.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "scale.md"

CORES, MEMORY, BUSY, COPIES = 16, 64 * 2**30, 0.6, 2
"""A machine: cores, bytes of memory; the share of either that is planned with; copies of all, so one may fail."""
TEMPLATES = {"1 million": 10**6, "100 million": 10**8, "1 billion": 10**9}
RATES = (1, 100, 1000)
"""Requests a second."""


@dataclass(frozen=True)
class Figure:
    """One measured number: where it lies and what makes it."""

    file: str
    script: str
    says: str
    read: Callable[[Any], float]


def _per_round(job: str) -> Callable[[Any], float]:
    return lambda results: statistics.median(one[job]["cpu_ms"] for one in results["rounds"])


def _largest(results: Any) -> tuple[int, Any]:
    """Templates, and what was measured with the most of them."""
    count = max(map(int, results["sizes"]))
    return count, results["sizes"][str(count)]


FIGURES: Mapping[str, Figure] = {
    "bytes_per_template": Figure(
        "search.json",
        "search.py",
        "memory of a template in a process that searches, bytes",
        lambda r: _largest(r)[1]["memory_mb"] * 2**20 / _largest(r)[0],
    ),
    "disk_per_template": Figure(
        "search.json", "search.py", "disk of a template in SQLite, bytes", lambda r: r["start"]["disk_bytes"]
    ),
    "search_ms": Figure(
        "search.json",
        "search.py",
        "CPU of one exact search alone, ms per million templates",
        lambda r: _largest(r)[1]["1"]["pkd"]["cpu_ms"] / _largest(r)[0] * 1e6,
    ),
    "crop_ms": Figure(
        "serving_cost.json",
        "serving_cost.py",
        "CPU of embedding an aligned crop over HTTP, 8 clients, ms",
        _per_round("crops/pkd-serve/8"),
    ),
    "photograph_ms": Figure(
        "serving_cost.json",
        "serving_cost.py",
        "CPU of detecting and embedding a photograph over HTTP, 8 clients, ms",
        _per_round("photographs/pkd-serve/8"),
    ),
}
Figures = Mapping[str, float]


class Missing(Exception):
    """A figure that no result holds."""


def main() -> int:
    """Write the page, or say which figures are missing."""
    try:
        text = page(figures(RESULTS))
    except Missing as missing:
        print(f"scale: {missing}", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


def figures(results: Path) -> Figures:
    """Every figure. Raises Missing with the names of all that are not there."""
    found, missing = {}, []
    for name, figure in FIGURES.items():
        try:
            value = float(figure.read(json.loads((results / figure.file).read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, statistics.StatisticsError):
            value = math.nan
        if math.isfinite(value) and value > 0:
            found[name] = value
        else:
            missing.append(f"{name} ({figure.says}) from {figure.file}: run python benchmarks/{figure.script}")
    if missing:
        raise Missing("; ".join(missing))
    return found


def page(measured: Figures) -> str:
    """Write the page as Markdown."""
    return "\n\n".join([OPENING, _inputs(measured), _galleries(measured), _requests(measured), CLOSING]) + "\n"


def _inputs(measured: Figures) -> str:
    rows = [
        f"| {FIGURES[name].says} | {_round(value)} | `{FIGURES[name].script}` |" for name, value in measured.items()
    ]
    return "\n".join(["## What was measured", "", "| figure | value | by benchmarks/ |", "| --- | --- | --- |", *rows])


def _galleries(measured: Figures) -> str:
    rows = []
    for name, count in TEMPLATES.items():
        memory, seconds = count * measured["bytes_per_template"], count / 1e6 * measured["search_ms"] / 1e3
        shards = math.ceil(memory / (MEMORY * BUSY))
        machines = [machines_for(memory, seconds * rate) for rate in RATES]
        cells = [
            name,
            _bytes(memory),
            _bytes(count * measured["disk_per_template"]),
            str(shards),
            f"{_round(seconds)} s",
        ]
        rows.append(f"| {' | '.join([*cells, *(f'{one:,}' for one in machines)])} |")
    heads = ["templates", "memory", "disk", "shards", "CPU of a search", *(f"machines, {rate:,}/s" for rate in RATES)]
    return "\n".join(
        ["## Galleries, searched exactly", "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *rows]
    )


def _requests(measured: Figures) -> str:
    rows = [
        f"| {name} | {_round(measured[key])} | "
        + " | ".join(f"{machines_for(0, rate * measured[key] / 1e3):,}" for rate in RATES)
        + " |"
        for name, key in (("aligned crop", "crop_ms"), ("photograph", "photograph_ms"))
    ]
    heads = ["what is sent", "CPU, ms", *(f"machines, {rate:,}/s" for rate in RATES)]
    return "\n".join(["## Embedding", "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *rows])


def machines_for(memory: float, cores: float) -> int:
    """Machines for ``memory`` bytes of templates and ``cores`` cores' work, in as many copies as are kept.

    Copies share the requests: work is done once, memory is held in each. One copy takes whole machines.
    """
    held = math.ceil(memory / (MEMORY * BUSY)) * COPIES
    return max(held, math.ceil(cores / (CORES * BUSY)), COPIES)


def _bytes(count: float) -> str:
    return f"{_round(count / 2**30)} GiB"


def _round(value: float) -> str:
    """Two significant digits: the factors behind a plan are not known better."""
    if value == 0:
        return "0"
    digits = 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(digits, 0)}f}"


OPENING = f"""\
# Scale

```
python benchmarks/search.py --large && python benchmarks/serving_cost.py    # measure your machine: an hour
python benchmarks/scale.py                                                  # write this page
```

Plan machines for large galleries and many users by the tables below, or by those that these commands write for yours.
They multiply out what benchmarks measured on one machine ([performance.md](performance.md) shows the same runs).
Nothing of this size was ever run.

A machine is taken to have {CORES} cores as fast as the measured one and {MEMORY // 2**30} GiB; {BUSY:.0%} of either is
planned with. Everything is held in {COPIES} copies, which share the requests. CPU time is taken to grow in proportion
to templates and requests, memory bandwidth not to run out, and no network to matter."""

CLOSING = """\
## What follows

- One `pkd-serve` with SQLite holds every template of its galleries in each worker's memory. It is made for what one
  machine holds and searches in time; beyond, the galleries go to Milvus, whose shards each hold a part
  (`--milvus-shards`).
- An exact search reads every template. Where the table asks for more machines than are sensible, search fewer
  templates: a gallery per site, a filter by attribute, a claimed identity that is verified (one comparison). An
  approximate index makes searches cheaper and misses some: a miss is a false non-match that no certificate counted, so
  measure it before it is used.
- Thresholds move with size. At a fixed false positive rate a gallery ten times as large needs a false match rate a
  tenth as high, and what an evaluation resolves ends somewhere (docs/evidence.md).
- Embedding is cheap beside searching, holds no state, and goes on as many machines as there are."""


if __name__ == "__main__":
    sys.exit(main())
