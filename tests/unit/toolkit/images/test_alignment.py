"""A face is warped onto the template."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pkd.toolkit.core.errors import NoFace
from pkd.toolkit.images.alignment import SIZE, TEMPLATE, similarity, warp


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:, :2].T + matrix[:, 2]


def test_the_template_maps_onto_itself() -> None:
    np.testing.assert_allclose(similarity(TEMPLATE), [[1, 0, 0], [0, 1, 0]], atol=1e-12)


def test_never_a_reflection() -> None:
    """Mirrored landmarks (a swapped detector) must turn, not flip, the face."""
    mirrored = TEMPLATE * [-1, 1]
    assert np.linalg.det(similarity(mirrored)[:, :2]) > 0


@pytest.mark.parametrize("points", [np.full((5, 2), 7.0), np.full((5, 2), np.nan), np.zeros((4, 2)), np.zeros(10)])
def test_useless_landmarks_are_refused(points: np.ndarray) -> None:
    with pytest.raises(NoFace):
        similarity(points)


def test_collinear_points_still_give_a_similarity() -> None:
    """A full profile puts the points nearly on a line."""
    line = np.column_stack([np.zeros(5), np.arange(5.0)])
    assert np.isfinite(similarity(line)).all()


@pytest.mark.parametrize("size", [112, 224, 64])
def test_crop_has_the_size_asked_for(size: int) -> None:
    crop = warp(np.zeros((300, 200, 3), np.uint8), TEMPLATE + 20, size)
    assert crop.shape == (size, size, 3)
    assert crop.dtype == np.uint8


def test_an_aligned_crop_is_left_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    np.testing.assert_array_equal(warp(image, TEMPLATE), image)


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.9, 2.1, 4.0, 9.0])
@pytest.mark.parametrize("angle", [0.0, 0.4, -2.5])
def test_a_scaled_and_turned_face_comes_back(scale: float, angle: float) -> None:
    """Also across the point where large faces are averaged down first: no shift, no blur beyond the resampling's."""
    coarse = np.random.default_rng(1).integers(0, 256, (7, 7, 3), np.uint8)
    face = cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    side = int(200 * scale)
    forward = np.column_stack([turn, side / 2 - turn @ [56, 56]])
    photo = cv2.warpAffine(face, forward, (side, side), flags=cv2.INTER_CUBIC)
    crop = warp(photo, apply(forward, TEMPLATE))  # type: ignore[arg-type]
    inner = slice(8, -8)
    difference = np.abs(crop[inner, inner].astype(int) - face[inner, inner])
    assert difference.mean() < 2.5


def test_large_faces_do_not_alias() -> None:
    """A fine checkerboard averages to grey instead of turning into a moiré pattern."""
    board = np.indices((1120, 1120)).sum(0) % 2 * 255
    photo = np.repeat(board[:, :, None], 3, axis=2).astype(np.uint8)
    crop = warp(photo, TEMPLATE * 10.3)
    assert crop[10:-10, 10:-10].std() < 4


def test_what_lies_outside_the_photograph_is_black() -> None:
    crop = warp(np.full((112, 112, 3), 200, np.uint8), TEMPLATE - [50, 0])
    assert (crop[:, :40] == 0).all()
    assert (crop[:, 60:] == 200).all()
