"""Share between protocols: encoder sets, options, embeddings, and the common part of results.

``S–T`` names an ordered pair of encoders: query by the student, gallery by the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TypedDict

import numpy as np

from pkd.toolkit.certificates.certificate import Certificate
from pkd.toolkit.core.cli_support import tool_version
from pkd.toolkit.core.encoder_info import EncoderInfo, require_same_space
from pkd.toolkit.core.errors import InputError, SpaceMismatch
from pkd.toolkit.core.progress import Progress
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.encoders.base import Embeddings, Encoder, unit_rows
from pkd.toolkit.encoders.embed import embed_faces
from pkd.toolkit.encoders.linear_maps import LinearMapEncoder
from pkd.toolkit.evaluation.metrics.error_rates import EXPECTED
from pkd.toolkit.evaluation.metrics.operating_points import histogram
from pkd.toolkit.evaluation.metrics.pairing import Ints
from pkd.toolkit.evaluation.metrics.resamples import ResampleValues
from pkd.toolkit.evaluation.results.schema import Agreement, Comparison, Control, Data, Evaluation, Training

EncoderPair = tuple[str, str]
"""Letters of the query side and of the gallery side."""


@dataclass(frozen=True)
class EncoderSet:
    """Hold the encoders of one evaluation by letter.

    T is the teacher, S its student, C an undistilled control; P and R are the control's embeddings, mapped. M is an old
    encoder whose templates were mapped into the teacher's space (space_map.py): it is a gallery, never a query.
    """

    teacher: Encoder
    student: Encoder | None = None
    control: Encoder | None = None
    mapped: Encoder | None = None
    maps: dict[str, Encoder] = field(default_factory=dict)
    """Letter → the control behind a linear map into the teacher's space."""
    baseline: Control | None = None
    """Part of report.json about control and maps, where there are maps."""
    warnings: tuple[str, ...] = ()
    """Warnings about the encoders and the faces, found before anything was measured."""

    @property
    def encoders(self) -> dict[str, Encoder]:
        """Return letter → encoder, in the order of the report."""
        named = {"T": self.teacher, "S": self.student, "C": self.control, "M": self.mapped}
        return {letter: encoder for letter, encoder in named.items() if encoder} | self.maps

    @property
    def training(self) -> dict[str, Training]:
        """Return letter → what a run or a bundle says of how that encoder was trained."""
        known = {letter: dict(getattr(encoder, "training", {})) for letter, encoder in self.encoders.items()}
        return {letter: training for letter, training in known.items() if training}

    def certifies(self, query: str, gallery: str) -> bool:
        """Tell whether this ordered pair may get a certificate: teacher and student as queries, of one space."""
        encoders = self.encoders
        named = query in "TS" and gallery in "TSM"
        return named and encoders[query].info.space == encoders[gallery].info.space

    def pairs(self, *, with_probe: bool, any_space: bool) -> list[EncoderPair]:
        """List the ordered pairs to compare. Over one set T–S is S–T transposed, so it is left out.

        Raises InputError where two letters are one encoder, SpaceMismatch for a student of another teacher.
        """
        seen: dict[str, str] = {}
        for encoder in self.encoders.values():
            if encoder.info.id in seen:
                raise InputError(f"{encoder.info.name}: given twice. Teacher, student and control are three encoders.")
            seen[encoder.info.id] = encoder.info.name
        if self.student and not any_space:
            try:
                require_same_space(self.teacher.info, self.student.info)
            except SpaceMismatch as error:
                raise SpaceMismatch(f"{error} To compare them all the same, as a control: --any-space.") from None
        if self.mapped:
            require_same_space(self.teacher.info, self.mapped.info)
        found = [("T", "T")]
        for letter, encoder in self.encoders.items():
            if letter in "TM":
                continue
            if encoder.info.space.dim == self.teacher.info.space.dim:
                found += [(letter, "T"), *([("T", letter)] if with_probe and letter == "S" else [])]
            if letter in "SC":
                found.append((letter, letter))
        if self.mapped:
            queries = [("T", self.teacher), ("S", self.student)]
            found += [(q, "M") for q, one in queries if one and one.info.space == self.teacher.info.space]
        return found


@dataclass(frozen=True)
class EvaluationOptions:
    """Hold how to evaluate. The only defaults."""

    fmrs: tuple[float, ...] | None = None
    """Target false match rates; None: those of ``FMRS`` that the set resolves. Asked-for ones must be resolved."""
    flip: bool = False
    """Embed image and mirror image and add the two. Such scores get no certificate."""
    any_space: bool = False
    """Compare encoders of different spaces all the same (a control); no certificate joins them."""
    synthetic: bool = False
    """The faces are procedural."""
    detector_score: bool = True
    """Weigh the faces of a template by their published detector scores, where there are any."""
    resamples: int = 1000
    seed: int = 0
    cache: Path | None = None
    jobs: int | None = None


def embed(encoder: Encoder, faces: FaceSet, options: EvaluationOptions, progress: Progress) -> Embeddings:
    """Embed every face → float32 N×D unit rows. A mapped control's own embeddings are cached."""
    if isinstance(encoder, LinearMapEncoder):
        return encoder.map(embed(encoder.base, faces, options, progress))
    sums = np.zeros((len(faces), encoder.info.space.dim), np.float32)
    for flip in (False, True) if options.flip else (False,):
        label = f"embedding with {encoder.info.name}{', mirrored' if flip else ''}"
        with progress(label, len(faces)) as advance:
            sums += embed_faces(encoder, faces, flip=flip, cache=options.cache, jobs=options.jobs, advance=advance)
    return unit_rows(sums, encoder.info.name)


def measure_agreement(teacher: Embeddings, student: Embeddings) -> Agreement:
    """Summarise the cosine of both encoders on the same images. Both: float32 N×D unit rows."""
    cosine = np.einsum("nd,nd->n", teacher, student)
    low, median = np.percentile(cosine, (5, 50))
    return Agreement(
        mean=float(cosine.mean(dtype=np.float64)),
        std=float(cosine.std(dtype=np.float64)),
        low=float(low),
        median=float(median),
        histogram=histogram(cosine),
    )


def describe_data(name: str, digest: str, labels: Ints) -> Data:
    """Count images and identities for the report. ``labels``: int64 identity of each image."""
    counts = np.bincount(labels)
    return Data(
        name=name,
        content_digest=digest,
        images=len(labels),
        identities=int((counts > 0).sum()),
        single_image_identities=int((counts == 1).sum()),
    )


def require_unseen(encoder_set: EncoderSet, evaluated: Sequence[FaceSet], options: EvaluationOptions) -> None:
    """Raise InputError where the student was trained on exactly these images, as its run or bundle says."""
    trained_on = encoder_set.training.get("S", {}).get("data_digest")
    for faces in evaluated if trained_on else ():
        faces.digests(options.cache)
        if faces.digest() != trained_on:
            continue
        raise InputError(
            f"{encoder_set.encoders['S'].info.name}: it was trained on these very images, so the rates would be "
            "those of faces that it knows. Evaluate on other people."
        )


class Common(TypedDict):
    """List the fields of an Evaluation that every protocol fills alike."""

    tool: str
    created: str
    synthetic: bool
    flip: bool
    resamples: int
    seed: int
    teacher: EncoderInfo
    student: EncoderInfo | None
    mapped: EncoderInfo | None
    control: Control | None
    training: dict[str, Training]


def common(encoder_set: EncoderSet, options: EvaluationOptions) -> Common:
    """Fill the fields of an Evaluation that do not depend on the protocol."""
    return Common(
        tool=tool_version(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        synthetic=options.synthetic,
        flip=options.flip,
        resamples=options.resamples,
        seed=options.seed,
        teacher=encoder_set.teacher.info,
        student=encoder_set.student.info if encoder_set.student else None,
        mapped=encoder_set.mapped.info if encoder_set.mapped else None,
        control=encoder_set.baseline or (Control(encoder=encoder_set.control.info) if encoder_set.control else None),
        training=encoder_set.training,
    )


def notes_on(encoder_set: EncoderSet, options: EvaluationOptions, comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """List what a reader must know before relying on the comparisons: no certificate, and why."""
    teacher, student = encoder_set.teacher, encoder_set.student
    notes = [*encoder_set.warnings]
    if student and student.info.space != teacher.info.space:
        compared = teacher.info.space.dim == student.info.space.dim
        notes.append(
            "Teacher and student embed into different spaces (a control): no certificate joins them"
            + (
                "."
                if compared
                else f", and {teacher.info.space.dim} and {student.info.space.dim} numbers have no cosine."
            )
        )
    if encoder_set.control:
        notes.append("The control, mapped or not, is there for comparison and gets no certificate.")
    if options.flip and comparisons:
        notes.append("Embeddings are sums over image and mirror image, which no server computes: no certificate.")
    if uncertified := [c.name for c in comparisons if not c.points]:
        notes.append(f"No certificate for {', '.join(uncertified)}: the set resolves none of the false match rates.")
    for c in comparisons:
        for point, people in zip(c.points, c.effective_people, strict=False):
            if people < EXPECTED:
                notes.append(
                    f"{c.name} at FMR {point.fmr:g}: most false matches are of few people, as good as {people:.0f} in "
                    "all. Its threshold and intervals are worth little: look at the worst pairs, or evaluate on more."
                )
        if c.suspects and {*c.name} <= {"T", "–", "S"}:
            s = c.suspects
            if s.count >= c.genuine_identities:
                notes.append(
                    f"{c.name}: {s.count:,} pairs of names look like one person, more than there are people: that is "
                    "no fault of labels. The encoder hardly tells these people apart: check its preprocessing first."
                )
                continue
            notes.append(
                f"{c.name}: {s.count:,} pair(s) of names look like one person under two labels (worst.html has them), "
                f"or like twins. {100 * s.share:.0f} % of the false matches at FMR {s.fmr:g} are theirs; without them "
                f"the TAR is {100 * s.tar_gain:.2f} points higher. Merge the names that are one person's."
            )
    return tuple(notes)


@dataclass(frozen=True)
class ProtocolResult:
    """Hold all that one evaluation writes into its folder."""

    evaluation: Evaluation
    resample_values: ResampleValues
    certificates: tuple[Certificate, ...] = ()
