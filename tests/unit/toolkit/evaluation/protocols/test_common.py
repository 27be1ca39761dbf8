"""What every protocol checks before it measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkd.toolkit.core.encoder_info import EncoderInfo, describe
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.encoders.base import Embeddings
from pkd.toolkit.evaluation.protocols.common import EncoderSet, EvaluationOptions, require_unseen
from pkd.toolkit.images.codec import Rgb
from tests.support.evaluation_faces import write_people


class Trained:
    """An encoder that says which images it was trained on."""

    def __init__(self, name: str, digest: str | None) -> None:
        self.info: EncoderInfo = describe(name, "student", name[0] * 64, Preprocess(), 8)
        self.training = {"data_digest": digest} if digest else {}

    def embed(self, crops: Rgb) -> Embeddings:
        raise NotImplementedError


def test_a_student_is_not_measured_on_its_own_training_images(tmp_path: Path) -> None:
    seen, others = (FaceSet.read(write_people(tmp_path / name, [2, 1], seed=i)) for i, name in enumerate("ab"))
    teacher, options = Trained("0teacher", None), EvaluationOptions(cache=tmp_path / "cache")
    student = EncoderSet(teacher, Trained("1student", seen.digest()))
    require_unseen(student, [others], options)
    require_unseen(EncoderSet(teacher, Trained("2bundle", None)), [seen], options)
    with pytest.raises(InputError, match=r"^1student: it was trained on these very images.*Evaluate on other people"):
        require_unseen(student, [others, seen], options)
