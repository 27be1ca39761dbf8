"""What every protocol shares: its options, embeddings, and the common part of its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TypedDict

import numpy as np

from pkd.toolkit.core.cli_support import tool_version
from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.encoders.base import Embeddings, Encoder, unit_rows
from pkd.toolkit.encoders.embed import embed_faces
from pkd.toolkit.encoders.linear_maps import LinearMapEncoder
from pkd.toolkit.evaluation.metrics.operating_points import histogram
from pkd.toolkit.evaluation.metrics.pairing import Ints
from pkd.toolkit.evaluation.protocols.encoder_set import Lineup
from pkd.toolkit.evaluation.results.schema import Agreement, Comparison, Control, Data, Training

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Opens a progress bar: (label, total) → a function that is told how many more are done."""


@dataclass(frozen=True)
class Options:
    """How to evaluate. The only defaults."""

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


def embed(encoder: Encoder, faces: FaceSet, options: Options, bar: Bar) -> Embeddings:
    """float32 N×D unit rows. A mapped control is mapped from its own embeddings, which are cached."""
    if isinstance(encoder, LinearMapEncoder):
        return encoder.map(embed(encoder.base, faces, options, bar))
    sums = np.zeros((len(faces), encoder.info.space.dim), np.float32)
    for flip in (False, True) if options.flip else (False,):
        label = f"embedding with {encoder.info.name}{', mirrored' if flip else ''}"
        with bar(label, len(faces)) as advance:
            sums += embed_faces(encoder, faces, flip=flip, cache=options.cache, jobs=options.jobs, advance=advance)
    return unit_rows(sums, encoder.info.name)


def agree(teacher: Embeddings, student: Embeddings) -> Agreement:
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
    counts = np.bincount(labels)
    return Data(
        name=name,
        content_digest=digest,
        images=len(labels),
        identities=int((counts > 0).sum()),
        single_image_identities=int((counts == 1).sum()),
    )


class Common(TypedDict):
    tool: str
    created: str
    synthetic: bool
    flip: bool
    resamples: int
    seed: int
    teacher: EncoderInfo
    student: EncoderInfo | None
    control: Control | None
    training: dict[str, Training]


def common(lineup: Lineup, options: Options) -> Common:
    return Common(
        tool=tool_version(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        synthetic=options.synthetic,
        flip=options.flip,
        resamples=options.resamples,
        seed=options.seed,
        teacher=lineup.teacher.info,
        student=lineup.student.info if lineup.student else None,
        control=lineup.baseline or (Control(encoder=lineup.control.info) if lineup.control else None),
        training=lineup.training,
    )


def notes_on(lineup: Lineup, options: Options, comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    teacher, student = lineup.teacher, lineup.student
    notes = []
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
    if lineup.control:
        notes.append("The control, mapped or not, is there for comparison and gets no certificate.")
    if options.flip and comparisons:
        notes.append("Embeddings are sums over image and mirror image, which no server computes: no certificate.")
    if uncertified := [c.name for c in comparisons if not c.points]:
        notes.append(f"No certificate for {', '.join(uncertified)}: the set resolves none of the false match rates.")
    return tuple(notes)
