"""How often 95 % intervals hold the truth: simulated people, identity-level against pair-level intervals.

Run as: python benchmarks/coverage.py                    (about 25 minutes of a core)
        python benchmarks/coverage.py --people 300 --trials 200

People are centres on a sphere with images about them; how far differs from person to person (log-normal), and so does
the number of images. The truth is measured on ``TRUTH`` sets of 3,000 people. Every trial draws fresh people, computes
the intervals of pkd-evaluate, and beside them two that are not used: percentiles of the plain identity bootstrap, and
a bootstrap that draws pairs. A prediction interval is right where as many fresh people measure an FMR inside it, at the
threshold of the trial's own people. Writes benchmarks/results/coverage.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pkd.toolkit.certificates.certificate import Interval
from pkd.toolkit.evaluation.metrics.bootstrap import bootstrap, interval
from pkd.toolkit.evaluation.metrics.error_rates import fmr_at, rates
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores, score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Pairing

RESULTS = Path(__file__).resolve().parent / "results" / "coverage.json"
FMRS = np.array([1e-1, 1e-2, 1e-3])
DIM, IMAGES, TRUTH = 16, 3, 20
STATISTICS = ("FMR at a threshold", "TAR, every identity alike", "TAR, every pair alike")
METHODS = ("pkd", "plain identity percentiles", "drawing pairs")


def main() -> int:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, nargs="+", default=[150, 400])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=400)
    args = parser.parse_args()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        truth = _truth(pool)
        found: dict[str, Any] = {
            "trials": args.trials,
            "resamples": args.resamples,
            "fmrs": FMRS.tolist(),
            "truth": {name: truth[name].tolist() for name in STATISTICS},
            "people": {},
        }
        for count in args.people:
            work = partial(trial, people=count, truth=truth, resamples=args.resamples)
            outcomes = list(pool.map(work, range(args.trials), chunksize=8))
            found["people"][str(count)] = {
                name: {
                    method: [float(np.mean([o[name][method][k] for o in outcomes])) for k in range(len(FMRS))]
                    for method in outcomes[0][name]
                }
                for name in outcomes[0]
            }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    return 0


def simulate(people: int, seed: int) -> PairScores:
    """Scores of all pairs of fresh people."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((people, DIM)) + 0.3
    spread = 0.6 * np.exp(0.5 * random.standard_normal(people))
    labels = np.repeat(np.arange(people), 1 + random.poisson(IMAGES - 1, people))
    vectors = centres[labels] + spread[labels, None] * random.standard_normal((len(labels), DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    files = np.arange(len(labels))
    return score_pairs(Pairing(labels, labels, files, files, people, unordered=True), vectors, vectors)


def trial(seed: int, people: int, truth: dict[str, Doubles], resamples: int) -> dict[str, dict[str, list[bool]]]:
    """Whether each interval of one trial holds the truth, by statistic, method and FMR."""
    scores = simulate(people, seed)
    own = rates(scores, FMRS)
    drawn = bootstrap(scores, FMRS, np.append(truth["threshold"], own.threshold), resamples=resamples, seed=seed)
    pairs = _pair_bootstrap(scores, truth["threshold"], resamples, np.random.default_rng(seed))
    targets = range(len(FMRS))
    made = {
        STATISTICS[0]: (
            [drawn.fmr_interval(k) for k in targets],
            [interval(drawn.fmr[:, k]) for k in targets],
            [interval(pairs[0][:, k]) for k in targets],
        ),
        STATISTICS[1]: (
            [drawn.tar_balanced_interval(k) for k in targets],
            [interval(drawn.tar_balanced[:, k]) for k in targets],
        ),
        STATISTICS[2]: (
            [drawn.tar_interval(k) for k in targets],
            [interval(drawn.tar[:, k]) for k in targets],
            [interval(pairs[1][:, k]) for k in targets],
        ),
    }
    held = {
        name: {
            method: [_holds(ends, truth[name][k]) for k, ends in enumerate(intervals)]
            for method, intervals in zip(METHODS, columns, strict=False)
        }
        for name, columns in made.items()
    }
    fresh = fmr_at(simulate(people, 10**6 + seed), own.threshold)
    predictions = [drawn.prediction(len(FMRS) + k) for k in targets]
    held["FMR of fresh people at the own threshold"] = {
        METHODS[0]: [_holds(ends, fresh[k]) for k, ends in enumerate(predictions)],
        "confidence interval instead": [_holds(drawn.fmr_interval(len(FMRS) + k), fresh[k]) for k in targets],
    }
    return held


def _truth(pool: ProcessPoolExecutor) -> dict[str, Doubles]:
    sets = range(10**7, 10**7 + TRUTH)
    threshold = np.mean(list(pool.map(_thresholds, sets)), axis=0)
    measured = np.mean(list(pool.map(partial(_measured, threshold=threshold), sets)), axis=0)
    return {"threshold": threshold, **dict(zip(STATISTICS, measured, strict=True))}


def _thresholds(seed: int) -> Doubles:
    return rates(simulate(3000, seed), FMRS).threshold


def _measured(seed: int, threshold: Doubles) -> Doubles:
    scores = simulate(3000, seed)
    found = rates(scores, FMRS)
    return np.stack([fmr_at(scores, threshold), found.tar_balanced, found.tar])


def _pair_bootstrap(
    scores: PairScores, thresholds: Doubles, resamples: int, random: np.random.Generator
) -> tuple[Doubles, Doubles]:
    """FMR and TAR if every pair were independent, at fixed thresholds: binomial counts."""
    false, accepted = fmr_at(scores, thresholds), np.array([(scores.genuine >= t).mean() for t in thresholds])
    impostors, genuine = scores.pairing.impostor_pairs, scores.pairing.genuine_pairs
    return (
        random.binomial(impostors, false, (resamples, len(thresholds))) / impostors,
        random.binomial(genuine, accepted, (resamples, len(thresholds))) / genuine,
    )


def _holds(ends: Interval, value: float) -> bool:
    return bool(ends[0] <= value <= ends[1])


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    error = 100 * math.sqrt(0.95 * 0.05 / found["trials"])
    heads = " | ".join(f"FMR {fmr:g}" for fmr in found["fmrs"])
    lines = [
        f"Percent of {found['trials']:,} trials in which a 95 % interval ({found['resamples']} resamples) held the "
        f"truth; by chance ± {error:.1f} (one standard error). Simulated people with {IMAGES} images on average: this "
        "tests the intervals, not a network.",
        "",
        f"| people | statistic | interval | {heads} |",
        f"| ---: | --- | --- |{' ---: |' * len(found['fmrs'])}",
    ]
    for people, statistics in found["people"].items():
        for name, methods in statistics.items():
            for method, held in methods.items():
                cells = " | ".join(
                    f"{'**' * (method == 'pkd')}{100 * rate:.1f}{'**' * (method == 'pkd')}" for rate in held
                )
                lines.append(f"| {people} | {name} | {method} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
