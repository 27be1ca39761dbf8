"""What every protocol checks before it measures."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.core.encoder_info import EncoderInfo, describe
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.encoders.base import Embeddings
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing
from pkd.toolkit.evaluation.protocols.common import EncoderSet, EvaluationOptions, notes_on, require_unseen
from pkd.toolkit.evaluation.results.schema import Suspects
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


@pytest.mark.parametrize(("count", "said"), [(3, "Merge the names"), (40, "no fault of labels. .* check its preproc")])
def test_more_pairs_of_alike_names_than_people_are_no_fault_of_labels(count: int, said: str, tmp_path: Path) -> None:
    """A teacher whose pixels were scaled wrongly takes everybody for everybody: no name is to be merged for that."""
    teacher, random = Trained("teacher", None), np.random.default_rng(0)
    labels, files = np.repeat(np.arange(40), 3), np.arange(120)
    rows = random.normal(size=(120, 8)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    scores = score_pairs(Pairing(labels, labels, files, files, 40, unordered=True), unit, unit)
    measured, _ = measure(scores, "T–T", teacher.info, teacher.info, fmrs=(0.1,), resamples=50, seed=0)
    alike = Suspects(count=count, people=(("a", "b"),), fmr=0.1, share=0.9, tar_gain=0.2)
    compared = measured.model_copy(update={"suspects": alike})
    notes = notes_on(EncoderSet(teacher), EvaluationOptions(cache=tmp_path), [compared])
    (found,) = [note for note in notes if "look like one person" in note]
    assert re.search(said, found)
