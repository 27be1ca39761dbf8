"""How often ``pkd-export --gate`` lets a target pass that loses more than was allowed, on few people.

Run as: python benchmarks/gate_errors.py                 (10 minutes of one core; goes on where it stopped)
        python benchmarks/gate_errors.py --people 46 --trials 200

People are those of benchmarks/simulated_people.py, image counts by a power law. fp32 encoder and target see them
alike, but for ``BROKEN`` of the people, whose images the target embeds at random. Less of the TAR than that may be
lost, ``ALLOWED``, so that every pass is an error. Each is judged as by the gate: the first target, and the best of
three, where the later ones are judged at the stricter level that the gate gives them. *Interval alone*: without the
exact bound for so few people. *Breaks nobody*: how often a target passes that does no harm.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from simulated_people import SCENARIOS, embeddings, scored, seeds

from pkd.export.checks.gate import LEVEL, fewest_people, most_lost
from pkd.toolkit.evaluation.metrics.bootstrap import fmr_variance
from pkd.toolkit.evaluation.metrics.error_rates import matching, rates
from pkd.toolkit.evaluation.metrics.paired import Contributions, compared, tar_contributions
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats, Ints

RESULTS = Path(__file__).resolve().parent / "results" / "gate_errors.json"
PEOPLE = (46, 142, 300, 400)
BROKEN, ALLOWED, TRIES = 0.015, 0.01, 3
FMR = 1e-2
NOISE = 0.02
"""Noise of the target's embeddings beside fp32's: more than rounding (``ALIKE``), less than what INT8 adds."""
BLOCK = 50
LOWEST = 0.4
"""Score below any threshold of interest."""
IMAGES = 1.9
"""People to draw for one who has several images."""


def main() -> int:
    """Simulate, resume and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, nargs="+", default=list(PEOPLE))
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    found = json.loads(args.results.read_text()) if args.results.exists() else {}
    for people in args.people:
        row = found.setdefault(str(people), {"trials": 0})
        while (done := row["trials"]) < args.trials:
            part = range(done, min(done + BLOCK, args.trials))
            for key, count in simulate(people, part).items():
                row[key] = row.get(key, 0) + count
            row["trials"] = part.stop
            args.results.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


def simulate(people: int, trials: range) -> dict[str, float]:
    """Count how often targets pass that break people, and one that does not; sum up what is lost."""
    counts = dict.fromkeys(("first", "tries", "interval alone", "harmless", "lost", "with several"), 0.0)
    for seed in seeds("gate", people, trials):
        random = np.random.default_rng(seed)
        vectors, labels = embeddings(SCENARIOS["power law"], round(IMAGES * people), seed)
        several = np.flatnonzero(np.bincount(labels) > 1)[:people]
        kept = np.isin(labels, np.append(several, np.flatnonzero(np.bincount(labels) == 1)))
        vectors, labels = vectors[kept], np.unique(labels[kept], return_inverse=True)[1]
        plain = _measured(vectors, vectors, labels)
        judged = []
        for attempt in range(TRIES + 1):
            target = _unit(vectors + NOISE * random.standard_normal(vectors.shape))
            broken = random.random(labels.max() + 1) < (BROKEN if attempt < TRIES else 0.0)
            target[broken[labels]] = _unit(random.standard_normal((np.count_nonzero(broken[labels]), vectors.shape[1])))
            level = LEVEL if attempt in (0, TRIES) else 1 - (1 - LEVEL) / (TRIES - 1)
            judged.append(_judge(plain, _measured(target, vectors, labels), level))
        (lost, reach, most), *others, fine = judged
        counts["first"] += most <= ALLOWED
        counts["tries"] += min(most, *(one[2] for one in others)) <= ALLOWED
        counts["interval alone"] += reach <= ALLOWED
        counts["harmless"] += fine[2] <= ALLOWED
        counts["lost"] += lost
        counts["with several"] += len(several)
    return counts


def _unit(vectors: Doubles) -> Floats:
    unit: Floats = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


Measured = tuple[float, Doubles, Contributions]


def _measured(query: Floats, gallery: Floats, labels: Ints) -> Measured:
    """Measure TAR, each person's share of accepted pairs, and what people contribute, as gate.py does."""
    scores = scored(query, labels, LOWEST, gallery=gallery)
    at = rates(scores, np.array([FMR]))
    threshold = at.threshold
    variance = fmr_variance(scores, matching(scores.impostor, threshold)).total[0]
    contributed = tar_contributions(scores, FMR, float(threshold[0]), math.sqrt(variance) / FMR)
    pairs = scores.pairing.genuine_per_identity
    matched = scores.genuine_identity[: matching(scores.genuine, threshold)[0]]
    accepted = np.bincount(matched, minlength=len(pairs))[pairs > 0] / pairs[pairs > 0]
    return float(at.tar_balanced[0]), accepted, contributed


def _judge(plain: Measured, target: Measured, level: float) -> tuple[float, float, float]:
    """Return what is lost, the end of its interval, and the most that may be lost."""
    lost = plain[0] - target[0]
    reach = compared(plain[2], target[2], observed=lost, level=level).ci95[1]
    return lost, reach, most_lost(lost, reach, plain[1] - target[1], level)


def table(found: dict[str, Any]) -> str:
    """Write the table in Markdown."""
    lines = [
        f"Percent of targets that pass the gate, where {100 * ALLOWED:g} point may be lost at FMR {FMR:g}. All but "
        f"those of the last column break {100 * BROKEN:g} % of the people: every pass is an error. Where nobody loses "
        f"anything it takes {fewest_people(ALLOWED)} people to pass.",
        "",
        "| people with several images | trials | lost, points | interval alone | first target | best of three tries | "
        "breaks nobody |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found.values():
        n = row["trials"]
        told = [f"{100 * row[key] / n:.1f}" for key in ("interval alone", "first", "tries", "harmless")]
        lines.append(f"| {row['with several'] / n:.0f} | {n} | {100 * row['lost'] / n:.2f} | {' | '.join(told)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
