"""Compare evaluations over the same pairs: rank them, with a paired interval and a p-value for every difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import combinations
from pathlib import Path

from pydantic import ValidationError

from pkd.toolkit.command import tool_version
from pkd.toolkit.errors import InputError
from pkd.toolkit.evaluation.draws import Draws, drawn_from, read_draws
from pkd.toolkit.evaluation.paired import PairedDifference, holm, paired_difference
from pkd.toolkit.evaluation.ranking import Measured, Ranked, Ranking, Versus
from pkd.toolkit.evaluation.results import Evaluation
from pkd.toolkit.space import EncoderInfo

REMEDY = {
    "data": "the same --faces (or --gallery and --probe, or --pairs)",
    "protocol": "the same kind of set",
    "resamples": "the same --bootstrap",
    "seed": "the same --seed",
}
"""What makes two evaluations pairable, by the entries of ``Draws.drawn``."""


@dataclass(frozen=True)
class Run:
    """One folder of pkd-evaluate."""

    name: str
    folder: Path
    evaluation: Evaluation
    draws: Draws


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """Open ``FOLDER`` or ``NAME=FOLDER`` each; names come from the students, and are made to differ.

    Raises InputError for fewer than two, for one given twice, for folders that pkd-evaluate did not write, and where
    two names are equal.
    """
    if len(arguments) < 2:
        raise InputError(f"{' '.join(arguments) or 'nothing'}: a comparison needs two evaluations or more.")
    given: list[str] = []
    folders: list[Path] = []
    for argument in arguments:
        name, mark, path = argument.partition("=")
        named = bool(mark) and not Path(argument).exists()
        folder = Path(path if named else argument)
        if folder.resolve() in [other.resolve() for other in folders]:
            raise InputError(f"{folder}: given twice. Name each evaluation once.")
        if named and not name.strip():
            raise InputError(f"{argument!r}: the name is empty. Give NAME=FOLDER.")
        given.append(name.strip() if named else "")
        folders.append(folder)
    evaluations = [_read(folder) for folder in folders]
    own = [name or (e.student or e.teacher).name for name, e in zip(given, evaluations, strict=True)]
    names = _distinct(own, folders, [bool(name) for name in given])
    return [
        Run(name, folder, evaluation, _draws(folder, evaluation))
        for name, folder, evaluation in zip(names, folders, evaluations, strict=True)
    ]


def rank(runs: Sequence[Run], *, cell: str | None = None, fmr: float | None = None) -> Ranking:
    """Rank by the identity-balanced TAR of ``cell`` at ``fmr``, or by the accuracy of a pair list.

    ``cell``: as ``S–T`` or ``S-T``; by default S–T where every run has it, else T–T. ``fmr``: by default the smallest
    that every run resolves. Raises InputError where the runs are not over the same pairs, saying what differs.
    """
    _require_paired(runs)
    cell = _cell(runs, cell)
    statistic = "tar_balanced" if runs[0].evaluation.comparisons else "accuracy"
    target = _fmr(runs, cell, fmr) if statistic == "tar_balanced" else None
    if fmr is not None and target is None:
        raise InputError(f"--fmr {fmr:g}: a pair list has an accuracy and no false match rate. Drop it.")
    key = f"{cell}/{statistic}" + ("" if target is None else f"/{target:g}")
    for run in runs:
        if key not in run.draws.values:
            raise InputError(f"{run.folder}: its draws.npz holds no {key}. Run pkd-evaluate again.")
    measured = {run.name: _measured(run.evaluation, cell, target) for run in runs}
    order = sorted(runs, key=lambda run: -measured[run.name][0].value)
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
        statistic=statistic,
        fmr=target,
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


def _read(folder: Path) -> Evaluation:
    path = folder / "report.json"
    try:
        return Evaluation.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. Give folders that pkd-evaluate wrote.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise InputError(f"{path}: {where}: {first['msg']}. Run pkd-evaluate again with this pkd.") from None


def _draws(folder: Path, evaluation: Evaluation) -> Draws:
    draws = read_draws(folder)
    if draws.drawn != drawn_from(evaluation):
        raise InputError(f"{folder}: draws.npz and report.json are of two evaluations. Run pkd-evaluate again.")
    return draws


def _distinct(names: list[str], folders: list[Path], fixed: list[bool]) -> list[str]:
    """Names that several runs share get the last part in which their paths differ, then a number."""
    out = list(names)
    for name in sorted({n for n in names if names.count(n) > 1}):
        places = [i for i, n in enumerate(names) if n == name]
        if all(fixed[i] for i in places):
            raise InputError(f"{name}: the name of {len(places)} runs. Give each its own, as NAME=FOLDER.")
        parts = [list(folders[i].resolve().parts) for i in places]
        while len({p[-1] for p in parts}) == 1 and min(map(len, parts)) > 1:
            parts = [p[:-1] for p in parts]
        for number, (i, part) in enumerate(zip(places, parts, strict=True), 1):
            if not fixed[i]:
                tail = part[-1] if [p[-1] for p in parts].count(part[-1]) == 1 else str(number)
                out[i] = f"{name} ({tail})"
    return out


def _require_paired(runs: Sequence[Run]) -> None:
    first = runs[0]
    for other in runs[1:]:
        if other.draws.key == first.draws.key:
            continue
        a, b = first.draws.drawn, other.draws.drawn
        differing = [entry for entry in REMEDY if a.get(entry) != b.get(entry)]
        said = "; ".join(f"{entry} {_short(a.get(entry))} against {_short(b.get(entry))}" for entry in differing)
        remedy = " and ".join(REMEDY[entry] for entry in differing)
        raise InputError(
            f"{first.name} and {other.name} are not over the same pairs: {said}. Run pkd-evaluate on both with "
            f"{remedy}."
        )


def _short(value: str | None) -> str:
    """A digest's first ten digits; anything else as it is."""
    return "nothing" if value is None else f"{value[:10]}…" if len(value) == 64 else value


def _cells(e: Evaluation) -> list[str]:
    return [found.name for found in (*e.comparisons, *e.pair_accuracies)]


def _cell(runs: Sequence[Run], wanted: str | None) -> str:
    cell = wanted.replace("-", "–") if wanted else None
    if cell is None:
        cell = "S–T" if any("S–T" in _cells(run.evaluation) for run in runs) else "T–T"
    for run in runs:
        if cell not in _cells(run.evaluation):
            has = ", ".join(_cells(run.evaluation)) or "none"
            shared = [name for name in _cells(runs[0].evaluation) if all(name in _cells(r.evaluation) for r in runs)]
            remedy = f"Pass --cell {shared[0]}" if shared else "Leave it out"
            raise InputError(f"{run.name}: has no {cell} (it has {has}). {remedy}, or evaluate it with a --student.")
    return cell


def _fmr(runs: Sequence[Run], cell: str, wanted: float | None) -> float:
    resolved = {
        run.name: [p.fmr for c in run.evaluation.comparisons if c.name == cell for p in c.points] for run in runs
    }
    shared = sorted(set.intersection(*(set(fmrs) for fmrs in resolved.values())))
    if wanted is None and shared:
        return shared[0]
    if wanted in shared:
        return shared[shared.index(wanted)]
    have = ", ".join(f"{fmr:g}" for fmr in shared) or "no common one"
    lacking = next((name for name, fmrs in resolved.items() if wanted not in fmrs), runs[0].name)
    if wanted is None:
        raise InputError(f"{cell}: no false match rate is in every run. Run pkd-evaluate on all with the same --fmr.")
    raise InputError(
        f"--fmr {wanted:g}: {lacking} was not evaluated at it (all were at: {have}). Pass one of these, or run "
        f"pkd-evaluate with --fmr {wanted:g}."
    )


def _measured(e: Evaluation, cell: str, fmr: float | None) -> tuple[Measured, Measured | None]:
    """What is ranked by, and the raw rate where there is one."""
    for accuracy in e.pair_accuracies:
        if accuracy.name == cell:
            return Measured(value=accuracy.accuracy, ci95=accuracy.ci95), None
    (point,) = (p for c in e.comparisons if c.name == cell for p in c.points if p.fmr == fmr)
    return (
        Measured(value=point.tar_balanced, ci95=point.tar_balanced_ci95),
        Measured(value=point.tar, ci95=point.tar_ci95),
    )


def _turned(d: PairedDifference) -> PairedDifference:
    """B − A from A − B."""
    return PairedDifference(difference=-d.difference, ci95=(-d.ci95[1], -d.ci95[0]), p=d.p)


def _ranked(
    run: Run, cell: str, first: Measured, raw: Measured | None, behind: tuple[PairedDifference, float] | None
) -> Ranked:
    e = run.evaluation
    encoders: dict[str, EncoderInfo | None] = {"T": e.teacher, "S": e.student}
    letter = cell[0] if cell[0] in encoders else "C"  # P and R are the control, mapped
    encoder = encoders.get(letter) or (e.control.encoder if e.control else e.teacher)
    return Ranked(
        name=run.name,
        encoder=encoder,
        gallery=next(c.gallery for c in (*e.comparisons, *e.pair_accuracies) if c.name == cell),
        training=e.training.get(letter),
        flip=e.flip,
        first=first,
        raw=raw,
        behind_best=behind[0] if behind else None,
        p_adjusted=behind[1] if behind else None,
        comparison=next((c for c in e.comparisons if c.name == cell), None),
    )
