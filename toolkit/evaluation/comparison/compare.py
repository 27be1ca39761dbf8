"""Compare evaluations over the same pairs: rank them, with a paired interval and a p-value for every difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import combinations

from pkd.toolkit.certificates.certificate import Interval
from pkd.toolkit.core.cli_support import tool_version
from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.models import Record
from pkd.toolkit.evaluation.comparison.load import Run
from pkd.toolkit.evaluation.metrics.paired import FLIPS, Contributions, paired
from pkd.toolkit.evaluation.metrics.resamples import holm
from pkd.toolkit.evaluation.results.schema import Comparison, Data, Evaluation, PairedDifference, Training


class Measured(Record):
    """Hold one statistic of one run over all people, with its 95 % identity-level bootstrap interval."""

    value: float
    ci95: Interval


class Ranked(Record):
    """Describe one evaluation in the order of the ranking."""

    name: str
    encoder: EncoderInfo
    """The query side's encoder."""
    gallery: str
    """Encoder id of the gallery side."""
    training: Training | None
    """Training of the query side's encoder; None where its file does not tell."""
    flip: bool
    first: Measured
    """Value that is ranked by: macro (balanced), where the statistic knows identities."""
    raw: Measured | None
    """Micro (raw); None for statistics without it."""
    behind_best: PairedDifference | None
    """This run minus the best; None for the best."""
    p_adjusted: float | None
    """p of ``behind_best``, adjusted over all pairs of runs (Holm 1979)."""
    comparison: Comparison | None
    """The encoder pair's own results, for its curves; None for statistics without."""


class Versus(Record):
    """Compare two runs, by name: ``a`` minus ``b``, ``a`` ranking before ``b``."""

    a: str
    b: str
    difference: PairedDifference
    p_adjusted: float


class Ranking(Record):
    """Hold a whole run of pkd-compare: what ``compare.json`` holds, and all that page and pictures read."""

    schema_version: int = 1
    tool: str
    created: str
    """ISO 8601, UTC."""
    cell: str
    by: str
    """Statistic that is ranked by: a name in ``STATISTICS``."""
    target: float | None
    """Target false match (or false positive identification) rate; None for statistics without one."""
    data: Data
    protocol: str
    synthetic: bool
    resamples: int
    seed: int
    runs: tuple[Ranked, ...]
    """Best first."""
    pairs: tuple[Versus, ...]
    """Every two runs."""
    smallest_p: float
    """The smallest adjusted p-value that so many draws and comparisons can give."""


ByTarget = dict[float | None, tuple[Measured, Measured | None]]
"""Target rate (None for statistics without one) → macro (balanced), and micro (raw)."""


@dataclass(frozen=True)
class Statistic:
    """Describe one way to rank runs."""

    words: str
    """``{}``: the target rate in per cent."""
    key: str
    """After the encoder pair in ``ResampleValues.values``. ``{}``: the target rate."""
    target: str
    """Target rate in words; empty where there is none."""
    falls: bool
    """True where less is better."""
    find: Callable[[Evaluation], Mapping[str, ByTarget]]
    """Find its values in an evaluation, by encoder pair."""


def _tar(e: Evaluation) -> dict[str, ByTarget]:
    return {
        c.name: {
            p.fmr: (
                Measured(value=p.tar_balanced, ci95=p.tar_balanced_ci95),
                Measured(value=p.tar, ci95=p.tar_ci95),
            )
            for p in c.points
        }
        for c in e.comparisons
    }


def _accuracy(e: Evaluation) -> dict[str, ByTarget]:
    return {a.name: {None: (Measured(value=a.accuracy, ci95=a.ci95), None)} for a in e.pair_accuracies}


def _rank_1(e: Evaluation) -> dict[str, ByTarget]:
    first = {i.name: i.ranks[0] for i in e.identifications if i.ranks and i.ranks[0].rank == 1}
    return {
        name: {
            None: (
                Measured(value=r.rate_balanced, ci95=r.rate_balanced_ci95),
                Measured(value=r.rate, ci95=r.rate_ci95),
            )
        }
        for name, r in first.items()
    }


def _fnir(e: Evaluation) -> dict[str, ByTarget]:
    return {
        i.name: {
            p.fpir: (
                Measured(value=p.fnir_balanced, ci95=p.fnir_balanced_ci95),
                Measured(value=p.fnir, ci95=p.fnir_ci95),
            )
            for p in i.points
        }
        for i in e.identifications
    }


STATISTICS = {
    "tar": Statistic("true accept rate at FMR {}", "tar_balanced/{}", "FMR", False, _tar),
    "accuracy": Statistic("accuracy", "accuracy", "", False, _accuracy),
    "rank-1": Statistic("rank-1 rate", "rank_balanced/1", "", False, _rank_1),
    "fnir": Statistic("FNIR at FPIR {}", "fnir_balanced/{}", "FPIR", True, _fnir),
}
"""Statistics by the name that ``--by`` takes."""


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
        if key not in run.resample_values.values:
            raise InputError(f"{run.folder}: its draws.npz holds no {key}. Run pkd-evaluate again.")
    measured = {run.name: cells[cell][target] for run, cells in zip(runs, found, strict=True)}
    sign = 1 if statistic.falls else -1
    order = sorted(runs, key=lambda run: sign * measured[run.name][0].value)
    pairs = list(combinations(order, 2))
    differences = [
        paired(
            a.resample_values.values,
            b.resample_values.values,
            (key, key),
            observed=measured[a.name][0].value - measured[b.name][0].value,
        )
        for a, b in pairs
    ]
    adjusted = holm([d.p for d in differences])
    best = order[0]
    signs = all(Contributions.find(run.resample_values.values, key) for run in runs)
    smallest = 1 / (FLIPS + 1) if signs else 2 / (len(best.resample_values.values[key]) + 1)
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
        smallest_p=min(1.0, len(pairs) * smallest),
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
    runs: Sequence[Run], found: list[ByTarget], statistic: Statistic, cell: str, wanted: float | None
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
    """Turn A − B into B − A."""
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
    """Return letter and encoder of the query side; P and R are the control, mapped."""
    if cell[0] == "S" and e.student:
        return "S", e.student
    if cell[0] in "CPR" and e.control:
        return "C", e.control.encoder
    return "T", e.teacher
