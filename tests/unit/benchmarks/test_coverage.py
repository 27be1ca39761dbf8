"""The intervals hold the truth about as often as they say, for people who differ as real ones do."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from pkd.toolkit.evaluation.metrics.bootstrap import bootstrap
from pkd.toolkit.evaluation.metrics.error_rates import rates

ROOT = Path(__file__).resolve().parents[3]
FOUND = json.loads((ROOT / "benchmarks/results/coverage.json").read_text(encoding="utf-8"))
MODULES = (
    "coverage",
    "coverage_trials",
    "interval_methods",
    "paired_tests",
    "shared_resamples",
    "simulated_people",
    "gate_errors",
)
SCENARIOS = ("alike", "near one", "power law", "wolves", "families", "ties", "cameras", "labels")


@pytest.fixture
def coverage(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import the benchmark as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in MODULES:
        sys.modules.pop(name, None)
    coverage = importlib.import_module("coverage")
    yield coverage
    for name in MODULES:
        sys.modules.pop(name, None)


SOAK = [(60, 1000, 300), (120, 1000, 200), (400, 300, 100), (2000, 100, 60)]
"""People, trials and trials of true accept rates of the long form."""
LEAST = 0.94
"""Coverage that every row of the long form has, or more."""


def fewest(trials: int) -> int:
    """Return how often an interval holds at least, but in one of 10,000 rows whose true coverage is ``LEAST``."""
    return int(binom.ppf(1e-4, trials, LEAST))


@pytest.mark.soak
@pytest.mark.parametrize("name", SCENARIOS)
def test_intervals_hold_the_truth(coverage: ModuleType, name: str, soak: bool) -> None:
    """See 24 of 30 trials hold where 19 of 20 should; the long form runs every size."""
    for people, trials, tar_trials in SOAK if soak else [(60, 30, 8 if name in ("near one", "wolves") else 0)]:
        row = coverage.opened(name, people)
        row.extend(trials, tar_trials, resamples=100 if soak else 60, others=False)
        sums = row.fmr_sums() | row.tar_sums(row.truth())
        for fmr in coverage.RATES[people]:
            for statistic in ("FMR", "prediction", *(("TAR", "raw TAR") if tar_trials else ())):
                held, width, count = sums[f"{statistic}/{fmr:g}/now"]
                wanted = tar_trials if "TAR" in statistic else trials
                least = fewest(count) if soak else 0.6 * count if "TAR" in statistic else 0.8 * count
                assert count >= wanted - 1 and held >= least, (people, statistic, fmr, held, count)
                assert "TAR" not in statistic or width / count > 0.005
            over = {kind: sums[f"rate over target/{fmr:g}/{kind}"] for kind in ("measured", "point", "bound")}
            assert over["point"][1] / over["point"][2] <= (1.05 if soak else 1.1)
            assert over["bound"][0] >= (fewest(trials) if soak else 0.8 * trials)


def test_a_row_goes_on_where_it_stopped(coverage: ModuleType, tmp_path: Path) -> None:
    """Count the trials of two halves, one of them read from its file, as those of a row in one go."""
    whole = coverage.opened("wolves", 60)
    assert not whole.extend(5, 4, resamples=20, others=False)
    half = coverage.opened("wolves", 60, tmp_path / "row.json")
    assert half.extend(5, 4, resamples=20, most=3, others=False)
    half.save(tmp_path / "row.json")
    other = coverage.opened("wolves", 60, tmp_path / "row.json")
    assert not other.extend(5, 4, resamples=20, others=False)
    assert other.truth() == whole.truth()
    assert other.fmr_sums() | other.tar_sums(other.truth()) == whole.fmr_sums() | whole.tar_sums(whole.truth())


@pytest.mark.parametrize("name", ["wolves", "ties"])
def test_shared_resamples_are_those_of_the_bootstrap(coverage: ModuleType, name: str) -> None:
    people, resampled = importlib.import_module("simulated_people"), importlib.import_module("shared_resamples")
    scores, goal = people.scored(*people.embeddings(people.SCENARIOS[name], 60, 3), 0.0), np.array([0.1, 0.01])
    drawn = bootstrap(scores, goal, np.empty(0), resamples=60, seed=3)
    found = resampled.accepted(scores, goal, resamples=60, seed=3)
    for rate, samples, key in (
        (drawn.observed_tar_balanced, drawn.tar_balanced, "TAR"),
        (drawn.observed_tar, drawn.tar, "raw TAR"),
    ):
        np.testing.assert_allclose(found[key][0], rate, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found[key][1], samples, rtol=0, atol=1e-12)
        assert samples.std(axis=0).min() > 0


CLAIMS = {40: 8, 600: 53}
"""Most claims by number of comparisons of 5 % each. So many counts exceed it in fewer than one of 1,000 cases:"""
COUNTS = {40: 6, 600: 24}


def test_the_limits_of_claims_are_those_of_the_binomial() -> None:
    for trials, most in CLAIMS.items():
        counts = COUNTS[trials]
        assert counts * binom.sf(most, trials, 0.05) < 1e-3 <= counts * binom.sf(most - 1, trials, 0.05)


@pytest.mark.soak
@pytest.mark.parametrize("part", [0, 1])
def test_equally_good_encoders_are_seldom_said_to_differ(coverage: ModuleType, part: int, soak: bool) -> None:
    """Count claims of fixed people; the long form tells 9 % from 5 %, and 2 % from 4 %, in half of the scenarios."""
    paired_tests = importlib.import_module("paired_tests")
    people, trials = (120, 600) if soak else (60, 40)
    for name in SCENARIOS[4 * part : 4 * part + 4] if soak else ("alike", "families")[part : part + 1]:
        sums = paired_tests.size_row(name, people, range(trials), 0)
        for statistic in (*(f"{fmr:g}" for fmr in coverage.RATES[people]), "accuracy"):
            claimed, _, count = sums[f"{statistic}/now"]
            assert count == trials and claimed <= CLAIMS[trials], (name, statistic)
        claimed, _, count = sums.get("0.01/signs", (0, 0, 0))
        assert not soak or count < trials // 2 or claimed / count >= 0.02, name


def test_pairs_that_are_taken_to_be_independent_claim_more_than_that(coverage: ModuleType) -> None:
    """Plant the fault that the limit is there for: McNemar's test of pairs, on the same people as above."""
    people, trials = importlib.import_module("simulated_people"), importlib.import_module("coverage_trials")
    goal, (_, lowest) = trials.targets(60), trials.pilot("families", 60, trials.RATES[60])
    claimed = 0
    for seed in people.seeds("two encoders families", 60, 40):
        accepted = []
        for encoder in (0, 1):
            made = people.embeddings(people.SCENARIOS["families"], 60, seed, encoder=encoder)
            scores = people.scored(*made, lowest)
            order = np.lexsort((scores.genuine_gallery, scores.genuine_query))
            accepted.append((scores.genuine >= rates(scores, goal).threshold[1])[order])
        one, other = (int((accepted[a] & ~accepted[1 - a]).sum()) for a in (0, 1))
        claimed += one + other > 0 and binomtest(one, one + other).pvalue <= 0.05
    assert claimed > CLAIMS[40]


def test_no_figure_of_fresh_people_is_below_its_promise() -> None:
    """Hold what evidence.md says: over all figures at once, none is below 95 % at the level of 5 %."""
    counts = []
    for cell in [*FOUND["cells"].values(), *FOUND.get("smallest", {}).values()]:
        for kind, part in (("trials", "fmr"), ("tar_trials", "tar")):
            for key, (held, _, trials) in cell.get(part, {}).items() if kind not in cell.get("seen", ()) else ():
                if key.endswith("/now") or (key.endswith("/bound") and key.startswith("rate")):
                    counts.append((held, trials))
    assert len(counts) >= 250
    assert min(binom.cdf(held, trials, 0.95) for held, trials in counts) > 0.05 / len(counts)


def test_the_tables_of_evidence_are_those_of_the_results(coverage: ModuleType) -> None:
    text = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    tables = (coverage.must_table, coverage.coverage_table, coverage.method_table, coverage.assurance_table)
    for table in (coverage.range_table, *tables):
        assert table(FOUND) in text, (
            "python benchmarks/coverage.py --trials 0, and copy its tables into docs/evidence.md"
        )


def test_the_tables_of_paired_comparisons_are_those_of_the_results(coverage: ModuleType) -> None:
    paired_tests = importlib.import_module("paired_tests")
    text = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks/results/paired_tests.json").read_text(encoding="utf-8"))
    for table in (paired_tests.size_table, paired_tests.method_table, paired_tests.power_table):
        assert table(found) in text, (
            "python benchmarks/paired_tests.py --trials 0 --power-trials 0, and copy its tables into docs/evidence.md"
        )


def test_the_table_of_the_gate_is_that_of_the_results(coverage: ModuleType) -> None:
    gate_errors = importlib.import_module("gate_errors")
    found = json.loads((ROOT / "benchmarks/results/gate_errors.json").read_text(encoding="utf-8"))
    assert gate_errors.table(found) in (ROOT / "docs/evidence.md").read_text(encoding="utf-8"), (
        "python benchmarks/gate_errors.py --trials 0, and copy its table into docs/evidence.md"
    )
