"""Pooling of faces to media and of media to templates against a plain loop in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.core.progress import no_progress
from pkd.toolkit.encoders.base import open_onnx
from pkd.toolkit.evaluation.datasets.ijb import read_templates
from pkd.toolkit.evaluation.protocols import templates as template_matching
from pkd.toolkit.evaluation.protocols.common import EvaluationOptions
from tests.support.evaluation_faces import PREPROCESS, write_teacher
from tests.support.ijb_files import write_ijb


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("block", [1 << 16, 4])
def test_pooling_is_that_of_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: bool, flip: bool, block: int
) -> None:
    monkeypatch.setattr(template_matching, "FACES", block)
    random = np.random.default_rng(1)
    crops = {
        name: [random.integers(0, 256, (112, 112, 3), np.uint8) for _ in range(n)]
        for name, n in zip("abc", (2, 5, 7), strict=True)
    }
    meta = write_ijb(tmp_path / "ijb", crops)
    templates = read_templates(meta, tmp_path / "ijb/loose_crop", scored=scored)
    encoder = open_onnx(write_teacher(tmp_path), Preprocess.parse(PREPROCESS))
    pooled = template_matching.pool(encoder, templates, EvaluationOptions(flip=flip, jobs=1), no_progress)

    loaded = templates.faces.load(range(len(templates.faces)), 112)
    vectors = encoder.embed(loaded).astype(np.float64)
    if flip:
        vectors += encoder.embed(np.ascontiguousarray(loaded[:, :, ::-1]))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    lines = [text.split() for text in (meta / "ijbc_face_tid_mid.txt").read_text().splitlines()]
    scores = [float(text.split()[-1]) for text in (meta / "ijbc_name_5pts_score.txt").read_text().splitlines()]
    for row, template in enumerate(templates.ids):
        of_media: dict[str, list[np.ndarray]] = {}
        for vector, (_, owner, medium), score in zip(vectors, lines, scores, strict=True):
            if int(owner) == template:
                of_media.setdefault(medium, []).append(vector * (score if scored else 1))
        total = np.sum([np.mean(faces, axis=0) for faces in of_media.values()], axis=0)
        np.testing.assert_allclose(pooled[row], total / np.linalg.norm(total), atol=1e-6)
