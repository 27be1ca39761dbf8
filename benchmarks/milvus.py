"""Galleries in Milvus: how fast they take templates, and a search of 100,000 beside one in SQLite's memory index.

Run as: python benchmarks/milvus.py                    (about 10 minutes; starts a Milvus 2.3 of its own, see tests/)
        python benchmarks/milvus.py --templates 5000

Random unit vectors of 512 numbers, one a subject, one query at a time, top 10, Milvus' FLAT index. The first answers
are checked against a plain product. Wall-clock time as a client sees it; server and client share the machine, and the
baseline is SqliteStore in the same run. Writes benchmarks/results/milvus.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pkd.serving.galleries.audit import AuditFile
from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.milvus.client import MilvusConnection
from pkd.serving.galleries.milvus.store import MilvusStore
from pkd.serving.galleries.sqlite.store import SqliteStore
from pkd.serving.galleries.store import Enrolled, Enrolment, GalleryStore, NewTemplate, Space
from tests.support.milvus_server import MilvusServer, missing

RESULTS = Path(__file__).resolve().parent / "results" / "milvus.json"
DIM, ENCODER, SPACE = 512, "teacher@sha256:a", Space("teacher@sha256:a", 512)
REQUEST, THREADS, QUERIES, TOP_K = 256, 8, 50, 10
"""Enrolments a request; clients that enrol at once; searches timed; subjects asked for."""


def main() -> int:
    """Measure both stores one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=int, default=100_000)
    args = parser.parse_args()
    reason = missing()
    if reason:
        print(f"No Milvus server: {reason}", file=sys.stderr)
        return 3
    random = np.random.default_rng(0)
    vectors = random.standard_normal((args.templates, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    master = MasterKey(os.urandom(32))
    with tempfile.TemporaryDirectory() as folder:
        sqlite = SqliteStore(Path(folder) / "sqlite", master)
        baseline = measure(sqlite, vectors)
        sqlite.close()
        server = MilvusServer(Path(folder) / "milvus")
        started = time.perf_counter()
        server.start()
        start_seconds = time.perf_counter() - started
        try:
            milvus = MilvusStore(MilvusConnection(server.uri, timeout=60), AuditFile(Path(folder) / "audit.db"), master)
            measured = measure(milvus, vectors)
            measured["start_seconds"] = start_seconds
            measured["server_mib"] = memory(server.pid)
            milvus.close()
        finally:
            server.close()
    measured["server_cpu_seconds"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    result = {"templates": args.templates, "dim": DIM, "sqlite": baseline, "milvus": measured}
    for name in ("enrolled_per_second_1_client", "enrolled_per_second", "search_ms"):
        print(f"{name}: milvus {measured[name]:,.1f}, sqlite {baseline[name]:,.1f}")
    print(f"Milvus: starts in {measured['start_seconds']:.1f} s, holds {measured['server_mib']:,.0f} MiB at the end")
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(store: GalleryStore, vectors: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> dict[str, float]:
    """Enrol all vectors and search; seconds, milliseconds, rates."""
    store.create("bench", SPACE, None, "bench")

    def enrol(start: int) -> None:
        some = range(start, min(start + REQUEST, len(vectors)))
        asked = [Enrolment(f"s{i:07d}", [NewTemplate(ENCODER, SPACE.id, vectors[i])]) for i in some]
        assert all(isinstance(answer, Enrolled) for answer in store.enrol("bench", asked, "bench"))

    starts = range(0, len(vectors), REQUEST)
    alone = max(1, min(8, len(starts) // 4))
    begun = time.perf_counter()
    for start in starts[:alone]:
        enrol(start)
    one = alone * REQUEST / (time.perf_counter() - begun)
    begun = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as clients:
        list(clients.map(enrol, starts[alone:]))
    several = (len(vectors) - alone * REQUEST) / (time.perf_counter() - begun)
    queries = np.random.default_rng(1).standard_normal((QUERIES, DIM)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    store.search("bench", ENCODER, queries[:1], TOP_K)  # a search right after a write waits for it
    took = []
    for query in queries:
        begun = time.perf_counter()
        (found,) = store.search("bench", ENCODER, query[None], TOP_K)
        took.append((time.perf_counter() - begun) * 1000)
        near = [f"s{i:07d}" for i in np.argsort(-(vectors @ query))[:TOP_K]]
        # float16 may swap neighbours at the end of the list, and nothing else.
        assert len({hit.subject for hit in found.hits} & set(near)) >= TOP_K - 1, (found, near)
    return {
        "enrolled_per_second_1_client": one,
        "enrolled_per_second": several,
        "search_ms": float(np.median(took)),
        "search_ms_p95": float(np.percentile(took, 95)),
    }


def memory(pid: int) -> float:
    """Resident set in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    sys.exit(main())
