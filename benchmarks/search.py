"""Exact search in memory beside faiss' IndexFlatIP: time per query, memory, and how long a store takes to start.

Run as: python benchmarks/search.py             (100,000 templates; about three minutes of one core, 600 MB)
        python benchmarks/search.py --large     (a million as well: 5 GB)

Templates are random unit vectors of 512 numbers, as float16 holds them; queries lie near one of them; ten hits each.
Both sides search on one core, in turns, so that what else the machine does hits both alike; at concurrency 8 and 32 as
many threads ask for one query at a time, which faiss answers one by one. Both must find the same. Memory is what one
process keeps for the index; start-up is SqliteStore opening a database: reading, decrypting, indexing. Writes
benchmarks/results/search.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.index.memory_index import MemoryIndex, Rows
from pkd.serving.galleries.sqlite.store import SqliteStore
from pkd.serving.galleries.store import Enrolment, NewTemplate, Space

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "search.json"
DIM, TOP = 512, 10
ROUNDS = 20
"""Short ones: a burst of other work on the machine then hits both sides."""
STARTED = 50_000
"""Templates of the database that is opened; with --large as many as are searched."""
Report = dict[str, Any]
Search = Callable[[np.ndarray], object]


def main() -> int:
    """Measure every size in a process of its own and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="a million templates as well")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        name, count = args.part
        print(json.dumps(PARTS[name](int(count))))
        return 0
    results: Report = json.loads(RESULT.read_text()) if RESULT.is_file() else {"sizes": {}}
    for count in (100_000, 1_000_000) if args.large else (100_000,):
        results["sizes"][str(count)] = _part("searches", count) | _part("memory", count)
    results["start"] = _part("start", max(map(int, results["sizes"])) if args.large else STARTED)
    RESULT.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))
    return 0


def searches(count: int) -> Report:
    """Time per query of both, alone, at once and filtered."""
    vectors = _vectors(count)
    index, flat = _indexed(vectors), faiss.IndexFlatIP(DIM)
    flat.add(vectors)
    random = np.random.default_rng(1)
    queries = vectors[random.integers(0, count, 64)] + 0.03 * random.standard_normal((64, DIM)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    for query in queries:
        (found,) = index.search("e", query[None], TOP, None)
        scores, places = flat.search(query[None], TOP)
        assert [int(hit.subject[1:]) for hit in found.hits] == places[0].tolist()
        assert np.allclose([hit.score for hit in found.hits], scores[0], atol=1e-5)
    measured: Report = {}
    each = max(4, 3_200_000 // count)
    for threads in (1, 8, 32):
        ways: dict[str, Search] = {
            "pkd": lambda query: index.search("e", query[None], TOP, None),
            "faiss": lambda query: flat.search(query[None], TOP),
        }
        measured[str(threads)] = _in_turns(ways, queries, threads, max(each, threads))
    filters: dict[str, Search] = {
        part: (lambda query, part=part: index.search("e", query[None], TOP, {part: "0"}))  # type: ignore[misc]
        for part in ("tenth", "hundredth")
    }
    measured["filtered"] = _in_turns(filters, queries, 1, each)
    return measured


def memory(count: int) -> Report:
    """Megabytes that the index keeps, vectors and all else."""
    before = _resident()
    index = MemoryIndex()
    for start in range(0, count, 8192):
        _add(index, start, _vectors(min(8192, count - start), seed=start))
    kept = _resident() - before
    assert len(index) == count
    return {"memory_mb": kept, "vectors_mb": count * DIM * 4 / 2**20}


def start(count: int) -> Report:
    """CPU microseconds per template of enrolling a database, and of opening it."""
    vectors, master, space = _vectors(count), MasterKey(bytes(32)), Space("space", DIM)
    with tempfile.TemporaryDirectory() as folder:
        with closing(SqliteStore(Path(folder), master)) as store:
            store.create("g", space, None, "benchmark")
            began = time.process_time()
            for first in range(0, count, 1000):
                batch = range(first, min(first + 1000, count))
                subjects = [Enrolment(f"subject {i:08d}", [NewTemplate("e", "space", vectors[i])]) for i in batch]
                store.enrol("g", subjects, "benchmark")
            enrolling = time.process_time() - began
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        began = time.process_time()
        with closing(SqliteStore(Path(folder), master)) as store:
            opening = time.process_time() - began
            assert store.search("g", "e", vectors[:1], 1)[0].searched == count
    us = 1e6 / count
    return {"templates": count, "enrol_us": enrolling * us, "open_us": opening * us, "disk_bytes": size / count}


PARTS: dict[str, Callable[[int], Report]] = {"searches": searches, "memory": memory, "start": start}


def table(results: Report) -> str:
    """Write the results as Markdown."""
    lines = [
        "Milliseconds; CPU is per query, p50 and p99 are what one who asks waits, on a machine that does other things, "
        "too. The ratio is of CPU.",
        "",
        "| templates | asking at once | pkd CPU | p50 | p99 | faiss CPU | p50 | p99 | pkd/faiss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for count, size in results["sizes"].items():
        for threads in ("1", "8", "32"):
            ours, theirs = size[threads]["pkd"], size[threads]["faiss"]
            cells = [f"{side[key]:.1f}" for side in (ours, theirs) for key in ("cpu_ms", "p50_ms", "p99_ms")]
            lines.append(
                f"| {int(count):,} | {threads} | {' | '.join(cells)} | {ours['cpu_ms'] / theirs['cpu_ms']:.2f}× |"
            )
    lines += ["", "| templates | filter leaves 1/10, CPU | 1/100, CPU | memory, MB | of it vectors |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for count, size in results["sizes"].items():
        tenth, hundredth = (size["filtered"][part]["cpu_ms"] for part in ("tenth", "hundredth"))
        lines.append(
            f"| {int(count):,} | {tenth:.1f} | {hundredth:.1f} | {size['memory_mb']:,.0f} | {size['vectors_mb']:,.0f} |"
        )
    start = results["start"]
    each = f"{start['disk_bytes']:,.0f} bytes each on disk"
    lines += [
        "",
        f"A database of {start['templates']:,} templates, one a subject: {each}, "
        f"{start['enrol_us']:.0f} µs CPU each to enrol a thousand at a time, {start['open_us']:.1f} µs each to open "
        f"(decrypt and index): {start['open_us'] * start['templates'] / 1e6:.1f} s of CPU for all of them.",
    ]
    return "\n".join(lines)


def _part(name: str, count: int) -> Report:
    command = [sys.executable, __file__, "--part", name, str(count)]
    # Set for the whole process: faiss.omp_set_num_threads holds for the thread that calls it alone, and an idle second
    # thread of OpenMP spins, which would count against faiss fourfold.
    alone = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    found: Report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=alone).stdout)
    return found


def _in_turns(ways: dict[str, Search], queries: np.ndarray, threads: int, each: int) -> Report:
    """CPU per query and waiting times of every way; they take turns, and the middle round counts for CPU."""
    waited: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            for name, search in ways.items():

                def ask(number: int, search: Search = search, name: str = name) -> None:
                    began = time.perf_counter()
                    search(queries[number % len(queries)])
                    waited[name].append(time.perf_counter() - began)

                ask(0)
                waited[name].pop()
                began = time.process_time()
                list(pool.map(ask, range(each)))
                cpu[name].append((time.process_time() - began) / each)
    return {
        name: {
            "cpu_ms": float(np.median(cpu[name])) * 1e3,
            "p50_ms": float(np.percentile(waited[name], 50)) * 1e3,
            "p99_ms": float(np.percentile(waited[name], 99)) * 1e3,
        }
        for name in ways
    }


def _vectors(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, DIM), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float16).astype(np.float32)


def _indexed(vectors: np.ndarray) -> MemoryIndex:
    index = MemoryIndex()
    for start in range(0, len(vectors), 8192):
        _add(index, start, vectors[start : start + 8192])
    return index


def _add(index: MemoryIndex, start: int, vectors: np.ndarray) -> None:
    """Subjects s0, s1 …, a tenth and a hundredth of which share an attribute."""
    numbers = np.arange(start, start + len(vectors))
    names = [f"s{number}" for number in numbers.tolist()]
    attributes = [{"tenth": str(i % 10), "hundredth": str(i)} for i in range(100)]
    index.add(Rows("e", numbers + 1, numbers + 1, names, attributes, numbers % 100, vectors))


def _resident() -> float:
    return float(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


if __name__ == "__main__":
    raise SystemExit(main())
