"""How often 95 % intervals hold the truth: simulated people who differ as real ones do.

Run as: python benchmarks/coverage.py                      (hours of a core for 1,000 trials; resumes where it stopped)
        python benchmarks/coverage.py --scenarios wolves --people 120 --trials 200

People are centres on a sphere with images about them; how far differs from person to person (log-normal).
``SCENARIOS`` says how they differ otherwise. The truth is measured on ``TRUTH`` sets of 1,200 people, the threshold
of a rate too. Every trial draws fresh people and computes the intervals of pkd-evaluate and, from the same resamples,
those of other methods: ``before``, percentiles moved outwards for true accept rates, and t of all people for false
match rates; ``exact``, the exact binomial interval of as many trials as there are effective people; ``bayesian``,
percentiles of a Bayesian bootstrap (Rubin 1981), for balanced TAR at the own threshold; ``jackknife``, Student's t on
the logit of balanced TAR. A prediction is right where as many fresh people measure an FMR inside it, at the threshold
of the trial's own people. Paired p-values are of two encoders that are equally good. Trials are kept in
benchmarks/results/coverage.json as sums.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pkd.toolkit.certificates.certificate import Interval
from pkd.toolkit.evaluation.metrics.bootstrap import Bootstrap, bootstrap, fmr_variance, interval
from pkd.toolkit.evaluation.metrics.error_rates import fmr_at, matching, rates, smallest_fmr
from pkd.toolkit.evaluation.metrics.intervals import TRIALS_PER_PERSON, proportion_intervals, student_quantile
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores, score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats, Ints, Pairing
from pkd.toolkit.evaluation.metrics.resamples import paired_difference

RESULTS = Path(__file__).resolve().parent / "results" / "coverage.json"
FMRS = np.array([1e-1, 1e-2])
DIM, TRUTH, TRUTH_PEOPLE = 16, 6, 1200
KEPT = 0.2
"""Highest share of the impostors that is kept: the rates of interest lie above, and resamples take less time."""
AVERAGE = 4
FMR_TRIALS = 5
"""Trials of FMR and prediction for one of true accept rates: they need no resamples."""


@dataclass(frozen=True)
class Scenario:
    """How people differ."""

    within: float = 0.45
    """Typical distance of an image from its person's centre."""
    power_law: bool = False
    """Images a person: P(n) ∝ n^-1.5 up to 30; else 1 + Poisson(3)."""
    wolves: float = 0.0
    """Fraction whom many resemble."""
    unlike: float = 0.0
    """Fraction whom nobody resembles."""
    families: float = 0.0
    """Fraction with a relative in the sample."""
    levels: int = 0
    """Values that a coordinate may have; 0: any. Few make scores tie."""
    cameras: bool = False
    """Half of the images are of a camera that moves them all the same way."""
    mislabelled: float = 0.0
    """Fraction of people who stand under two names."""


SCENARIOS = {
    "alike": Scenario(),
    "near one": Scenario(within=0.25),
    "power law": Scenario(power_law=True),
    "wolves": Scenario(power_law=True, wolves=0.04, unlike=0.1),
    "families": Scenario(power_law=True, families=0.2),
    "ties": Scenario(levels=3),
    "cameras": Scenario(cameras=True),
    "labels": Scenario(mislabelled=0.01),
}
STATISTICS = ("FMR", "prediction", "TAR", "raw TAR")


def main() -> int:
    """Simulate, resume and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--people", type=int, nargs="+", default=[60, 120, 400])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    found = json.loads(args.results.read_text()) if args.results.exists() else {"cells": {}, "truth": {}}
    found["resamples"] = args.resamples
    for name in args.scenarios:
        for people in args.people:
            place = f"{name}/{people}" if SCENARIOS[name].families else name
            if place not in found["truth"]:
                found["truth"][place] = {key: v.tolist() for key, v in truth(SCENARIOS[name], people).items()}
            known = {key: np.array(value) for key, value in found["truth"][place].items()}
            cell = found["cells"].setdefault(f"{name}/{people}", {"trials": 0, "sums": {}})
            for kind, wanted in (("fmr_trials", FMR_TRIALS * args.trials), ("trials", args.trials)):
                while cell.setdefault(kind, 0) < wanted:
                    seed = cell[kind]
                    made = (
                        fmr_trial(SCENARIOS[name], people, seed, known)
                        if kind == "fmr_trials"
                        else trial(SCENARIOS[name], people, seed, known, args.resamples)
                    )
                    for key, (held, width) in made.items():
                        sums = cell["sums"].setdefault(key, [0, 0.0, 0])
                        cell["sums"][key] = [sums[0] + held, sums[1] + width, sums[2] + 1]
                    cell[kind] += 1
                    if cell[kind] % 20 == 0 or cell[kind] == wanted:
                        args.results.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


def embeddings(scenario: Scenario, people: int, seed: int, *, encoder: int = 0) -> tuple[Floats, Ints]:
    """Draw unit vectors of fresh people, with the name that each image stands under.

    ``encoder``: 0 or 1, equally good; each sees every image a little differently.
    """
    random = np.random.default_rng(seed)
    centres = random.standard_normal((people, DIM))
    common = np.full(DIM, 0.3)
    kind = random.random(people)
    strength = np.where(kind < scenario.wolves, 0.45, 1.0)[:, None]
    centres = strength * centres + np.where(kind > 1 - scenario.unlike, -1.0, 1.0)[:, None] * common
    related = random.random(people) < scenario.families
    relatives = np.flatnonzero(related)[: np.count_nonzero(related) // 2 * 2].reshape(-1, 2)
    centres[relatives[:, 1]] = 0.8 * centres[relatives[:, 0]] + 0.6 * centres[relatives[:, 1]]
    if scenario.power_law:
        chances = np.arange(1, 31) ** -1.5
        counts = random.choice(np.arange(1, 31), people, p=chances / chances.sum())
    else:
        counts = 1 + random.poisson(AVERAGE - 1, people)
    labels = np.repeat(np.arange(people), counts)
    within = scenario.within * np.exp(0.5 * random.standard_normal(people))
    vectors = centres[labels] + within[labels, None] * random.standard_normal((len(labels), DIM))
    if scenario.cameras:
        vectors += 0.35 * random.integers(0, 2, len(labels))[:, None] * np.sign(np.arange(DIM) - DIM / 2 + 0.5)
    vectors += 0.15 * np.random.default_rng([seed, encoder]).standard_normal(vectors.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if scenario.levels:
        vectors = np.round(vectors * scenario.levels * 2) / (scenario.levels * 2)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    if scenario.mislabelled:
        twice = random.random(people) < scenario.mislabelled * 2
        labels = np.where(twice[labels] & (random.random(len(labels)) < 0.5), labels + people, labels)
        labels = np.unique(labels, return_inverse=True)[1]
    return vectors.astype(np.float32), labels.astype(np.int64)


def simulate(scenario: Scenario, people: int, seed: int) -> PairScores:
    """Score all pairs of fresh people."""
    return scored(*embeddings(scenario, people, seed))


def scored(vectors: Floats, labels: Ints) -> PairScores:
    """Score all pairs and keep the highest impostors: no rate of interest lies below them."""
    files = np.arange(len(labels))
    scores = score_pairs(Pairing(labels, labels, files, files, int(labels.max()) + 1, unordered=True), vectors, vectors)
    kept = int(np.searchsorted(np.cumsum(scores.weight), KEPT * scores.pairing.impostor_pairs)) + 1
    return replace(
        scores,
        impostor=scores.impostor[:kept],
        impostor_query=scores.impostor_query[:kept],
        impostor_gallery=scores.impostor_gallery[:kept],
        weight=scores.weight[:kept],
    )


def truth(scenario: Scenario, people: int) -> dict[str, Doubles]:
    """Measure thresholds and rates of everyone like these.

    Where a fifth have a relative in the sample, relatives are the fewer of all pairs the larger it is: there the truth
    is that of samples of ``people``.
    """
    size = people if scenario.families else TRUTH_PEOPLE
    sets = [simulate(scenario, size, 10**7 + i) for i in range(TRUTH * TRUTH_PEOPLE // size)]
    threshold = np.mean([rates(scores, FMRS).threshold for scores in sets], axis=0)
    found = [rates(scores, FMRS) for scores in sets]
    return {
        "threshold": threshold,
        "FMR": np.mean([fmr_at(scores, threshold) for scores in sets], axis=0),
        "TAR": np.mean([each.tar_balanced for each in found], axis=0),
        "raw TAR": np.mean([each.tar for each in found], axis=0),
    }


def fmr_trial(scenario: Scenario, people: int, seed: int, known: dict[str, Doubles]) -> dict[str, tuple[int, float]]:
    """Tell for FMR and prediction whether the interval holds the truth, and how wide it is. Needs no resamples."""
    scores = simulate(scenario, people, seed)
    own = rates(scores, FMRS).threshold
    fresh = fmr_at(simulate(scenario, people, 10**6 + seed), own)
    everyone = float(np.count_nonzero(scores.pairing.identity_pairs_per_identity))
    made: dict[str, tuple[int, float]] = {}
    for statistic, thresholds, real, times in (
        ("FMR", known["threshold"], known["FMR"], 1),
        ("prediction", own, fresh, 2),
    ):
        observed = fmr_at(scores, thresholds)
        variance = fmr_variance(scores, matching(scores.impostor, thresholds))
        for k, fmr in enumerate(FMRS):
            if fmr < smallest_fmr(scores.pairing) or observed[k] == 0:
                continue
            deviation = math.sqrt(times * variance.total[k]) / observed[k]
            for method, effective_people in (("before", everyone), ("now", float(variance.people[k]))):
                factor = math.exp(student_quantile(effective_people) * deviation)
                low, high = observed[k] / factor, min(1.0, observed[k] * factor)
                made[f"{statistic}/{fmr:g}/{method}"] = (int(low <= real[k] <= high), high - low)
            if statistic == "prediction":
                made[f"rate at the threshold/{fmr:g}/now"] = (0, float(fresh[k] / fmr))
    return made


def trial(
    scenario: Scenario, people: int, seed: int, known: dict[str, Doubles], resamples: int
) -> dict[str, tuple[int, float]]:
    """Tell for true accept rates by every method whether the interval holds the truth, and how wide it is."""
    scores = simulate(scenario, people, seed)
    own = rates(scores, FMRS)
    drawn = bootstrap(scores, FMRS, np.empty(0), resamples=resamples, seed=seed)
    noisy = scored(*embeddings(scenario, people, seed, encoder=1))
    other = rates(noisy, FMRS)
    drawn_other = bootstrap(noisy, FMRS, np.empty(0), resamples=resamples, seed=seed)
    made: dict[str, tuple[int, float]] = {}
    for k, fmr in enumerate(FMRS):
        if fmr < smallest_fmr(scores.pairing):
            continue
        for statistic, methods in _intervals(scores, drawn, k).items():
            for method, (low, high) in methods.items():
                held = low <= known[statistic][k] <= high
                made[f"{statistic}/{fmr:g}/{method}"] = (int(held), high - low)
        paired = paired_difference(
            drawn.tar_balanced[:, k],
            drawn_other.tar_balanced[:, k],
            observed=float(own.tar_balanced[k] - other.tar_balanced[k]),
        )
        made[f"p < 0.05/{fmr:g}/now"] = (int(paired.p < 0.05), paired.p)
    return made


def _intervals(scores: PairScores, drawn: Bootstrap, k: int) -> dict[str, dict[str, Interval]]:
    raw_people, people = drawn.people
    fractions = _per_person(scores, float(rates(scores, FMRS[k : k + 1]).threshold[0]))
    return {
        "TAR": {
            "before": interval(drawn.tar_balanced[:, k], people),
            **_binomial(float(drawn.observed_tar_balanced[k]), float(drawn.tar_balanced[:, k].var()), people),
            "bayesian": _bayesian(fractions),
            "jackknife": _jackknife(fractions, people),
        },
        "raw TAR": {
            "before": interval(drawn.tar[:, k], raw_people),
            **_binomial(float(drawn.observed_tar[k]), float(drawn.tar[:, k].var()), raw_people),
        },
    }


def _binomial(rate: float, variance: float, people: float) -> dict[str, Interval]:
    """Compute the interval of pkd, that of one trial a person, and those of more trials a person."""
    trials = (TRIALS_PER_PERSON, TRIALS_PER_PERSON, 4.0, 1e9)
    variances = np.array([variance, rate * (1 - rate) / people, variance, variance])
    low, high = proportion_intervals(np.full(4, rate), variances, people, trials_per_person=np.array(trials))
    names = ("now", "exact", "4 trials a person", "any trials a person")
    return dict(zip(names, zip(low.tolist(), high.tolist(), strict=True), strict=True))


def _per_person(scores: PairScores, threshold: float) -> Doubles:
    """Compute the fraction of each person's genuine pairs that match."""
    pairs = scores.pairing.genuine_per_identity
    matched = np.bincount(scores.genuine_identity[scores.genuine >= threshold], minlength=len(pairs))
    fractions: Doubles = matched[pairs > 0] / pairs[pairs > 0]
    return fractions


def _bayesian(fractions: Doubles) -> Interval:
    weights = np.random.default_rng(0).dirichlet(np.ones(len(fractions)), 400)
    low, high = np.percentile(weights @ fractions, (2.5, 97.5))
    return float(low), float(high)


def _jackknife(fractions: Doubles, people: float) -> Interval:
    """Compute Student's t interval on the logit scale, the variance from leaving out one person at a time."""
    mean = float(fractions.mean())
    if not 0 < mean < 1:
        return mean, mean
    deviation = float(fractions.std(ddof=1)) / math.sqrt(len(fractions)) / (mean * (1 - mean))
    logit, reach = math.log(mean / (1 - mean)), student_quantile(people) * deviation
    return 1 / (1 + math.exp(reach - logit)), 1 / (1 + math.exp(-reach - logit))


def table(found: dict[str, Any]) -> str:
    """Markdown: coverage before and now, mean widths, and what other methods would give."""
    return "\n\n".join([coverage_table(found), width_table(found), method_table(found)])


def coverage_table(found: dict[str, Any]) -> str:
    """Markdown: percent of the trials in which an interval held the truth, before and now."""
    trials = sorted({cell["trials"] for cell in found["cells"].values()})
    fmr_trials = sorted({cell["fmr_trials"] for cell in found["cells"].values()})
    error = 100 * math.sqrt(0.95 * 0.05 / trials[0])
    lines = [
        f"Percent of {' or '.join(map(str, trials))} trials in which a 95 % interval ({found['resamples']} resamples) "
        f"held the truth, before → now, at FMR {FMRS[0]:g}; {FMRS[1]:g}. By chance ± {error:.1f} (one standard error, "
        f"{trials[0]} trials). FMR and prediction: of {' or '.join(map(str, fmr_trials))} trials. p: percent of paired "
        "comparisons of two equally good encoders with p < 0.05. Simulated people: a test of intervals, not networks.",
        "",
        "| people | scenario | trials | " + " | ".join(STATISTICS) + " | p |",
        "| ---: | --- | ---: |" + " ---: |" * (len(STATISTICS) + 1),
    ]
    for key, cell in found["cells"].items():
        name, _, people = key.partition("/")
        held = [
            "; ".join(
                " → ".join(f"{100 * _mean(cell, f'{s}/{fmr:g}/{method}', 0):.0f}" for method in ("before", "now"))
                if f"{s}/{fmr:g}/now" in cell["sums"]
                else "not resolved"
                for fmr in FMRS
            )
            for s in STATISTICS
        ]
        chances = [key for fmr in FMRS if (key := f"p < 0.05/{fmr:g}/now") in cell["sums"]]
        p = "; ".join(f"{100 * _mean(cell, key, 0):.0f}" for key in chances)
        lines.append(f"| {people} | {name} | {cell['trials']} | {' | '.join(held)} | {p} |")
    return "\n".join(lines)


def width_table(found: dict[str, Any]) -> str:
    """Markdown: mean widths in points, before and now."""
    lines = [
        "Mean width of these intervals in points, before → now:",
        "",
        "| people | scenario | " + " | ".join(STATISTICS) + " |",
        "| ---: | --- |" + " ---: |" * len(STATISTICS),
    ]
    for key, cell in found["cells"].items():
        name, _, people = key.partition("/")
        widths = [
            "; ".join(
                " → ".join(f"{100 * _mean(cell, f'{s}/{fmr:g}/{method}', 1):.2g}" for method in ("before", "now"))
                for fmr in FMRS
                if f"{s}/{fmr:g}/now" in cell["sums"]
            )
            for s in STATISTICS
        ]
        lines.append(f"| {people} | {name} | {' | '.join(widths)} |")
    return "\n".join(lines)


def method_table(found: dict[str, Any]) -> str:
    """Markdown: every method over all scenarios and sizes."""
    lines = [
        "Every method for the true accept rates, over all rows and rates above:",
        "",
        "| statistic | method | mean coverage, % | lowest coverage, % | mean width, points |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for statistic in ("TAR", "raw TAR"):
        by_method: dict[str, list[tuple[float, float]]] = {}
        for cell in found["cells"].values():
            for key in cell["sums"]:
                if key.startswith(f"{statistic}/"):
                    by_method.setdefault(key.split("/")[2], []).append((_mean(cell, key, 0), _mean(cell, key, 1)))
        for method, pairs in by_method.items():
            held, widths = 100 * np.array(pairs).T
            lines.append(f"| {statistic} | {method} | {held.mean():.1f} | {held.min():.0f} | {widths.mean():.1f} |")
    return "\n".join(lines)


def _mean(cell: dict[str, Any], key: str, place: int) -> float:
    sums = cell["sums"][key]
    return float(sums[place] / sums[2])


if __name__ == "__main__":
    sys.exit(main())
