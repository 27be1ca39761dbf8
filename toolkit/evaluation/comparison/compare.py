"""Compare evaluations over the same pairs: rank them, with a paired interval and a p-value for every difference."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import combinations

from pkd.toolkit.core.cli_support import tool_version
from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.comparison.load import Run
from pkd.toolkit.evaluation.comparison.ranking import Measured, Ranked, Ranking, Versus
from pkd.toolkit.evaluation.comparison.statistics import STATISTICS, Found, Statistic
from pkd.toolkit.evaluation.metrics.paired import holm, paired_difference
from pkd.toolkit.evaluation.results.schema import Evaluation, PairedDifference


def rank(runs: Sequence[Run], *, by: str | None = None, cell: str | None = None, at: float | None = None) -> Ranking:
    """Rank by one of ``STATISTICS``: identity-balanced TAR, or for pair lists accuracy, where ``by`` is None.

    ``cell``: as ``S–T`` or ``S-T``; by default S–T where a run has it, else T–T. ``at``: target FMR (or FPIR); by
    default the smallest that every run resolves. Raises InputError where a run lacks what is ranked by.
    """
    by = by or next((name for name, s in STATISTICS.items() if s.find(runs[0].evaluation)), "tar")
    statistic = STATISTICS[by]
    found = [statistic.find(run.evaluation) for run in runs]
    cell = _cell(runs, [list(cells) for cells in found], by, cell)
    target = _target(runs, [cells[cell] for cells in found], statistic, cell, at)
    key = f"{cell}/{statistic.key.format(f'{target:g}' if target is not None else '')}"
    for run in runs:
        if key not in run.draws.values:
            raise InputError(f"{run.folder}: its draws.npz holds no {key}. Run pkd-evaluate again.")
    measured = {run.name: cells[cell][target] for run, cells in zip(runs, found, strict=True)}
    sign = 1 if statistic.falls else -1
    order = sorted(runs, key=lambda run: sign * measured[run.name][0].value)
    pairs = list(combinations(order, 2))
    differences = [
        paired_difference(
            a.draws.values[key],
            b.draws.values[key],
            observed=measured[a.name][0].value - measured[b.name][0].value,
        )
        for a, b in pairs
    ]
    adjusted = holm([d.p for d in differences])
    best = order[0]
    behind = {
        b.name: (_turned(difference), p)
        for (a, b), difference, p in zip(pairs, differences, adjusted, strict=True)
        if a is best
    }
    e = best.evaluation
    return Ranking(
        tool=tool_version(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cell=cell,
        by=by,
        target=target,
        data=e.data,
        protocol=e.protocol,
        synthetic=any(run.evaluation.synthetic for run in runs),
        resamples=e.resamples,
        seed=e.seed,
        runs=tuple(_ranked(run, cell, *measured[run.name], behind.get(run.name)) for run in order),
        pairs=tuple(
            Versus(a=a.name, b=b.name, difference=difference, p_adjusted=p)
            for (a, b), difference, p in zip(pairs, differences, adjusted, strict=True)
        ),
        smallest_p=min(1.0, len(pairs) * 2 / (len(best.draws.values[key]) + 1)),
    )


def _cell(runs: Sequence[Run], has: list[list[str]], by: str, wanted: str | None) -> str:
    cell = wanted.replace("-", "–") if wanted else "S–T" if any("S–T" in cells for cells in has) else "T–T"
    shared = [name for name in has[0] if all(name in cells for cells in has)]
    for run, cells in zip(runs, has, strict=True):
        if not cells:
            raise InputError(f"{run.name}: nothing in it to rank --by {by}. Leave it out, or pass another --by.")
        if cell not in cells:
            remedy = f"Pass --cell {shared[0].replace('–', '-')}" if shared else "Leave it out"
            raise InputError(f"{run.name}: has no {cell} (it has {', '.join(cells)}). {remedy}.")
    return cell


def _target(
    runs: Sequence[Run], found: list[Found], statistic: Statistic, cell: str, wanted: float | None
) -> float | None:
    shared = set.intersection(*(set(targets) for targets in found))
    if not statistic.target:
        if wanted is not None:
            raise InputError(f"--fmr {wanted:g}: the {statistic.words} has no such target. Drop it.")
        return None
    rates = sorted(rate for rate in shared if rate is not None)
    if wanted in rates:
        return wanted
    if wanted is None and rates:
        return rates[0]
    if wanted is None:
        raise InputError(f"{cell}: no {statistic.target} is resolved in every run. Evaluate all on the same people.")
    lacking = next(run.name for run, targets in zip(runs, found, strict=True) if wanted not in targets)
    have = ", ".join(f"{rate:g}" for rate in rates) or "none"
    raise InputError(f"--fmr {wanted:g}: {lacking} was not measured at it. Measured in every run: {have}.")


def _turned(d: PairedDifference) -> PairedDifference:
    """B − A from A − B."""
    return PairedDifference(difference=0.0 - d.difference, ci95=(0.0 - d.ci95[1], 0.0 - d.ci95[0]), p=d.p)


def _ranked(
    run: Run, cell: str, first: Measured, raw: Measured | None, behind: tuple[PairedDifference, float] | None
) -> Ranked:
    e = run.evaluation
    letter, encoder = _query(e, cell)
    galleries = [(c.name, c.gallery) for c in e.comparisons]
    galleries += [(a.name, a.gallery) for a in e.pair_accuracies]
    galleries += [(i.name, i.gallery) for i in e.identifications]
    return Ranked(
        name=run.name,
        encoder=encoder,
        gallery=dict(galleries)[cell],
        training=e.training.get(letter),
        flip=e.flip,
        first=first,
        raw=raw,
        behind_best=behind[0] if behind else None,
        p_adjusted=behind[1] if behind else None,
        comparison=next((c for c in e.comparisons if c.name == cell), None),
    )


def _query(e: Evaluation, cell: str) -> tuple[str, EncoderInfo]:
    """Letter and encoder of the query side; P and R are the control, mapped."""
    if cell[0] == "S" and e.student:
        return "S", e.student
    if cell[0] in "CPR" and e.control:
        return "C", e.control.encoder
    return "T", e.teacher
