"""Open folders of pkd-evaluate that are to be compared, name them, and check that they can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.metrics.resamples import ResampleValues, read_resample_values, resampled_from
from pkd.toolkit.evaluation.results.schema import Evaluation

REMEDY = {
    "data": "the same --faces (or --gallery and --probe, or --pairs)",
    "protocol": "the same kind of set",
    "resamples": "the same --bootstrap",
    "seed": "the same --seed",
}
"""Requirements that make two evaluations pairable, by the entries of ``ResampleValues.drawn``."""


@dataclass(frozen=True)
class Run:
    """Hold one folder of pkd-evaluate."""

    name: str
    folder: Path
    evaluation: Evaluation
    resample_values: ResampleValues


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """Open ``FOLDER`` or ``NAME=FOLDER`` each; other names come from the students, and are made to differ.

    Raises InputError for fewer than two, for one given twice, for folders that pkd-evaluate did not write, where two
    given names are equal, and where two runs were not over the same pairs.
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
    names = _names([(e.student or e.teacher).name for e in evaluations], given, folders)
    runs = [
        Run(name, folder, evaluation, _resample_values(folder, evaluation))
        for name, folder, evaluation in zip(names, folders, evaluations, strict=True)
    ]
    _require_paired(runs)
    return runs


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


def _resample_values(folder: Path, evaluation: Evaluation) -> ResampleValues:
    kept = read_resample_values(folder)
    if kept.source != resampled_from(evaluation):
        raise InputError(f"{folder}: draws.npz and report.json are of two evaluations. Run pkd-evaluate again.")
    return kept


def _names(own: list[str], given: list[str], folders: list[Path]) -> list[str]:
    """Given names stay. Others lose the words that all of them begin with (the backbone, mostly); where several are
    equal they get the last part in which their paths differ, then a number.
    """
    words = [name.split("-") for name, fixed in zip(own, given, strict=True) if not fixed]
    common = 0
    while len(words) > 1 and all(len(w) > common + 1 and w[common] == words[0][common] for w in words):
        common += 1
    names = [fixed or "-".join(name.split("-")[common:]) for name, fixed in zip(own, given, strict=True)]
    for name in sorted({n for n in names if names.count(n) > 1}):
        places = [i for i, n in enumerate(names) if n == name and not given[i]]
        if len(places) < 2 and given.count(name) > 1:
            raise InputError(f"{name}: the name of {given.count(name)} runs. Give each its own, as NAME=FOLDER.")
        parts = [folders[i].resolve().parts for i in places]
        while len({p[-1] for p in parts}) == 1 and len(parts) > 1:
            parts = [p[:-1] for p in parts]
        tails = [p[-1] for p in parts]
        for number, (i, tail) in enumerate(zip(places, tails, strict=True), 1):
            names[i] = f"{name} ({tail if tails.count(tail) == 1 else number})"
    return names


def _require_paired(runs: Sequence[Run]) -> None:
    first = runs[0]
    for other in runs[1:]:
        if other.resample_values.key == first.resample_values.key:
            continue
        a, b = first.resample_values.source, other.resample_values.source
        differing = [entry for entry in REMEDY if a.get(entry) != b.get(entry)]
        said = "; ".join(f"{entry} {_short(a.get(entry))} against {_short(b.get(entry))}" for entry in differing)
        remedy = " and ".join(REMEDY[entry] for entry in differing)
        raise InputError(
            f"{first.name} and {other.name} are not over the same pairs: {said}. Run pkd-evaluate on both with "
            f"{remedy}."
        )


def _short(value: str | None) -> str:
    """Shorten a digest to its first ten digits; anything else stays as it is."""
    return "nothing" if value is None else f"{value[:10]}…" if len(value) == 64 else value
