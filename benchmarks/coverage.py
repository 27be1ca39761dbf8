"""How often 95 % intervals hold the truth: simulated people who differ as real ones do.

Run as: python benchmarks/coverage.py                      (hours of a core; goes on where it stopped)
        python benchmarks/coverage.py --scenarios wolves --people 120 --trials 1000 --tar-trials 400

The people are those of ``benchmarks/simulated_people.py``, fresh ones in every trial. The truth is what all trials of a
row measure together: the FMR at a threshold that is fixed beforehand, the true rate of each trial's own thresholds, and
the true accept rates where the FMR is the target. A prediction is right where the next trial's people measure an FMR
inside it, at the threshold of the trial's own people. ``benchmarks/interval_methods.py`` has the other methods, which
the first trials of a row are given to. True accept rates need resamples, so that they get fewer trials. Paired
comparisons are in ``benchmarks/paired_tests.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from interval_methods import Seen, before, drawn_again, fay_feuer, gamma_exact, jackknife, tail_model
from simulated_people import SCENARIOS, embeddings, scored, seeds

from pkd.toolkit.evaluation.metrics.bootstrap import bootstrap, fmr_variance, interval
from pkd.toolkit.evaluation.metrics.error_rates import fmr_at, matching, rates, smallest_fmr
from pkd.toolkit.evaluation.metrics.intervals import proportion_intervals, small_rate_interval, student_quantile
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores
from pkd.toolkit.evaluation.metrics.pairing import Doubles

RESULTS = Path(__file__).resolve().parent / "results" / "coverage.json"
RATES = {60: (1e-1, 1e-2), 120: (1e-1, 1e-2), 400: (1e-2, 1e-3), 2000: (1e-3, 1e-4)}
"""False match rates by number of people, who resolve them."""
LOWEST = {60: -0.2, 120: -0.2, 400: 0.2, 2000: 0.4}
"""Score below any threshold of interest, by number of people."""
PILOTS = 12
GRID = np.linspace(-1, 1, 4001)
COMPARED = 400
"""Most people with which the other methods are compared."""
FIRST = 100
"""Trials of a row, its first, in which they are."""
BLOCK = 50
"""Trials of true accept rates after which the results are written."""
FEW = ("wolves/120", "families/120", "wolves/400")
"""Rows of ``must_table``."""
Sums = dict[str, list[float]]
"""``statistic/rate/method`` → times that it held, sum of its widths (or values), trials."""


def main() -> int:
    """Simulate, resume and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--people", type=int, nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--trials", type=int, default=1000, help="of FMR and prediction")
    parser.add_argument("--tar-trials", type=int, default=400, help="of true accept rates")
    parser.add_argument("--resamples", type=int, default=100)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    found = json.loads(args.results.read_text()) if args.results.exists() else {"cells": {}}
    found["resamples"] = args.resamples
    for people in args.people:
        for name in args.scenarios:
            cell = found["cells"].setdefault(f"{name}/{people}", {"trials": 0, "tar_trials": 0})
            if args.trials > (0 if "trials" in cell.get("seen", ()) else cell["trials"]):
                sums, truth = fmr_row(name, people, args.trials)
                cell |= {"trials": args.trials, "fmr": sums, "truth": truth, "tar_trials": 0, "seen": []}
                args.results.write_text(json.dumps(found, indent=1) + "\n")
            if args.tar_trials and "tar_trials" in cell.get("seen", ()):
                cell |= {"tar_trials": 0, "seen": []}
            while (done := cell["tar_trials"]) < args.tar_trials:
                part = range(done, min(done + BLOCK, args.tar_trials))
                sums = tar_row(name, people, part, args.resamples, cell["truth"])
                cell["tar"] = merged(cell["tar"], sums) if done else sums
                cell["tar_trials"] = part.stop
                args.results.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


def merged(one: Sums, other: Sums) -> Sums:
    """Add up the trials of two parts of a row, one of which may have more methods."""
    none = [0, 0.0, 0]
    keys = {**one, **other}
    return {key: [a + b for a, b in zip(one.get(key, none), other.get(key, none), strict=True)] for key in keys}


@cache
def pilot(name: str, people: int) -> tuple[Doubles, float]:
    """Choose thresholds near the target rates, and a score below all of interest, from other people."""
    found = [
        rates(scored(*embeddings(SCENARIOS[name], people, seed), LOWEST[people]), targets(people))
        for seed in seeds(f"pilot {name}", people, PILOTS)
    ]
    thresholds = np.array([each.threshold for each in found])
    lowest = min(thresholds.min(), min(each.raw_threshold.min() for each in found))
    return thresholds.mean(axis=0), float(lowest) - (0.04 if people > COMPARED else 0.08)


def targets(people: int) -> Doubles:
    """Return the false match rates of a row."""
    return np.array(RATES[people])


def fmr_row(name: str, people: int, trials: int, *, others: bool = True) -> tuple[Sums, dict[str, list[float]]]:
    """Simulate one row: FMR, prediction, and what thresholds as a point and as a bound lead to.

    ``others``: also compute the intervals of the other methods.
    """
    scenario, goal = SCENARIOS[name], targets(people)
    fixed, lowest = pilot(name, people)
    sums: Sums = {}
    pooled = Pooled()
    observed: list[Doubles] = []
    held: list[list[dict[str, tuple[float, float]]]] = []
    own = []
    last: tuple[Doubles, list[dict[str, tuple[float, float]]]] | None = None
    for seed in seeds(name, people, trials + 1):
        scores = scored(*embeddings(scenario, people, seed), lowest)
        if last is not None:
            for fmr, fresh, methods in zip(goal, fmr_at(scores, last[0]), last[1], strict=True):
                for method, (low, high) in methods.items():
                    add(sums, f"prediction/{fmr:g}/{method}", low <= fresh <= high, high - low)
        if len(observed) == trials:
            break
        pooled.add(scores)
        at_fixed = fmr_at(scores, fixed)
        variance = fmr_variance(scores, matching(scores.impostor, fixed))
        observed.append(at_fixed)
        held.append(
            [
                _intervals(scores, float(fixed[k]), k, at_fixed, variance, seed, others and len(held) < FIRST)
                for k in range(len(goal))
            ]
        )
        measured = rates(scores, goal).threshold
        own_variance = fmr_variance(scores, matching(scores.impostor, measured))
        own_rate = fmr_at(scores, measured)
        predicted = []
        for k in range(len(goal)):
            seen = own_rate[k], own_variance.total[k], own_variance.people[k]
            factor = math.exp(student_quantile(float(seen[2])) * math.sqrt(2 * seen[1]) / seen[0])
            r, v, effective = map(float, seen)
            now = small_rate_interval(r, v, effective, float(own_variance.largest[k]), samples=2)
            predicted.append({"now": now, "before": (seen[0] / factor, seen[0] * factor)})
        last = measured, predicted
        own.append([_assured(scores, float(goal[k]), float(measured[k]), own_rate, own_variance, k) for k in range(2)])
    real = np.mean(observed, axis=0)
    for row in held:
        for fmr, truth, methods in zip(goal, real, row, strict=True):
            for method, (low, high) in methods.items():
                add(sums, f"FMR/{fmr:g}/{method}", low <= truth <= high, high - low)
    for row in own:
        for fmr, thresholds in zip(goal, row, strict=True):
            for kind, (threshold, tar) in thresholds.items():
                rate = pooled.fmr(threshold)
                add(sums, f"rate over target/{fmr:g}/{kind}", rate <= fmr, rate / fmr)
                add(sums, f"TAR at/{fmr:g}/{kind}", False, tar)
    return sums, pooled.truth(goal)


class Pooled:
    """Add up the curves of all trials of a row."""

    def __init__(self) -> None:
        self._curves = {key: np.zeros(len(GRID)) for key in ("FMR", "TAR", "raw FMR", "raw TAR")}
        self._totals = dict.fromkeys(self._curves, 0.0)

    def add(self, scores: PairScores) -> None:
        """Add one set of people."""
        p = scores.pairing
        has = p.genuine_per_identity > 0
        own = 1 / p.genuine_per_identity[scores.genuine_identity]
        for key, values, weight, total in (
            ("FMR", scores.impostor, scores.share, p.identity_pairs),
            ("raw FMR", scores.impostor, scores.weight, p.impostor_pairs),
            ("TAR", scores.genuine, own, np.count_nonzero(has)),
            ("raw TAR", scores.genuine, np.ones(len(own)), p.genuine_pairs),
        ):
            self._curves[key] += np.append(0.0, np.cumsum(weight))[matching(values, GRID)]
            self._totals[key] += total

    def _rate(self, key: str) -> Doubles:
        rate: Doubles = self._curves[key] / self._totals[key]
        return rate

    def fmr(self, threshold: float) -> float:
        """Return the true FMR of a threshold."""
        return float(np.interp(threshold, GRID, self._rate("FMR")))

    def truth(self, goal: Doubles) -> dict[str, list[float]]:
        """Return the true accept rates where the FMR is that of the target, balanced and raw."""
        found = {}
        for tar, fmr in (("TAR", "FMR"), ("raw TAR", "raw FMR")):
            at = np.interp(goal, self._rate(fmr)[::-1], GRID[::-1])
            found[tar] = np.interp(at, GRID, self._rate(tar)).tolist()
        return found


def add(sums: Sums, key: str, held: bool, width: float) -> None:
    """Count one trial."""
    one = sums.setdefault(key, [0, 0.0, 0])
    sums[key] = [one[0] + bool(held), one[1] + float(width), one[2] + 1]


def _intervals(
    scores: PairScores, threshold: float, k: int, rate: Doubles, variance: Any, seed: int, others: bool
) -> dict[str, tuple[float, float]]:
    """Compute the interval of the FMR by every method; none where nothing matches."""
    if rate[k] == 0:
        return {}
    n = scores.pairing.identities
    seen = [float(x) for x in (rate[k], variance.total[k], variance.people[k], variance.largest[k])]
    made = {"now": small_rate_interval(*seen)}
    if not others or n > 1.2 * COMPARED:
        return made | {"before": before(Seen(*seen, np.empty((0, 0), np.float32)))}
    matched = np.zeros((n, n), np.float32)
    here = slice(0, int(matching(scores.impostor, np.array([threshold]))[0]))
    a, b = (side[here] for side in scores.impostor_identities)
    np.add.at(matched, (a, b), scores.share[here])
    s = Seen(*seen, matched + matched.T)
    people = scores.impostor_identities
    return made | {
        "before": before(s),
        "gamma": gamma_exact(s),
        "gamma and one more person": fay_feuer(s),
        "jackknife": jackknife(s),
        "exponential tail": tail_model(
            scores.impostor, scores.share, people, threshold, float(scores.pairing.identity_pairs)
        ),
        **drawn_again(s, seed),
    }


def _assured(
    scores: PairScores, fmr: float, measured: float, rate: Doubles, variance: Any, k: int
) -> dict[str, tuple[float, float]]:
    """Find the thresholds for a rate as measured, as a point and as a bound, and the balanced TAR at each."""
    p, v = float(rate[k]), float(variance.total[k])
    bound = small_rate_interval(p, v, float(variance.people[k]), float(variance.largest[k]), probability=0.95)[1]
    point, kept = rates(scores, np.array([fmr / (1 + v / p**2), fmr * fmr / max(bound, fmr)])).threshold
    own = 1 / scores.pairing.genuine_per_identity[scores.genuine_identity]
    total = own.sum()
    return {
        kind: (float(t), float(own[: matching(scores.genuine, np.array([t]))[0]].sum() / total))
        for kind, t in (("measured", measured), ("point", point), ("bound", kept))
    }


def tar_row(name: str, people: int, trials: int | range, resamples: int, truth: dict[str, list[float]]) -> Sums:
    """Simulate one row of true accept rates."""
    scenario, goal = SCENARIOS[name], targets(people)
    _, lowest = pilot(name, people)
    sums: Sums = {}
    for seed in seeds(name, people, trials):
        scores = scored(*embeddings(scenario, people, seed), lowest)
        drawn = bootstrap(scores, goal, np.empty(0), resamples=resamples, seed=seed % 2**32)
        for k, fmr in enumerate(goal):
            if fmr < smallest_fmr(scores.pairing):
                continue
            for key, rate, samples, size in (
                ("TAR", drawn.observed_tar_balanced, drawn.tar_balanced, drawn.people[1]),
                ("raw TAR", drawn.observed_tar, drawn.tar, drawn.people[0]),
            ):
                low, high = proportion_intervals(rate[k : k + 1], samples[:, k : k + 1].var(axis=0), size)
                add(sums, f"{key}/{fmr:g}/now", low[0] <= truth[key][k] <= high[0], high[0] - low[0])
                low_before, high_before = interval(samples[:, k], size)
                held = low_before <= truth[key][k] <= high_before
                add(sums, f"{key}/{fmr:g}/before", held, high_before - low_before)
    return sums


def table(found: dict[str, Any]) -> str:
    """Write every table in Markdown."""
    return "\n\n".join([made(found) for made in (must_table, coverage_table, method_table, assurance_table)])


def must_table(found: dict[str, Any]) -> str:
    """Write coverage and width of every interval where few people decide, before and now."""
    rows = [key for key in FEW if key in found["cells"]]
    columns = [(key, f"{fmr:g}") for key in rows for fmr in RATES[int(key.partition("/")[2])]]
    heads = [f"{key.partition('/')[2]} {key.partition('/')[0]}, {fmr}" for key, fmr in columns]
    lines = [
        "Percent in which the interval held the truth, before → now, and its mean width, over the rate or in points:",
        "",
        f"| 95 % interval | {' | '.join(heads)} |",
        f"| --- |{' ---: |' * len(heads)}",
    ]
    for statistic in ("FMR", "prediction", "TAR", "raw TAR"):
        cells = []
        for key, fmr in columns:
            cell = found["cells"][key]
            both = cell.get("fmr", {}) | cell.get("tar", {})
            pairs = [both.get(f"{statistic}/{fmr}/{method}") for method in ("before", "now")]
            scale = 100 if "TAR" in statistic else 1 / float(fmr)
            digits = 1 if "TAR" in statistic else 2
            held = " → ".join(f"{100 * _mean(one, 0):.0f}" for one in pairs if one)
            width = " → ".join(f"{scale * _mean(one, 1):.{digits}f}" for one in pairs if one)
            cells.append(f"{held}; {width}" if held else "–")
        lines.append(f"| {statistic} | {' | '.join(cells)} |")
    return "\n".join(lines)


def coverage_table(found: dict[str, Any]) -> str:
    """Write the percent of the trials in which an interval held the truth, and its width, row by row."""
    cells = found["cells"]
    counted, tar = ({cell[key] for cell in cells.values() if cell[key]} for key in ("trials", "tar_trials"))
    errors = "; ".join(f"{n:,}: {_error(n)}" for n in sorted(counted | tar))
    lines = [
        "Percent of the trials in which a 95 % interval held the truth, before → now, at the first; the second rate of "
        "the row. *Trials*: of FMR and prediction; of TAR and raw TAR; †: of people who were seen while the methods "
        f"were chosen. One standard error in points, by trials: {errors}. Width: of the FMR's interval over the rate, "
        "and of the TAR's in points.",
        "",
        "| people | scenario | trials | at FMR | FMR | width | prediction | TAR | width | raw TAR |",
        "| ---: | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for people, name in ((people, name) for people in RATES for name in SCENARIOS):
        cell = cells.get(f"{name}/{people}", {"trials": 0})
        if not cell["trials"]:
            continue
        goal = [f"{fmr:g}" for fmr in RATES[people]]
        both = cell.get("fmr", {}) | cell.get("tar", {})

        def held(statistic: str, both: Sums = both, goal: list[str] = goal) -> str:
            keys = [[k for m in ("before", "now") if (k := f"{statistic}/{f}/{m}") in both] for f in goal]
            return "; ".join(" → ".join(f"{100 * _mean(both[k], 0):.0f}" for k in row) for row in keys if row) or "–"

        widths = ["; ".join(f"{_mean(both[f'FMR/{f}/now'], 1) / float(f):.2f}" for f in goal)]
        widths += ["; ".join(f"{100 * _mean(both[k], 1):.1f}" for f in goal if (k := f"TAR/{f}/now") in both) or "–"]
        lines.append(
            f"| {people} | {name} | {_counted(cell, 'trials')}; {_counted(cell, 'tar_trials')} | {'; '.join(goal)} | "
            f"{held('FMR')} | {widths[0]} | {held('prediction')} | {held('TAR')} | {widths[1]} | {held('raw TAR')} |"
        )
    return "\n".join(lines)


def method_table(found: dict[str, Any]) -> str:
    """Write for every method of the FMR's interval its coverage and width, over rows of the same size."""
    lines = [
        f"Intervals of the FMR by every method, over the rows of up to {COMPARED} people:",
        "",
        "| method | mean coverage, % | lowest of a row | mean width over the rate |",
        "| --- | ---: | ---: | ---: |",
    ]
    by_method: dict[str, list[tuple[float, float]]] = {}
    for key, cell in found["cells"].items():
        for name, one in cell.get("fmr", {}).items() if int(key.partition("/")[2]) <= COMPARED else ():
            statistic, fmr, method = name.split("/")
            if statistic == "FMR":
                by_method.setdefault(method, []).append((_mean(one, 0), _mean(one, 1) / float(fmr)))
    for method, pairs in by_method.items():
        covered, width = np.array(pairs).T
        lines.append(f"| {method} | {100 * covered.mean():.1f} | {100 * covered.min():.0f} | {width.mean():.2f} |")
    return "\n".join(lines)


def assurance_table(found: dict[str, Any]) -> str:
    """Write what thresholds as measured, as a point and as a bound lead to, by number of people."""
    lines = [
        "Thresholds for a target, over all scenarios: mean true rate over the target, percent of trials in which the "
        "true rate is no more than the target, and the balanced TAR that the threshold costs, in points:",
        "",
        "| people | target | measured | as a point | as a bound |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for people in RATES:
        for fmr in RATES[people]:
            texts = []
            for kind in ("measured", "point", "bound"):
                rows = [c["fmr"] for k, c in found["cells"].items() if k.endswith(f"/{people}") and "fmr" in c]
                if not rows:
                    break
                rate = np.array([[_mean(r[f"rate over target/{fmr:g}/{kind}"], i) for i in (0, 1)] for r in rows])
                tar = np.mean(
                    [_mean(r[f"TAR at/{fmr:g}/measured"], 1) - _mean(r[f"TAR at/{fmr:g}/{kind}"], 1) for r in rows]
                )
                cost = "" if kind == "measured" else f", −{100 * tar:.1f}"
                texts.append(f"{rate[:, 1].mean():.3f}, {100 * rate[:, 0].mean():.0f} %{cost}")
            if texts:
                lines.append(f"| {people} | {fmr:g} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _counted(cell: dict[str, Any], key: str) -> str:
    """Write a number of trials, marked where their people are no fresh ones."""
    return f"{cell[key]}{'†' if key in cell.get('seen', ()) else ''}"


def _mean(one: list[float], place: int) -> float:
    return float(one[place] / max(one[2], 1))


def _error(trials: int) -> str:
    return f"{100 * math.sqrt(0.95 * 0.05 / max(trials, 1)):.1f}"


if __name__ == "__main__":
    sys.exit(main())
