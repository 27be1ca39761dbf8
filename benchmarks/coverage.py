"""How often 95 % intervals hold the truth: simulated people who differ as real ones do.

Run as: python benchmarks/coverage.py                      (hours of a core; goes on where it stopped)
        python benchmarks/coverage.py --scenarios wolves --people 120 --trials 1000 --tar-trials 400

The people are those of ``benchmarks/simulated_people.py``, fresh ones in every trial. The truth is what all trials of a
row measure together: the FMR at a threshold that is fixed beforehand, the true rate of each trial's own thresholds, and
the true accept rates where the FMR is the target. A prediction is right where the next trial's people measure an FMR
inside it, at the threshold of the trial's own people. ``benchmarks/interval_methods.py`` has the other methods, which
the first trials of a row are given to. True accept rates need resamples, so that they may get fewer trials. Paired
comparisons are in ``benchmarks/paired_tests.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from coverage_trials import COMPARED, RATES, SMALLEST, Row, Sums, opened
from simulated_people import SCENARIOS

RESULTS = Path(__file__).resolve().parent / "results" / "coverage.json"
TRIALS = Path(tempfile.gettempdir()) / "pkd-coverage"
BLOCK = 50
"""Trials after which they are written."""
FEW = ("wolves/120", "families/120", "wolves/400")
"""Rows of ``must_table``."""


def main() -> int:
    """Simulate, resume and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--people", type=int, nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--trials", type=int, default=1000, help="of FMR and prediction")
    parser.add_argument("--tar-trials", type=int, default=400, help="of true accept rates")
    parser.add_argument("--resamples", type=int, default=100)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--keep", type=Path, default=TRIALS, help="folder of single trials, to go on from")
    parser.add_argument("--smallest", action="store_true", help="at the smallest rate that the people resolve")
    args = parser.parse_args()
    found = json.loads(args.results.read_text()) if args.results.exists() else {"cells": {}}
    found["resamples"] = args.resamples
    args.keep.mkdir(parents=True, exist_ok=True)
    for people in args.people:
        for name in args.scenarios:
            cell = found.setdefault("smallest" if args.smallest else "cells", {}).setdefault(
                f"{name}/{people}", {"trials": 0, "tar_trials": 0}
            )
            fmr, tar = (_still_to_do(cell, *one) for one in (("trials", args.trials), ("tar_trials", args.tar_trials)))
            if not fmr and not tar:
                continue
            file = args.keep / f"{name}-{people}{'-smallest' if args.smallest else ''}.json"
            row, more = opened(name, people, file, smallest=args.smallest), True
            while more:
                more = row.extend(fmr, tar, resamples=args.resamples, most=BLOCK, others=not args.smallest)
                row.save(file)
                take_over(cell, row)
                args.results.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


def take_over(cell: dict[str, Any], row: Row) -> None:
    """Replace what a cell says by the trials of a row: where these are more, or the cell's people no fresh ones."""
    if len(row.fmr) > _fresh(cell, "trials"):
        cell |= {"trials": len(row.fmr), "fmr": row.fmr_sums(), "truth": row.truth()}
        cell["seen"] = [key for key in cell.get("seen", ()) if key != "trials"]
    if len(row.tar) > _fresh(cell, "tar_trials") or (row.tar and len(row.tar) == cell["tar_trials"]):
        cell |= {"tar_trials": len(row.tar), "tar": row.tar_sums(cell["truth"])}
        cell["seen"] = [key for key in cell.get("seen", ()) if key != "tar_trials"]


def _seen(cell: dict[str, Any]) -> bool:
    """Say whether some people of a cell were seen while the methods were chosen."""
    return bool(cell.get("seen"))


def _fresh(cell: dict[str, Any], key: str) -> int:
    """Count a cell's trials of people who were not seen while the methods were chosen."""
    return 0 if key in cell.get("seen", ()) else int(cell[key])


def _still_to_do(cell: dict[str, Any], key: str, trials: int) -> int:
    """Return the number of trials to reach; 0 where a cell has them."""
    return trials if trials > _fresh(cell, key) else 0


def table(found: dict[str, Any]) -> str:
    """Write every table in Markdown."""
    return "\n\n".join(
        [made(found) for made in (range_table, must_table, coverage_table, method_table, assurance_table)]
    )


def range_table(found: dict[str, Any]) -> str:
    """Write by number of people how often intervals held: the mean of all scenarios, the lowest and the highest."""
    lines = [
        "Percent of the trials in which a 95 % interval held the truth, by number of people: mean of all scenarios "
        "(lowest to highest row). In brackets: the fewest trials of a row, and one standard error of a row in points "
        "where 95 % is right. Below: the smallest rates that so many people resolve.",
        "",
        "| people | at FMR | FMR | prediction | bound kept | of | TAR | raw TAR | of |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for people, goals, cells in (
        (people, goals, _of(found.get(part, {}), people))
        for part, sizes in (("cells", RATES), ("smallest", SMALLEST))
        for people, goals in sizes.items()
    ):
        texts = []
        for kind, names in (
            ("trials", ("FMR/{}/now", "prediction/{}/now", "rate over target/{}/bound")),
            ("tar_trials", ("TAR/{}/now", "raw TAR/{}/now")),
        ):
            texts += [_range(cells, [name.format(f"{fmr:g}") for fmr in goals]) for name in names]
            fewest = min((cell[kind] for cell in cells), default=0)
            texts.append(f"[{fewest:,}: {_error(fewest)}]" if fewest else "–")
        if cells:
            lines.append(f"| {people} | {'; '.join(f'{fmr:g}' for fmr in goals)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _range(cells: list[dict[str, Any]], keys: list[str]) -> str:
    """Write the mean, the lowest and the highest percent of these statistics over cells."""
    both = [cell["fmr"] | cell.get("tar", {}) for cell in cells]
    rows = [100 * _mean(one[key], 0) for one in both for key in keys if key in one]
    return f"{np.mean(rows):.1f} ({min(rows):.1f}–{max(rows):.1f})" if rows else "–"


def _of(cells: dict[str, Any], people: int) -> list[dict[str, Any]]:
    """List the cells of a number of people that have trials."""
    return [cell for key, cell in cells.items() if key.endswith(f"/{people}") and cell["trials"]]


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
    seen = "; †: of people who were seen while the methods were chosen" if any(map(_seen, cells.values())) else ""
    lines = [
        "Percent of the trials in which a 95 % interval held the truth, before → now, at the first; the second rate of "
        f"the row. *Trials*: of FMR and prediction; of TAR and raw TAR{seen}. One standard error in points, by trials: "
        f"{errors}. Width: of the FMR's interval over the rate, and of the TAR's in points.",
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
