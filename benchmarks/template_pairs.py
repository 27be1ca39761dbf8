"""IJB-C's 1:1 list in size: reading, scoring and measuring 15,658,489 template pairs, time and memory.

Run as: python benchmarks/template_pairs.py              (about 5 minutes of one core)
        python benchmarks/template_pairs.py --pairs 1000000

Random embeddings of 23,124 templates of 3,531 subjects; the list is written to a temporary file in the published
layout. The baseline of scoring is the bare product of the same rows in the same blocks. One thread, CPU time; memory is
the peak of the resident set of the whole process. Writes benchmarks/results/template_pairs.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np

from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.evaluation.metrics.listed_pairs import BLOCK, listed, read_pair_labels, score_listed
from pkd.toolkit.evaluation.metrics.operating_points import measure

RESULTS = Path(__file__).resolve().parent / "results" / "template_pairs.json"
PAIRS, GENUINE, TEMPLATES, SUBJECTS, DIM = 15_658_489, 19_557, 23_124, 3_531, 512


def main() -> int:
    """Measure the steps one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--resamples", type=int, default=1000)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    subject = np.append(np.arange(SUBJECTS), random.integers(0, SUBJECTS, TEMPLATES - SUBJECTS))
    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ijbc_template_pair_label.txt"
        write(path, subject, args.pairs, random)
        start = time.process_time()
        enrolled, probe, same = read_pair_labels(path, np.arange(1, TEMPLATES + 1))
        took["reading"] = time.process_time() - start

    vectors = random.normal(size=(TEMPLATES, DIM)).astype(np.float32)
    vectors += random.normal(size=(SUBJECTS, DIM)).astype(np.float32)[subject]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    start = time.process_time()
    for at in range(0, len(same), BLOCK):
        np.einsum("nd,nd->n", vectors[probe[at : at + BLOCK]], vectors[enrolled[at : at + BLOCK]])
    took["bare product"] = time.process_time() - start

    start = time.process_time()
    scores = score_listed(listed(probe, enrolled, same, subject), vectors, vectors)
    took["scoring"] = time.process_time() - start
    info = describe("benchmark", "teacher", "0" * 64, Preprocess(), DIM)
    start = time.process_time()
    comparison, _ = measure(scores, "T–T", info, info, fmrs=(1e-4, 1e-5, 1e-6), resamples=args.resamples, seed=0)
    took["intervals"] = time.process_time() - start
    found = {
        "pairs": len(same),
        "identity_pairs": comparison.identity_pairs,
        "resamples": args.resamples,
        "seconds": took,
        "scoring_ratio": took["scoring"] / took["bare product"],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "resolved": [point.fmr for point in comparison.points],
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    return 0


def write(path: Path, subject: np.ndarray, pairs: int, random: np.random.Generator) -> None:
    """Pairs of an enrolled template (one a subject) and another, the first of them genuine."""
    probe = random.integers(SUBJECTS, TEMPLATES, pairs)
    enrolled = random.integers(0, SUBJECTS, pairs)
    enrolled[:GENUINE] = subject[probe[:GENUINE]]
    same = subject[enrolled] == subject[probe]
    with path.open("w", encoding="ascii") as file:
        for at in range(0, pairs, 1 << 20):
            here = slice(at, at + (1 << 20))
            rows = zip(enrolled[here].tolist(), probe[here].tolist(), same[here].tolist(), strict=True)
            file.write("".join(f"{a + 1} {b + 1} {label:d}\n" for a, b, label in rows))


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    steps = {
        "reading": "list read",
        "bare product": "product of the same rows alone",
        "scoring": "scored, counted, sorted, thinned out",
        "intervals": f"rates and intervals, {found['resamples']:,} resamples",
    }
    rows = [f"| {name} | {found['seconds'][key]:,.0f} |" for key, name in steps.items()]
    return "\n".join(
        [
            f"{found['pairs']:,} pairs of templates, {found['identity_pairs']:,} pairs of people, {DIM} numbers, one "
            f"ordered pair of encoders, one thread. Ratio of scoring to the product: **{found['scoring_ratio']:.2f}**; "
            f"peak memory of it all: {found['peak_mb']:,.0f} MB.",
            "",
            "| | CPU seconds |",
            "| --- | ---: |",
            *rows,
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
