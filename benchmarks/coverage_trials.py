"""Simulate evaluations of people whose true rates are known, for benchmarks/coverage.py.

A ``Row`` is one scenario at one number of people. Its trials draw fresh people each; what they show is kept trial by
trial, so that a row goes on where it stopped, and is judged against what all of them measure together.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from interval_methods import Seen, before, drawn_again, fay_feuer, gamma_exact, jackknife, tail_model
from shared_resamples import accepted
from simulated_people import SCENARIOS, embeddings, scored, seeds

from pkd.toolkit.certificates.certificate import Interval
from pkd.toolkit.evaluation.metrics.bootstrap import FmrVariance, fmr_variance, interval
from pkd.toolkit.evaluation.metrics.error_rates import fmr_at, matching, rates, smallest_fmr
from pkd.toolkit.evaluation.metrics.intervals import (
    effective,
    proportion_intervals,
    small_rate_interval,
    student_quantile,
)
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores
from pkd.toolkit.evaluation.metrics.pairing import Doubles

RATES = {60: (1e-1, 1e-2), 120: (1e-1, 1e-2), 400: (1e-2, 1e-3), 2000: (1e-3, 1e-4)}
"""False match rates by number of people, who resolve them."""
SMALLEST = {60: (5.7e-3,), 120: (1.41e-3,), 400: (1.26e-4,), 2000: (5.1e-6,)}
"""About the smallest rates that ``smallest_fmr`` lets these people resolve."""
LOWEST = {60: -0.2, 120: -0.2, 400: 0.2, 2000: 0.6}
"""Score below any threshold of interest, by number of people."""
PILOTS = 12
GRID = np.linspace(-1, 1, 4001)
COMPARED = 400
"""Most people with which the other methods are compared."""
FIRST = 100
"""Trials of a row, its first, in which they are."""
Sums = dict[str, list[float]]
"""``statistic/rate/method`` → times that it held, sum of its widths (or values), trials."""
Ends = dict[str, Interval]
"""Method → interval."""


@dataclass
class Row:
    """Hold the trials of one scenario at one number of people."""

    name: str
    people: int
    rates: list[float]
    """False match rates that thresholds are found for."""
    fixed: list[float]
    """Thresholds near the target rates that were found on other people."""
    lowest: float
    """Score below all of interest."""
    fmr: list[dict[str, Any]] = field(default_factory=list)
    """Each trial: FMR at the fixed thresholds, intervals, predictions, thresholds of its own and what they assure."""
    tar: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    """Each trial: ``statistic/rate`` → the true accept rate, its variance over resamples, effective people."""
    curves: dict[str, list[float]] = field(default_factory=dict)
    """FMR, TAR and the raw ones at the scores of ``GRID``, added up over the trials of ``fmr``."""

    @property
    def goal(self) -> Doubles:
        """Return the false match rates of the row."""
        return np.array(self.rates)

    def extend(self, fmr: int, tar: int, *, resamples: int = 100, most: int = 10**9, others: bool = True) -> bool:
        """Simulate up to ``most`` more trials, until ``fmr`` and ``tar`` are there → whether some are still to do.

        ``others``: also compute the intervals of the other methods. One draw of people serves both kinds of trials.
        """
        for _ in range(most):
            wanted = [len(done) for done, end in ((self.fmr, fmr), (self.tar, tar)) if len(done) < end]
            if not wanted:
                return False
            number = min(wanted)
            (seed,) = seeds(self.name, self.people, range(number, number + 1))
            scores = scored(*embeddings(SCENARIOS[self.name], self.people, seed), self.lowest)
            if number == len(self.fmr) < fmr:
                self._measure(scores, seed, others=others and number < FIRST)
            if number == len(self.tar) < tar:
                self.tar.append(resampled(scores, self.goal, resamples, seed))
        return len(self.fmr) < fmr or len(self.tar) < tar

    def _measure(self, scores: PairScores, seed: int, *, others: bool) -> None:
        """Add a trial of FMR, prediction, and what thresholds as a point and as a bound lead to."""
        fixed = np.array(self.fixed)
        at_fixed = fmr_at(scores, fixed)
        variance = fmr_variance(scores, matching(scores.impostor, fixed))
        measured = rates(scores, self.goal).threshold
        own = fmr_at(scores, measured)
        own_variance = fmr_variance(scores, matching(scores.impostor, measured))
        previous = np.array(self.fmr[-1]["thresholds"]) if self.fmr else measured[:0]
        for key, curve in curves(scores).items():
            self.curves[key] = (np.array(self.curves.get(key, 0.0)) + curve).tolist()
        both = range(len(self.goal))
        self.fmr.append(
            {
                "fixed": at_fixed.tolist(),
                "intervals": [
                    _intervals(scores, float(fixed[k]), _seen(at_fixed, variance, k), seed, others) for k in both
                ],
                "thresholds": measured.tolist(),
                "predicted": [_predicted(*_seen(own, own_variance, k)) for k in both],
                "before": fmr_at(scores, previous).tolist(),
                "assured": [
                    _assured(scores, fmr, t, _seen(own, own_variance, k))
                    for k, (fmr, t) in enumerate(zip(self.goal.tolist(), measured.tolist(), strict=True))
                ],
            }
        )

    def fmr_sums(self) -> Sums:
        """Judge intervals by the mean FMR of all trials, predictions by the next one, thresholds by their true FMR."""
        sums: Sums = {}
        rates_of_grid = self._mean("FMR")
        real = np.mean([one["fixed"] for one in self.fmr], axis=0)
        for number, one in enumerate(self.fmr):
            for k, fmr in enumerate(self.goal):
                for method, (low, high) in one["intervals"][k].items():
                    add(sums, f"FMR/{fmr:g}/{method}", low <= real[k] <= high, high - low)
                for method, (low, high) in self.fmr[number - 1]["predicted"][k].items() if number else ():
                    add(sums, f"prediction/{fmr:g}/{method}", low <= one["before"][k] <= high, high - low)
                for kind, (threshold, tar) in one["assured"][k].items():
                    rate = float(np.interp(threshold, GRID, rates_of_grid))
                    add(sums, f"rate over target/{fmr:g}/{kind}", rate <= fmr, rate / fmr)
                    add(sums, f"TAR at/{fmr:g}/{kind}", False, tar)
        return sums

    def tar_sums(self, truth: dict[str, list[float]]) -> Sums:
        """Judge the intervals of true accept rates by ``truth``."""
        sums: Sums = {}
        for key in sorted({key for one in self.tar for key in one}):
            statistic, _, fmr = key.partition("/")
            real = truth[statistic][self.rates.index(float(fmr))]
            trials = [one[key] for one in self.tar if key in one]
            rate, variance, people = (np.array([one[n] for one in trials]) for n in ("rate", "variance", "people"))
            now = zip(*proportion_intervals(rate, variance, people), strict=True)
            for method, ends in (("now", now), ("before", (one["before"] for one in trials))):
                for low, high in ends:
                    add(sums, f"{key}/{method}", low <= real <= high, high - low)
        return sums

    def truth(self) -> dict[str, list[float]]:
        """Return the true accept rates where the FMR is that of the target, balanced and raw."""
        found = {}
        for tar, fmr in (("TAR", "FMR"), ("raw TAR", "raw FMR")):
            at = np.interp(self.goal, self._mean(fmr)[::-1], GRID[::-1])
            found[tar] = np.interp(at, GRID, self._mean(tar)).tolist()
        return found

    def _mean(self, key: str) -> Doubles:
        mean: Doubles = np.array(self.curves[key]) / self.curves[f"all {key}"]
        return mean

    def save(self, file: Path) -> None:
        """Write all trials, so that ``opened`` goes on after them."""
        part = file.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)), encoding="utf-8")
        part.replace(file)


def opened(name: str, people: int, file: Path | None = None, *, smallest: bool = False) -> Row:
    """Read a row that ``save`` wrote, or begin one, at ``RATES`` or at the ``smallest`` that are resolved."""
    if file is not None and file.exists():
        return Row(**json.loads(file.read_text(encoding="utf-8")))
    goal = (SMALLEST if smallest else RATES)[people]
    fixed, lowest = pilot(name, people, goal)
    return Row(name, people, list(goal), fixed.tolist(), lowest)


@cache
def pilot(name: str, people: int, goal: tuple[float, ...]) -> tuple[Doubles, float]:
    """Choose thresholds near the target rates, and a score below all of interest, from other people."""
    found = [
        rates(scored(*embeddings(SCENARIOS[name], people, seed), LOWEST[people]), np.array(goal))
        for seed in seeds(f"pilot {name}", people, PILOTS)
    ]
    thresholds = np.array([each.threshold for each in found])
    lowest = min(thresholds.min(), min(each.raw_threshold.min() for each in found))
    lowest -= 0.025 if people > COMPARED else 0.08
    assert lowest > LOWEST[people], "score more pairs of images"
    return thresholds.mean(axis=0), float(lowest)


def targets(people: int) -> Doubles:
    """Return the false match rates of a row."""
    return np.array(RATES[people])


def curves(scores: PairScores) -> dict[str, Doubles]:
    """Count what matches at the scores of ``GRID``, and (``all …``) what there is, by rate."""
    p = scores.pairing
    own = 1 / p.genuine_per_identity[scores.genuine_identity]
    found = {}
    for key, values, weight, total in (
        ("FMR", scores.impostor, scores.share, p.identity_pairs),
        ("raw FMR", scores.impostor, scores.weight, p.impostor_pairs),
        ("TAR", scores.genuine, own, np.count_nonzero(p.genuine_per_identity)),
        ("raw TAR", scores.genuine, np.ones(len(own)), p.genuine_pairs),
    ):
        found[key] = np.append(0.0, np.cumsum(weight))[matching(values, GRID)]
        found[f"all {key}"] = np.array([float(total)])
    return found


def add(sums: Sums, key: str, held: bool, width: float) -> None:
    """Count one trial."""
    one = sums.setdefault(key, [0, 0.0, 0])
    sums[key] = [one[0] + bool(held), one[1] + float(width), one[2] + 1]


def merged(one: Sums, other: Sums) -> Sums:
    """Add up the trials of two parts of a row, one of which may have more methods."""
    none = [0, 0.0, 0]
    keys = {**one, **other}
    return {key: [a + b for a, b in zip(one.get(key, none), other.get(key, none), strict=True)] for key in keys}


def _seen(rate: Doubles, variance: FmrVariance, k: int) -> tuple[float, float, float, float]:
    """Take rate, variance, effective people and the most influential one's part at threshold ``k``."""
    return float(rate[k]), float(variance.total[k]), float(variance.people[k]), float(variance.largest[k])


def _predicted(rate: float, variance: float, people: float, largest: float) -> Ends:
    """Compute the interval of what the next people will measure."""
    factor = math.exp(student_quantile(people) * math.sqrt(2 * variance) / rate)
    now = small_rate_interval(rate, variance, people, largest, samples=2)
    return {"now": now, "before": (rate / factor, rate * factor)}


def _intervals(
    scores: PairScores, threshold: float, seen: tuple[float, float, float, float], seed: int, others: bool
) -> Ends:
    """Compute the interval of the FMR by every method; none where nothing matches."""
    if seen[0] == 0:
        return {}
    n = scores.pairing.identities
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
    scores: PairScores, fmr: float, measured: float, seen: tuple[float, float, float, float]
) -> dict[str, tuple[float, float]]:
    """Find the thresholds for a rate as measured, as a point and as a bound, and the balanced TAR at each."""
    p, v = seen[:2]
    bound = small_rate_interval(*seen, probability=0.95)[1]
    point, kept = rates(scores, np.array([fmr / (1 + v / p**2), fmr * fmr / max(bound, fmr)])).threshold
    own = 1 / scores.pairing.genuine_per_identity[scores.genuine_identity]
    total = own.sum()
    return {
        kind: (float(t), float(own[: matching(scores.genuine, np.array([t]))[0]].sum() / total))
        for kind, t in (("measured", measured), ("point", point), ("bound", kept))
    }


def resampled(scores: PairScores, goal: Doubles, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Measure balanced and raw TAR, and their variance over resamples, at each rate that the people resolve."""
    pairs = scores.pairing.genuine_per_identity
    size = {"TAR": float(np.count_nonzero(pairs)), "raw TAR": effective(pairs)}
    return {
        f"{key}/{goal[k]:g}": {
            "rate": float(rate[k]),
            "variance": float(samples[:, k].var()),
            "people": size[key],
            "before": interval(samples[:, k], size[key]),
        }
        for key, (rate, samples) in accepted(scores, goal, resamples=resamples, seed=seed % 2**32).items()
        for k in np.flatnonzero(goal >= smallest_fmr(scores.pairing)).tolist()
    }
