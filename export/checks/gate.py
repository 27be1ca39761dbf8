"""Gate targets: a target must still accept the genuine queries that the fp32 encoder accepts, in the teacher's gallery.

Both are measured on the same people, each at its own threshold for one false match rate. A target passes where even the
upper end of the interval of what it loses is no more than was allowed: "not shown to be worse" is not enough. Of few
people who lose nothing the resamples say that nobody does; the exact bound for so many people says what others may.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from pkd.export.options import GateOptions
from pkd.toolkit.bundle.bundle import NOT_GATED
from pkd.toolkit.certificates.certificate import Certificate, file_name
from pkd.toolkit.core.encoder_info import require_same_space
from pkd.toolkit.core.errors import GateFailed
from pkd.toolkit.core.models import Record
from pkd.toolkit.core.progress import Progress
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.models.open_encoder import open_encoder
from pkd.toolkit.encoders.base import Encoder
from pkd.toolkit.encoders.embed import default_cache, embed_faces
from pkd.toolkit.evaluation.metrics.error_rates import matching, require_resolved
from pkd.toolkit.evaluation.metrics.intervals import proportion_intervals
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores, score_pairs
from pkd.toolkit.evaluation.metrics.paired import paired
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats
from pkd.toolkit.evaluation.protocols.all_pairs import certify, pair_up
from pkd.toolkit.evaluation.protocols.common import EncoderSet, EvaluationOptions, common
from pkd.toolkit.evaluation.results.schema import Comparison, Evaluation, PairedDifference

FMRS = (1e-2, 1e-3, 1e-4, 1e-5)
"""False match rates in the certificates of the gated encoders, where the faces resolve them."""
ALIKE = 0.9999
"""A target whose every embedding has at least this cosine with fp32's differs by rounding: it fails nobody anew."""
LEVEL = 0.95
"""Level of the interval that a target's first try is judged by."""


class GateRow(Record):
    """Compare one try of one target with the fp32 encoder."""

    target: str
    encoder: str
    tried: str
    """Change that was to make it pass; empty for the first try."""
    fmr: float
    reference: float
    """TAR of the fp32 encoder, macro: every identity weighs the same."""
    tar: float
    drop: PairedDifference
    """Loss of TAR, paired over the same people."""
    level: float
    """Level of the interval that it is judged by: 0.95, and more for each of several tries."""
    most: float
    """Upper end of that interval, or the exact bound for so few people where that is more."""
    people: int
    """People with several images, whom the exact bound is for."""
    bounded: bool
    """True where the exact bound decides."""
    passed: bool


@dataclass(frozen=True)
class GateResult:
    """Hold one row, and the certificate that was measured on the way."""

    row: GateRow
    certificate: Certificate


@dataclass(frozen=True)
class GateResults:
    """Hold every row in the order of measuring, and the verdict on the targets as they are in the end."""

    rows: tuple[GateRow, ...] = ()
    summary: str = NOT_GATED
    """Sentence for the manifest."""
    certificates: tuple[Certificate, ...] = ()
    """Certificates of the targets as they are in the end, and of the fp32 encoder."""


@dataclass(frozen=True)
class _Measured:
    tar: float
    values: dict[str, Doubles]
    accepted: Doubles
    """Share of each person's genuine pairs that match, of the people who have some."""
    vectors: Floats
    certificate: Certificate | None


class Gate:
    """Measure people, gallery and fp32 encoder once, and judge targets against them one by one."""

    def __init__(self, options: GateOptions, reference: Encoder, progress: Progress) -> None:
        """Measure. Raises SpaceMismatch for another teacher, UnsupportedFmr for an unresolved rate, InputError."""
        self._options, self._reference, self._progress = options, reference, progress
        self._teacher = open_encoder(options.teacher, options.teacher_preprocess) if options.teacher else reference
        require_same_space(self._teacher.info, reference.info)
        self._faces = FaceSet.read(options.faces)
        fmrs = tuple(sorted({options.fmr, *FMRS}, reverse=True))
        self._evaluation = EvaluationOptions(fmrs=fmrs, cache=default_cache())
        self._data, self._pairing = pair_up(self._faces, self._faces, options.faces.name, self._evaluation.cache)
        require_resolved(self._pairing, options.fmr)
        with progress("embedding the gallery", len(self._faces)) as advance:
            self._gallery = embed_faces(self._teacher, self._faces, cache=self._evaluation.cache, advance=advance)
        self._plain = self._measure("fp32", reference)

    @property
    def _statistic(self) -> str:
        return f"S–T/tar_balanced/{self._options.fmr:g}"

    def judge(self, targets: Mapping[str, Encoder], tried: str = "", level: float = LEVEL) -> list[GateResult]:
        """Judge every target that is an encoder of its own. ``targets``: name → encoder."""
        judged = []
        for target, encoder in _own(self._reference, targets).items():
            found = self._measure(target, encoder)
            lost = self._plain.tar - found.tar
            both = self._plain.values, found.values, (self._statistic,) * 2
            drop = paired(*both, observed=lost)
            reach = drop.ci95[1] if level == LEVEL else paired(*both, observed=lost, level=level).ci95[1]
            rounding = float(np.einsum("nd,nd->n", self._plain.vectors, found.vectors).min()) >= ALIKE
            most = reach if rounding else most_lost(lost, reach, self._plain.accepted - found.accepted, level)
            row = GateRow(
                target=target,
                encoder=encoder.info.id,
                tried=tried,
                fmr=self._options.fmr,
                reference=self._plain.tar,
                tar=found.tar,
                drop=drop,
                level=level,
                most=most,
                people=len(found.accepted),
                bounded=most > reach,
                passed=most <= self._options.max_drop,
            )
            assert found.certificate is not None
            judged.append(GateResult(row, found.certificate))
        return judged

    def conclude(self, judged: Sequence[GateResult]) -> GateResults:
        """Take the last row of every target for the verdict."""
        final = {each.row.target: each for each in judged}
        certificates = [each.certificate for each in final.values()]
        if self._plain.certificate:
            certificates.insert(0, self._plain.certificate)
        rows = tuple(each.row for each in judged)
        return GateResults(rows, self._summary(rows), tuple(certificates))

    def _measure(self, label: str, encoder: Encoder) -> _Measured:
        options, reference = self._evaluation, encoder is self._reference
        with self._progress(f"gate {label}", len(self._faces)) as advance:
            # not from the cache: another graph may have had this name and precision
            query = embed_faces(encoder, self._faces, jobs=None if reference else 1, advance=advance)
        scores = score_pairs(self._pairing, query, self._gallery, seed=self._evaluation.seed)
        comparison, values = self._compare(scores, encoder)
        point = next(p for p in comparison.points if p.fmr == self._options.fmr)
        pairs = self._pairing.genuine_per_identity
        matched = scores.genuine_identity[: matching(scores.genuine, np.array([point.threshold]))[0]]
        accepted = np.bincount(matched, minlength=len(pairs))[pairs > 0] / pairs[pairs > 0]
        encoder_set = EncoderSet(self._teacher, encoder)
        certificate = None if encoder is self._teacher else self._certificate(comparison, encoder_set, options)
        return _Measured(point.tar_balanced, values, accepted, query, certificate)

    def _compare(self, scores: PairScores, encoder: Encoder) -> tuple[Comparison, dict[str, Doubles]]:
        options = self._evaluation
        return measure(
            scores,
            "S–T",
            encoder.info,
            self._teacher.info,
            fmrs=options.fmrs or FMRS,
            resamples=options.resamples,
            seed=options.seed,
        )

    def _certificate(self, comparison: Comparison, encoder_set: EncoderSet, options: EvaluationOptions) -> Certificate:
        named = comparison.model_copy(update={"certificate": file_name(comparison.query, comparison.gallery)})
        evaluation = Evaluation(
            protocol="all pairs of one set", data=self._data, comparisons=(named,), **common(encoder_set, options)
        )
        return certify(named, evaluation)

    def _summary(self, rows: Sequence[GateRow]) -> str:
        options, data = self._options, self._data
        people = f"on {data.name}, {data.images:,} images of {data.identities:,} people"
        final = {row.target: row for row in rows}.values()
        if not rows:
            return f"nothing to gate {people}: no target that runs here is an encoder of its own"
        verdict = "passed" if all(row.passed for row in final) else "gate failed"
        tries = {row.target: sum(other.target == row.target for other in rows) for row in final}
        found = "; ".join(_sentence(row, tries[row.target]) for row in final)
        said = f"{verdict}: TAR at FMR {options.fmr:g} {people}, allowed {100 * options.max_drop:g} points: {found}"
        enough, genuine = fewest_people(options.max_drop), int((self._pairing.genuine_per_identity > 0).sum())
        if verdict != "passed" and genuine < enough:
            said += (
                f". Of these people {genuine:,} have several images; it takes {enough:,} to show so small a loss, even "
                "where nobody loses anything"
            )
        return said


def most_lost(lost: float, reach: float, of_people: Doubles, level: float = LEVEL) -> float:
    """Find the largest loss that a target may have, by which it is judged.

    ``lost``: of TAR, measured. ``reach``: upper end of its paired interval. ``of_people``: see ``unseen``.
    """
    return max(reach, lost + unseen(of_people, level))


def unseen(lost: Doubles, level: float = LEVEL) -> float:
    """Bound what a target may lose of people like these beyond what was seen.

    ``lost``: of each person the share of genuine pairs that no longer matches. Resamples of people of whom hardly any
    loses anything hardly vary, however few they are: of n of whom nobody does 1 − α^(1/n) may, as many as would show in
    α of such sets. α: (1 − ``level``) / 2.
    """
    loss = np.maximum(lost, 0.0)
    rate = float(loss.mean())
    tail = (1 - level) / 2
    people = float(len(loss))
    _, (high,) = proportion_intervals(np.array([rate]), np.array([loss.var() / people]), people, tail=tail)
    return float(high) - rate


def fewest_people(max_drop: float, level: float = LEVEL) -> int:
    """Compute how many people it takes to show a loss below ``max_drop`` where nobody loses anything."""
    return math.ceil(math.log((1 - level) / 2) / math.log1p(-max_drop)) if max_drop > 0 else 0


def require_passed(results: GateResults) -> None:
    """Raise GateFailed with every figure where a target, as it is in the end, loses too much."""
    final = {row.target: row for row in results.rows}.values()
    if not all(row.passed for row in final):
        raise GateFailed(
            f"{results.summary}. Nothing was written. Calibrate on more faces, train for INT8 with --qat, choose "
            "another --precision, or allow more with --max-tar-drop."
        )


def gate_table(rows: Sequence[GateRow]) -> Table:
    """Lay out every try for the console."""
    table = Table(title="Gate: TAR against the teacher's gallery, macro, %", title_justify="left")
    for heading in ("target", "FMR", "fp32", "target's", "lost, 95 % interval", "at most", "gate"):
        table.add_column(heading, justify="left" if heading == "target" else "right", no_wrap=heading != "target")
    for row in rows:
        table.add_row(
            f"{row.target}: {row.tried}" if row.tried else row.target,
            f"{row.fmr:g}",
            f"{100 * row.reference:.1f}",
            f"{100 * row.tar:.1f}",
            _lost(row.drop),
            f"{_most(row)}{'*' if row.bounded else ''}",
            "passed" if row.passed else "failed",
        )
    if bounded := [row for row in rows if row.bounded]:
        table.caption, table.caption_justify = f"* {_why_bounded(bounded[0].people)}", "left"
    return table


def _own(reference: Encoder, targets: Mapping[str, Encoder]) -> dict[str, Encoder]:
    """Choose the targets that are encoders of their own, each once. The others differ by rounding: parity judges."""
    found: dict[str, Encoder] = {}
    for name, encoder in targets.items():
        if encoder.info.id not in {reference.info.id, *(e.info.id for e in found.values())}:
            found[name] = encoder
    return found


def _lost(drop: PairedDifference) -> str:
    return f"{100 * drop.difference:+.1f} ({100 * drop.ci95[0]:+.1f} to {100 * drop.ci95[1]:+.1f})"


def _most(row: GateRow) -> str:
    return f"{100 * row.most:+.1f} ({100 * row.level:.3g} %)"


def _why_bounded(people: int) -> str:
    return (
        f"more than the interval's end: of {people:,} people too few lose anything to show what others may lose, so "
        "the exact bound for so many people decides. More people lower it."
    )


def _sentence(row: GateRow, tries: int) -> str:
    said = f"{row.target} loses {_lost(row.drop)} points of {100 * row.reference:.1f} %"
    if row.tried:
        said += f", at most {_most(row)}, in try {tries} on these people: {row.tried}"
    elif row.bounded:
        said += f", at most {_most(row)} by the exact bound for {row.people:,} people"
    return said if row.passed else f"{said}, too much"
