"""Our alignment against the ones that published models were trained with."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from skimage.transform import SimilarityTransform

from pkd.toolkit.images.alignment import TEMPLATE, similarity, warp


@pytest.fixture(params=range(5))
def landmarks(request: pytest.FixtureRequest) -> np.ndarray:
    noise = np.random.default_rng(request.param)
    return (TEMPLATE + noise.normal(0, 4, (5, 2))) * noise.uniform(0.8, 1.8) + noise.uniform(5, 60, 2)


def test_same_matrix_as_scikit_image(landmarks: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = SimilarityTransform()
        reference.estimate(landmarks, TEMPLATE)
    np.testing.assert_allclose(similarity(landmarks), reference.params[:2], atol=1e-9)


def test_same_crop_as_insightface(landmarks: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        face_align = pytest.importorskip("insightface.utils.face_align")
        image = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
        reference = face_align.norm_crop(image, landmarks.astype(np.float32))
    assert np.abs(warp(image, landmarks).astype(int) - reference).mean() < 0.1
