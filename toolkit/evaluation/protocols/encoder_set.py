"""Lineup: the encoders of one evaluation, by letter. "S–T": query by the student, gallery by the teacher."""

from __future__ import annotations

from dataclasses import dataclass, field

from pkd.toolkit.core.encoder_info import require_same_space
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.encoders.base import Encoder
from pkd.toolkit.evaluation.results.schema import Control, Training

Cell = tuple[str, str]
"""Letters of the query side and of the gallery side."""


@dataclass(frozen=True)
class Lineup:
    """T the teacher, S its student; C an undistilled control, P and R the control's embeddings, mapped."""

    teacher: Encoder
    student: Encoder | None = None
    control: Encoder | None = None
    maps: dict[str, Encoder] = field(default_factory=dict)
    """Letter → the control behind a linear map into the teacher's space."""
    baseline: Control | None = None
    """What report.json says of control and maps, where there are maps."""

    @property
    def encoders(self) -> dict[str, Encoder]:
        """Letter → encoder, in the order of the report."""
        named = {"T": self.teacher, "S": self.student, "C": self.control}
        return {letter: encoder for letter, encoder in named.items() if encoder} | self.maps

    @property
    def training(self) -> dict[str, Training]:
        """Letter → what a run or a bundle says of how that encoder was trained."""
        told = {letter: dict(getattr(encoder, "training", {})) for letter, encoder in self.encoders.items()}
        return {letter: training for letter, training in told.items() if training}

    def certifies(self, query: str, gallery: str) -> bool:
        """Whether this ordered pair may get a certificate: teacher and student do where they share a space."""
        encoders = self.encoders
        return {query, gallery} <= {"T", "S"} and encoders[query].info.space == encoders[gallery].info.space

    def cells(self, *, with_probe: bool, any_space: bool) -> list[Cell]:
        """The ordered pairs to compare. Over one set T–S is S–T transposed, so it is left out.

        Raises InputError where two letters are one encoder, SpaceMismatch for a student of another teacher.
        """
        seen: dict[str, str] = {}
        for encoder in self.encoders.values():
            if encoder.info.id in seen:
                raise InputError(f"{encoder.info.name}: given twice. Teacher, student and control are three encoders.")
            seen[encoder.info.id] = encoder.info.name
        if self.student and not any_space:
            require_same_space(self.teacher.info, self.student.info)
        found = [("T", "T")]
        for letter, encoder in self.encoders.items():
            if letter == "T":
                continue
            if encoder.info.space.dim == self.teacher.info.space.dim:
                found += [(letter, "T"), *([("T", letter)] if with_probe and letter == "S" else [])]
            if letter in "SC":
                found.append((letter, letter))
        return found
