"""Measures of a face: what they are by their definition, on faces and points that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pkd.serving.core.errors import LowQuality
from pkd.serving.core.gallery_schemas import QualityLimits
from pkd.serving.core.options import Settings
from pkd.serving.inference.pipeline import Embedded
from pkd.serving.matching.quality import measure_quality, require_quality, server_limits, strictest
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.quality_file import quality_row, read_quality, write_quality
from pkd.toolkit.encoders.detector import Face
from pkd.toolkit.images.quality import MODEL, FaceQuality, exposure, inter_eye, measure_face, pose

GREY = np.full((112, 112, 3), 120, np.uint8)


def turned(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Project the usual face, turned by yaw, then pitch within it, then roll in the image."""
    b, a, r = np.radians([-yaw, -pitch, roll])
    nod = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    side = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    tilt = np.array([[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]])
    return np.asarray((MODEL @ (tilt @ side @ nod).T)[:, :2] * 1.7 + (200, 150))


@pytest.mark.parametrize(
    "angles", [(0, 0, 0), (40, 0, 0), (-25, 0, 0), (0, 20, 0), (0, -30, 0), (0, 0, 35), (20, -10, 15)]
)
def test_pose_is_found_again(angles: tuple[float, float, float]) -> None:
    assert pose(turned(*angles)) == pytest.approx(angles, abs=1e-9)


def test_the_pose_of_any_points_is_the_nearest_rotation() -> None:
    """By the singular value decomposition of the map that fits the usual face to the points best."""
    for seed in range(200):
        points = np.random.default_rng(seed).normal(200, 50, (5, 2))
        affine, *_ = np.linalg.lstsq(MODEL - MODEL.mean(0), points - points.mean(0), rcond=None)
        left, _, right = np.linalg.svd(affine.T, full_matrices=False)
        first, second = left @ right
        x, y, z = np.cross(first, second)
        expected = np.degrees([np.arcsin(x), -np.arctan2(y, z), np.arctan2(second[0], first[0])])
        assert pose(points) == pytest.approx(expected, abs=1e-6)
    assert pose(np.zeros((5, 2))) == (0, 0, 0)


def test_signs_of_a_pose() -> None:
    """The nose goes right, up, and the right eye down: each is positive."""
    right, up, clockwise = turned(30, 0, 0), turned(0, 20, 0), turned(0, 0, 20)
    assert right[2, 0] > right[:2, 0].mean() and up[2, 1] < turned(0, 0, 0)[2, 1] and clockwise[1, 1] > clockwise[0, 1]


def test_exposure_counts_what_is_neither_dark_nor_bright_within_the_face() -> None:
    grey = GREY[:, :, 0]
    half = grey.copy()
    half[:, 56:] = 250
    black = grey.copy()
    black[:20] = black[:, :20] = 0  # beyond the photograph
    assert [exposure(one) for one in (grey, half, half * 0, black)] == pytest.approx([1, 0.5, 0, 1])
    assert exposure(np.full_like(grey, 25)) == 0 and exposure(np.full_like(grey, 26)) == 1
    assert exposure(np.full_like(grey, 247)) == 0 and exposure(np.full_like(grey, 246)) == 1


def test_measures_of_a_photograph_and_of_a_crop() -> None:
    found = measure_face(GREY, turned(10, -5, 3), 0.25)
    assert (found.sharpness, found.exposure, found.occlusion) == (0, 1, 0.25)
    assert found.inter_eye == pytest.approx(inter_eye(turned(10, -5, 3)), abs=0.05)
    assert (found.yaw, found.pitch, found.roll) == (10, -5, 3)
    assert measure_face(GREY) == FaceQuality(0, 1)


def embedded(landmarks: np.ndarray | None) -> Embedded:
    faces = None if landmarks is None else [Face(np.array([0, 0, 90, 120], np.float32), landmarks, 0.9)]
    return Embedded(np.ones((1, 4), np.float32), [measure_face(GREY, landmarks)], faces)


def test_limits_of_server_gallery_and_request_hold_together() -> None:
    server = server_limits(Settings(enrol_sharpness=0))
    gallery, request = QualityLimits(yaw=30, inter_eye=50), QualityLimits(yaw=60, exposure=0.5)
    limits = strictest([server, gallery, request])
    assert (limits.yaw, limits.inter_eye, limits.exposure, limits.face_pixels) == (30, 50, 0.5, 40)
    require_quality(measure_quality(embedded(turned(-29, 0, 0)), 0), limits)
    with pytest.raises(
        LowQuality, match=r"yaw is -31, at most ±30 is required. Take a picture from the front"
    ) as refused:
        require_quality(measure_quality(embedded(turned(-31, 0, 0)), 0), limits)
    assert refused.value.details["low"] == ["yaw"] and refused.value.details["measured"]["yaw"] == -31
    require_quality(measure_quality(embedded(None), 0), limits)  # nothing but the crop is known


def test_the_file_beside_crops(tmp_path: Path) -> None:
    made = {"b/2.webp": FaceQuality(20.5, 1), "a/1,ü.webp": FaceQuality(3, 0.5, 43.2, -10, 2.5, 0, 0.1)}
    write_quality(tmp_path, made)
    assert read_quality(tmp_path) == made and read_quality(tmp_path / "nowhere") == {}
    path = tmp_path / "quality.csv"
    with path.open("a") as file:
        file.write(",".join(quality_row("b/2.webp", FaceQuality(9, 1))) + "\n" + "c/3.webp,1")  # killed here
    assert read_quality(tmp_path)["b/2.webp"].sharpness == 9
    for text in ("crop,sharpness\n", path.read_text().replace("20.5", "nan"), path.read_text().replace("20.5", "")):
        path.write_text(text)
        with pytest.raises(InputError, match=r"quality\.csv.*run pkd-align again"):
            read_quality(tmp_path)
