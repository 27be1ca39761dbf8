"""Every pair of 100,000 query and 100,000 gallery embeddings: time against the bare matrix product, and memory.

Run as: python benchmarks/cross_pairs.py                 (about 10 minutes of one core)
        python benchmarks/cross_pairs.py --images 20000

Each of the two is measured in a process of its own, one thread, in CPU time: ``score_pairs`` with its histogram of all
pairs, all genuine pairs and the kept impostors; and the product alone, in tiles of the same size into one buffer. They
take turns, so that both see the same machine; memory is the peak of the resident set. Writes
benchmarks/results/cross_pairs.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from pkd.toolkit.evaluation.metrics.pair_scores import TILE, score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Floats, Pairing

RESULTS = Path(__file__).resolve().parent / "results" / "cross_pairs.json"
DIM, PER_PERSON = 512, 5


def main() -> int:
    """Measure both in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=("pkd", "product"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.images)))
        return 0
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    turns: list[dict[str, Any]] = []
    for turn in range(args.turns):
        both = {}
        for only in ("product", "pkd"):
            command = [sys.executable, __file__, "--images", str(args.images), "--only", only]
            both[only] = json.loads(subprocess.run(command, env=one_thread, check=True, stdout=subprocess.PIPE).stdout)
        turns.append(both)
        print(f"turn {turn + 1}: {both}", flush=True)
    found = {"images": args.images, "dim": DIM, "turns": turns}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    return 0


def measure(what: str, images: int) -> dict[str, float]:
    """CPU seconds and peak memory of one of the two."""
    random = np.random.default_rng(0)
    people = np.sort(random.integers(0, images // PER_PERSON, images))
    query, gallery = _units(random, images), _units(random, images)
    gallery += query
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    files = np.arange(images)
    before = time.process_time()
    if what == "pkd":
        kept = len(score_pairs(Pairing(people, people, files, files, images // PER_PERSON), query, gallery).impostor)
    else:
        kept = 0
        buffer = np.empty((TILE, TILE), np.float32)
        for top in range(0, images, TILE):
            for left in range(0, images, TILE):
                rows, columns = query[top : top + TILE], gallery[left : left + TILE]
                np.matmul(rows, columns.T, out=buffer[: len(rows), : len(columns)])
    seconds = time.process_time() - before
    return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "kept": kept}


def _units(random: np.random.Generator, count: int) -> Floats:
    vectors = random.standard_normal((count, DIM), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    turns = found["turns"]
    ratio = statistics.median(t["pkd"]["seconds"] / t["product"]["seconds"] for t in turns)
    each = found["images"] ** 2
    lines = [
        f"{found['images']:,} × {found['images']:,} pairs of {found['dim']} numbers, one thread, median of "
        f"{len(turns)} turns. Ratio to the product: **{ratio:.2f}**.",
        "",
        "| | CPU seconds | ns a pair | peak memory |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, key in (("matrix product alone", "product"), ("all pairs scored, counted, tail kept", "pkd")):
        seconds = statistics.median(t[key]["seconds"] for t in turns)
        memory = max(t[key]["peak_mb"] for t in turns)
        lines.append(f"| {name} | {seconds:,.0f} | {1e9 * seconds / each:.1f} | {memory:,.0f} MB |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
