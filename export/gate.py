"""Gate: does a target still accept the genuine queries that the fp32 encoder accepts, against the teacher's gallery?

Both are measured on the same people, each at its own threshold for one false match rate. A target passes where even the
upper end of the 95 % interval of what it loses is no more than was allowed: "not shown to be worse" is not enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from pkd.toolkit.certificate import Certificate, file_name
from pkd.toolkit.cli.encoders import open_encoder
from pkd.toolkit.embed import default_cache, embed_faces
from pkd.toolkit.errors import GateFailed, InputError
from pkd.toolkit.evaluation.certify import certify
from pkd.toolkit.evaluation.cross_matrix import pair_up
from pkd.toolkit.evaluation.lineup import Lineup
from pkd.toolkit.evaluation.measure import measure
from pkd.toolkit.evaluation.paired import PairedDifference, paired_difference
from pkd.toolkit.evaluation.pairs import Doubles, Floats, Pairing
from pkd.toolkit.evaluation.protocol import Bar, Options, common
from pkd.toolkit.evaluation.rates import require_resolved
from pkd.toolkit.evaluation.results import Comparison, Data, Evaluation
from pkd.toolkit.evaluation.scores import score_pairs
from pkd.toolkit.faces import FaceSet
from pkd.toolkit.record import Record
from pkd.toolkit.runtime import Encoder
from pkd.toolkit.space import require_same_space

FMRS = (1e-2, 1e-3, 1e-4, 1e-5)
"""What the certificates of the gated encoders hold where the faces resolve it."""


@dataclass(frozen=True)
class GateOrder:
    """What pkd-export's gate was asked for. The only defaults."""

    faces: Path
    """Aligned crops with identities, other than those that INT8 was calibrated on."""
    teacher: str | None
    """Encoder of the gallery; None where the exported encoder is the teacher itself."""
    teacher_preprocess: str | None
    fmr: float = 1e-3
    max_drop: float = 0.01
    """Of the TAR, a fraction: no more may be lost, by the upper end of the interval."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop < 1:
            raise InputError(f"--max-tar-drop {self.max_drop:g}: a fraction of 0 to below 1; 0.01 is one point.")
        if not 0 < self.fmr < 1:
            raise InputError(f"--gate-fmr {self.fmr:g}: a false match rate lies between 0 and 1.")


class GateRow(Record):
    """One target against the fp32 encoder."""

    target: str
    encoder: str
    fmr: float
    reference: float
    """TAR of the fp32 encoder, every identity alike."""
    tar: float
    drop: PairedDifference
    """What the target loses, paired over the same drawn people."""
    passed: bool


@dataclass(frozen=True)
class Gated:
    """The rows, a sentence for the manifest, and the certificates that were measured on the way."""

    rows: tuple[GateRow, ...]
    said: str
    certificates: tuple[Certificate, ...]


def gate(order: GateOrder, reference: Encoder, targets: Mapping[str, Encoder], bar: Bar) -> Gated:
    """Measure the fp32 encoder and every target that is an encoder of its own.

    ``targets``: name → encoder. Raises SpaceMismatch for another teacher, UnsupportedFmr where the faces do not resolve
    the rate, InputError.
    """
    teacher = open_encoder(order.teacher, order.teacher_preprocess) if order.teacher else reference
    require_same_space(teacher.info, reference.info)
    faces, name = FaceSet.read(order.faces), order.faces.name
    options = Options(fmrs=tuple(sorted({order.fmr, *FMRS}, reverse=True)), cache=default_cache())
    data, pairing = pair_up(faces, faces, name, options.cache)
    require_resolved(pairing, order.fmr)
    with bar("embedding the gallery", len(faces)) as advance:
        gallery = embed_faces(teacher, faces, cache=options.cache, advance=advance)

    points, draws, certificates = {}, {}, []
    key = f"S–T/tar_balanced/{order.fmr:g}"
    for target, encoder in {"": reference, **_own(reference, targets)}.items():
        with bar(f"gate {target or 'fp32'}", len(faces)) as advance:
            # not from the cache: another graph may have had this name and precision
            query = embed_faces(encoder, faces, jobs=None if encoder is reference else 1, advance=advance)
        comparison, values = _compare(pairing, query, gallery, encoder, teacher, options)
        points[target] = next(p for p in comparison.points if p.fmr == order.fmr)
        draws[target] = values[key]
        if encoder is not teacher:
            certificates.append(_certificate(comparison, data, Lineup(teacher, encoder), options))

    rows = []
    for target, encoder in _own(reference, targets).items():
        lost = points[""].tar_balanced - points[target].tar_balanced
        drop = paired_difference(draws[""], draws[target], observed=lost)
        rows.append(
            GateRow(
                target=target,
                encoder=encoder.info.id,
                fmr=order.fmr,
                reference=points[""].tar_balanced,
                tar=points[target].tar_balanced,
                drop=drop,
                passed=drop.ci95[1] <= order.max_drop,
            )
        )
    return Gated(tuple(rows), _said(rows, order, name, data), tuple(certificates))


def require_passed(gated: Gated) -> None:
    """Raise GateFailed with every figure where a target loses too much."""
    if not all(row.passed for row in gated.rows):
        raise GateFailed(
            f"{gated.said}. Nothing was written. Calibrate on more faces, leave layers in float32 with --keep-float N, "
            "choose another --precision, or allow more with --max-tar-drop."
        )


def gate_table(rows: Sequence[GateRow]) -> Table:
    """For the console."""
    table = Table(title="Gate: TAR against the teacher's gallery, identities alike, %", title_justify="left")
    for heading in ("target", "FMR", "fp32", "target's", "lost, 95 % interval", "gate"):
        table.add_column(heading, justify="left" if heading == "target" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.target,
            f"{row.fmr:g}",
            f"{100 * row.reference:.1f}",
            f"{100 * row.tar:.1f}",
            _lost(row.drop),
            "passed" if row.passed else "failed",
        )
    return table


def _own(reference: Encoder, targets: Mapping[str, Encoder]) -> dict[str, Encoder]:
    """Targets that are encoders of their own, each once. Parity judges the others, which differ by rounding."""
    found: dict[str, Encoder] = {}
    for name, encoder in targets.items():
        if encoder.info.id not in {reference.info.id, *(e.info.id for e in found.values())}:
            found[name] = encoder
    return found


def _compare(
    pairing: Pairing, query: Floats, gallery: Floats, encoder: Encoder, teacher: Encoder, options: Options
) -> tuple[Comparison, dict[str, Doubles]]:
    scores = score_pairs(pairing, query, gallery, seed=options.seed)
    return measure(
        scores,
        "S–T",
        encoder.info,
        teacher.info,
        fmrs=options.fmrs or FMRS,
        resamples=options.resamples,
        seed=options.seed,
    )


def _certificate(comparison: Comparison, data: Data, lineup: Lineup, options: Options) -> Certificate:
    named = comparison.model_copy(update={"certificate": file_name(comparison.query, comparison.gallery)})
    evaluation = Evaluation(protocol="all pairs of one set", data=data, comparisons=(named,), **common(lineup, options))
    return certify(named, evaluation)


def _lost(drop: PairedDifference) -> str:
    return f"{100 * drop.difference:+.1f} ({100 * drop.ci95[0]:+.1f} to {100 * drop.ci95[1]:+.1f})"


def _said(rows: Sequence[GateRow], order: GateOrder, name: str, data: Data) -> str:
    people = f"on {name}, {data.images:,} images of {data.identities:,} people"
    if not rows:
        return f"nothing to gate {people}: every target is the fp32 encoder"
    verdict = "passed" if all(row.passed for row in rows) else "gate failed"
    found = "; ".join(
        f"{row.target} loses {_lost(row.drop)} points of {100 * row.reference:.1f} %"
        + ("" if row.passed else ", too much")
        for row in rows
    )
    return f"{verdict}: TAR at FMR {order.fmr:g} {people}, allowed {100 * order.max_drop:g} points: {found}"
