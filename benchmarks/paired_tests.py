"""How often pkd's paired p-values claim a difference: of equally good encoders, and of encoders that differ.

Run as: python benchmarks/paired_tests.py                 (hours of a core; goes on where it stopped)
        python benchmarks/paired_tests.py --people 120 --trials 200 --power-trials 0

People and scenarios are those of benchmarks/simulated_people.py. Both encoders see the same images, each with noise of
its own; where they differ, the second has more. Compared are the balanced true accept rate at two false match rates,
each encoder at its own threshold, and the accuracy of a list of pairs (2 genuine and 2 of different people for every
person, ten folds). *Resamples*: the p-values that pkd gave until now, and gives for ranks. No seed is drawn that was
seen while the test was chosen (``FRESH``).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from coverage_trials import FIRST, RATES, Sums, add, merged, pilot, targets
from simulated_people import SCENARIOS, embeddings, scored, seeds

from pkd.toolkit.evaluation.metrics.bootstrap import bootstrap, fmr_variance, resampled_accuracies
from pkd.toolkit.evaluation.metrics.error_rates import matching, rates, smallest_fmr
from pkd.toolkit.evaluation.metrics.intervals import student_quantile
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores
from pkd.toolkit.evaluation.metrics.paired import (
    Contributions,
    ScoredList,
    accuracy_contributions,
    compared,
    flipped,
    shifted_accuracies,
    tar_contributions,
)
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats, Ints
from pkd.toolkit.evaluation.metrics.resamples import paired_difference
from pkd.toolkit.evaluation.protocols.pair_list import out_of_fold
from pkd.toolkit.evaluation.results.schema import PairedDifference

RESULTS = Path(__file__).resolve().parent / "results" / "paired_tests.json"
LEVEL = 0.05
POWER = {120: 1e-2, 400: 1e-3, 850: 1e-3}
"""False match rate at which the power is measured, by number of people."""
POINTS = (0.5, 1, 2, 5)
PLAIN = 0.15
"""Noise of the better encoder."""
NOISES = (0.15, 0.18, 0.21, 0.25, 0.30, 0.36)
RESAMPLES = 200
METHODS = {
    "signs": "random signs (pkd's)",
    "normal": "normal, same variance",
    "t": "Student's t of the people who differ, same variance",
    "held": "random signs, thresholds held",
    "resamples": "resamples, in any comparison (pkd's until now)",
}
BEFORE = 100
"""Trials of a row, its first, that p-values by resamples are computed of: they cost thirty times as much."""
BLOCK = 100
"""Trials after which the results are written."""
LOWEST = {120: 0.3, 400: 0.5, 850: 0.5}
"""Score below any threshold of the power, by number of people."""


def main() -> int:
    """Simulate, resume and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--people", type=int, nargs="+", choices=(60, 120, 400, 850), default=[60, 120, 400])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--power-trials", type=int, default=200)
    parser.add_argument("--noises", type=float, nargs="+", default=list(NOISES), help="of the worse encoder, for power")
    parser.add_argument("--before", type=int, default=BEFORE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    found = json.loads(args.results.read_text()) if args.results.exists() else {"size": {}, "power": {}}
    for people in args.people:
        for name in args.scenarios:
            key = f"{name}/{people}"
            if args.trials and found["size"].get(key, {}).get("seen"):
                found["size"].pop(key)
            while people in RATES and (done := found["size"].get(key, {}).get("trials", 0)) < args.trials:
                part = range(done, min(done + BLOCK, args.trials))
                sums = size_row(name, people, part, args.before)
                sums = merged(found["size"][key]["p"], sums) if done else sums
                found["size"][key] = {"trials": part.stop, "p": sums}
                args.results.write_text(json.dumps(found, indent=1) + "\n")
    for people in POWER:
        row = found["power"].setdefault(str(people), {"noises": {}}) if people in args.people else {"noises": {}}
        for noise in args.noises if people in args.people else ():
            if row["noises"].get(f"{noise}", {}).get("trials", 0) < args.power_trials:
                row["noises"][f"{noise}"] = power(people, noise, args.power_trials)
                args.results.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


def size_row(name: str, people: int, trials: range, before: int) -> Sums:
    """Compare two equally good encoders; count claims by statistic and method, and sum up who differs."""
    goal, scenario = targets(people), SCENARIOS[name]
    _, lowest = pilot(name, people, RATES[people])
    sums: Sums = {}
    for number, seed in zip(trials, seeds(f"two encoders {name}", people, trials), strict=True):
        made = [embeddings(scenario, people, seed, encoder=e) for e in (0, 1)]
        sets = [scored(*one, lowest) for one in made]
        for k, fmr in enumerate(goal):
            if fmr >= smallest_fmr(sets[0].pairing):
                _count(sums, f"{fmr:g}", *_contributed(sets, goal, k), number < FIRST)
        a, b, drawn = _listed(made, people, seed, number < before)
        _count(sums, "accuracy", a, b, _total(a) - _total(b), number < FIRST)
        if number < before:
            found = paired_difference(*drawn, observed=_total(a) - _total(b))
            add(sums, "accuracy/resamples", found.p <= LEVEL, found.p)
            both = [bootstrap(s, goal, np.empty(0), resamples=RESAMPLES, seed=seed % 2**32) for s in sets]
            for k, fmr in enumerate(goal):
                observed = float(both[0].observed_tar_balanced[k] - both[1].observed_tar_balanced[k])
                old = paired_difference(*(one.tar_balanced[:, k] for one in both), observed=observed)
                if fmr >= smallest_fmr(sets[0].pairing):
                    add(sums, f"{fmr:g}/resamples", old.p <= LEVEL, old.p)
    return sums


def power(people: int, noise: float, trials: int) -> dict[str, Any]:
    """Measure how far TAR and accuracy fall at a noise and how often that is found, for people of a power law."""
    fmr, scenario = np.array([POWER[people]]), SCENARIOS["power law"]
    found: dict[str, list[PairedDifference]] = {"TAR": [], "accuracy": []}
    for seed in seeds(f"power {noise}", people, trials):
        made = [embeddings(scenario, people, seed, encoder=e, noise=n) for e, n in ((0, PLAIN), (1, noise))]
        a, b, observed = _contributed([scored(*one, LOWEST[people]) for one in made], fmr, 0)
        found["TAR"].append(compared(a, b, observed=observed))
        a, b, _ = _listed(made, people, seed, before=False)
        found["accuracy"].append(compared(a, b, observed=_total(a) - _total(b)))
    said: dict[str, Any] = {"trials": trials}
    for statistic, each in found.items():
        mean = float(np.mean([one.difference for one in each]))
        said[statistic] = {
            "points": 100 * mean,
            "claims": sum(one.p <= LEVEL and one.difference > 0 for one in each),
            "inside": sum(one.ci95[0] <= mean <= one.ci95[1] for one in each),
        }
    return said


def _contributed(sets: list[PairScores], goal: Doubles, k: int) -> tuple[Contributions, Contributions, float]:
    made, rate = [], []
    for scores in sets:
        at = rates(scores, goal)
        threshold = at.threshold[k : k + 1]
        variance = fmr_variance(scores, matching(scores.impostor, threshold)).total[0]
        made.append(tar_contributions(scores, float(goal[k]), float(threshold[0]), math.sqrt(variance) / goal[k]))
        rate.append(float(at.tar_balanced[k]))
    return made[0], made[1], rate[0] - rate[1]


def _listed(
    made: list[tuple[Floats, Ints]], people: int, seed: int, before: bool
) -> tuple[Contributions, Contributions, tuple[Doubles, Doubles]]:
    """Draw a list of pairs, and decide them with both encoders."""
    random, labels = np.random.default_rng(seed), made[0][1]
    order, count = np.argsort(labels, kind="stable"), np.bincount(labels)
    start, size = np.cumsum(count) - count, 2 * people
    own = random.choice(np.flatnonzero(count > 1), size)
    image = random.integers(0, count[own])
    other = (image + 1 + random.integers(0, count[own] - 1)) % count[own]
    one = random.integers(0, len(count), size)
    two = (one + 1 + random.integers(0, len(count) - 1, size)) % len(count)
    first = np.concatenate([order[start[own] + image], order[start[one] + random.integers(0, count[one])]])
    second = np.concatenate([order[start[own] + other], order[start[two] + random.integers(0, count[two])]])
    same, fold = np.repeat([True, False], size), random.permutation(2 * size) % 10
    contributed, drawn = [], []
    for vectors, _ in made:
        scores = np.einsum("nd,nd->n", vectors[first], vectors[second])
        listed = ScoredList(scores, same, labels[first], labels[second])
        right = out_of_fold(scores, same, fold)[0]
        shifted = shifted_accuracies(listed, listed, resamples=RESAMPLES, seed=0)
        contributed.append(accuracy_contributions(right, listed.first, listed.second, shifted))
        again = RESAMPLES if before else 1
        drawn.append(resampled_accuracies(right, same, listed.first, listed.second, resamples=again, seed=0))
    return contributed[0], contributed[1], (drawn[0], drawn[1])


def _total(one: Contributions) -> float:
    return float(np.nansum(one.own) + one.parts.sum())


def _count(sums: Sums, statistic: str, a: Contributions, b: Contributions, observed: float, others: bool) -> None:
    """Count the claims of one comparison, by ``others`` too, and the people who decide it."""
    p = compared(a, b, observed=observed).p
    differ = int(np.count_nonzero(np.nan_to_num(a.own) != np.nan_to_num(b.own)))
    add(sums, f"{statistic}/now", p <= LEVEL, differ)
    if statistic == "accuracy":
        add(sums, f"{statistic}/signs", p <= LEVEL, p)
        differ += len(np.setxor1d(a.pairs[a.parts > 0], b.pairs[b.parts > 0]))
    elif differ < 6:
        return
    else:
        add(sums, f"{statistic}/signs", p <= LEVEL, p)
    if not others:
        return
    deviation = float(np.sqrt((flipped(a, b) ** 2).mean())) or 1.0
    normal = math.erfc(abs(observed) / deviation / math.sqrt(2))
    add(sums, f"{statistic}/normal", normal <= LEVEL, normal)
    t = abs(observed) / deviation / student_quantile(max(differ, 2))
    add(sums, f"{statistic}/t", t >= 1, t)
    if statistic == "accuracy":
        held = compared(replace(a, shifted=np.empty(0)), b, observed=observed).p
        add(sums, f"{statistic}/held", held <= LEVEL, held)


def table(found: dict[str, Any]) -> str:
    """Write every table in Markdown."""
    return "\n\n".join([size_table(found), method_table(found), power_table(found)])


def size_table(found: dict[str, Any]) -> str:
    """Write how often equally good encoders are claimed to differ, row by row."""
    old = max((int(one[2]) for row in found["size"].values() for k, one in row["p"].items() if "resam" in k), default=0)
    errors = "; ".join(f"{n:,}: {_error(n)}" for n in sorted({row["trials"] for row in found["size"].values()}))
    lines = [
        "Percent of comparisons of two equally good encoders with p ≤ 0.05"
        f"{f', in parentheses by resamples (up to {old} comparisons)' if old else ''}; how many people "
        "differ in their own pairs, on average; and the percent of those comparisons in which six or more do. †: of "
        "people who were seen while the test was chosen. One standard error where 5 % is right, in points, by "
        f"comparisons: {errors}.",
        "",
        "| people | scenario | comparisons | at FMR | TAR | people who differ | TAR, six or more | accuracy of pairs |",
        "| ---: | --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for people, name in ((people, name) for people in RATES for name in SCENARIOS):
        row = found["size"].get(f"{name}/{people}")
        if not row:
            continue
        p = row["p"]
        goal = [f"{fmr:g}" for fmr in RATES[people] if f"{fmr:g}/now" in p]
        tar, differ, six = [], [], []
        for fmr in goal:
            tar.append(_percent(p, fmr))
            differ.append(f"{p[f'{fmr}/now'][1] / p[f'{fmr}/now'][2]:.0f}")
            one = p.get(f"{fmr}/signs", [0, 0, 0])
            six.append(f"{100 * one[0] / one[2]:.1f} of {one[2]}" if one[2] >= 30 else "–")
        counted = f"{row['trials']}{'†' if row.get('seen') else ''}"
        lines.append(
            f"| {people} | {name} | {counted} | {'; '.join(goal)} | {'; '.join(tar)} | {'; '.join(differ)} | "
            f"{'; '.join(six)} | {_percent(p, 'accuracy')} |"
        )
    return "\n".join(lines)


def method_table(found: dict[str, Any]) -> str:
    """Write for every test the percent of false claims over all rows, and the most in a row."""
    lines = [
        "False claims at 0.05 by every test, over all rows (of the TAR where six people or more differ):",
        "",
        "| test | TAR, mean of rows | most | pairs, mean of rows | most |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for method in METHODS:
        cells = []
        for accuracy in (False, True):
            rows = [
                100 * one[0] / one[2]
                for row in found["size"].values()
                for key, one in row["p"].items()
                if key.endswith(f"/{method}") and key.startswith("accuracy") == accuracy and one[2] >= 30
            ]
            cells += [f"{np.mean(rows):.1f}", f"{max(rows):.1f}"] if rows else ["–", "–"]
        if set(cells) != {"–"}:
            lines.append(f"| {METHODS[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def power_table(found: dict[str, Any]) -> str:
    """Write how often a true difference is found, between the noises that were simulated."""
    rows = {n: found["power"][n]["noises"] for n in sorted(found["power"], key=int)}
    rows = {people: noises for people, noises in rows.items() if len(noises) > 2}
    lines = [
        "Percent of comparisons in which a true difference is found (p ≤ 0.05, the better encoder named), people of a "
        "power law; between simulated differences by a line, a dash beyond them. *Comparisons*: of each of three to "
        f"{len(NOISES)} differences. Last: percent of all these in which the 95 % interval held the true difference.",
        "",
        "| people | difference of | comparisons | half a point | 1 point | 2 points | 5 points | interval |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for people, row in rows.items():
        for statistic, name in (("TAR", f"TAR at FMR {POWER[int(people)]:g}"), ("accuracy", "accuracy of pairs")):
            noises = sorted(row.values(), key=lambda one: float(one[statistic]["points"]))
            points = [one[statistic]["points"] for one in noises]
            claims = [100 * one[statistic]["claims"] / one["trials"] for one in noises]
            told = [f"{np.interp(n, points, claims):.0f}" if points[0] <= n <= points[-1] else "–" for n in POINTS]
            inside = 100 * np.mean([one[statistic]["inside"] / one["trials"] for one in noises])
            lines.append(f"| {people} | {name} | {noises[0]['trials']} | {' | '.join(told)} | {inside:.0f} |")
    return "\n".join(lines)


def _error(trials: int) -> str:
    return f"{100 * math.sqrt(LEVEL * (1 - LEVEL) / max(trials, 1)):.1f}"


def _percent(p: Sums, statistic: str) -> str:
    if f"{statistic}/now" not in p:
        return "–"
    now, old = p[f"{statistic}/now"], p.get(f"{statistic}/resamples")
    return f"{100 * now[0] / now[2]:.1f}" + (f" ({100 * old[0] / old[2]:.0f})" if old else "")


if __name__ == "__main__":
    sys.exit(main())
