"""The Python API: every form of images gives the same rows, what cannot be used is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pkd.toolkit
from pkd.toolkit import FaceSet, align, compare, decide, embed, open_detector, open_encoder, read_certificate
from pkd.toolkit.core.errors import BadImage, BadVector, InputError, NoFace, UnsupportedFmr
from pkd.toolkit.encoders.base import Encoder
from pkd.toolkit.images.codec import read_rgb, write_rgb
from pkd.toolkit.synthetic.faces import write_faces
from tests.support.bundle_factory import bundle, certificate, teacher_file
from tests.support.serving_bundles import family
from tests.support.spot_detector import picture, write_spot_detector


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    write_faces(folder / "faces", 3, 46, 2, difficulty=0.5)
    bundle(folder)
    teacher_file(folder / "teacher.onnx")
    return folder


@pytest.fixture(scope="module")
def encoder(place: Path) -> Encoder:
    return open_encoder(place / "bundle")


def test_every_form_of_images_gives_the_same_rows(place: Path, encoder: Encoder, tmp_path: Path) -> None:
    faces = FaceSet.read(place / "faces")
    paths = [place / "faces" / name for name in faces.names]
    rows = embed(encoder, paths)
    assert rows.dtype == np.float32 and rows.shape == (92, encoder.info.space.dim)
    crops = np.stack([read_rgb(path) for path in paths])
    for images in (
        faces,
        place / "faces",
        str(place / "faces"),
        crops,
        list(crops),
        [*map(str, paths[:5]), *crops[5:]],
    ):
        assert np.allclose(embed(encoder, images), rows, atol=1e-6)
    assert np.allclose(embed(encoder, faces, cache=tmp_path, jobs=1), rows, atol=1e-6)
    for image in (paths[3], str(paths[3]), crops[3]):
        assert np.allclose(embed(encoder, image), rows[3:4], atol=1e-6)
    assert embed(encoder, []).shape == (0, encoder.info.space.dim)


def test_what_cannot_be_embedded_is_refused_by_name(place: Path, encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    crop = np.zeros((112, 112, 3), np.uint8)
    with pytest.raises(BadImage, match=r"broken\.png: not a JPEG"):
        embed(encoder, [tmp_path / "broken.png"])
    with pytest.raises(BadImage, match=r"float64 \(112, 112, 3\); give uint8 H×W×3"):
        embed(encoder, [crop.astype(np.float64)])
    with pytest.raises(InputError, match=r"image 1: 60×50 pixels, expected an aligned 112×112 crop"):
        embed(encoder, [crop, np.zeros((50, 60, 3), np.uint8)])
    with pytest.raises(InputError, match="no such folder or list file"):
        embed(encoder, tmp_path / "nowhere")
    with pytest.raises(InputError, match="preprocessing is not stated"):
        open_encoder(place / "teacher.onnx")


def test_a_photograph_is_aligned(tmp_path: Path) -> None:
    detector = open_detector(str(write_spot_detector(tmp_path / "yunet.onnx", "yunet")))
    photograph = picture(320, 240, (96, 96))
    write_rgb(tmp_path / "photo.png", photograph)
    crop = align(photograph, detector)
    assert crop.shape == (112, 112, 3) and crop[50:62, 50:62].mean() > 200
    assert np.array_equal(align(tmp_path / "photo.png", detector), crop)
    assert align(photograph, detector, size=160).shape == (160, 160, 3)
    with pytest.raises(NoFace):
        align(picture(320, 240), detector)


def test_encoders_of_one_space_are_compared_three_ways_and_of_two_spaces_each_by_itself(
    place: Path, encoder: Encoder, tmp_path: Path
) -> None:
    made = family(tmp_path)
    teacher, student = open_encoder(tmp_path / "teacher"), open_encoder(tmp_path / "student")
    assert (teacher.info, student.info) == (made.teacher.info, made.student.info)
    names = {c.name: c for c in compare(teacher, student, place / "faces", resamples=100, jobs=1)}
    assert set(names) == {"T–T", "S–S", "S–T"}
    (point,) = names["S–T"].points
    low, high = point.tar_balanced_ci95
    assert point.fmr == 1e-2 and 0 <= low <= point.tar_balanced <= high <= 1
    assert [c.name for c in compare(teacher, encoder, FaceSet.read(place / "faces"), resamples=100, jobs=1)] == [
        "T–T", "S–S",
    ]  # fmt: skip
    with pytest.raises(UnsupportedFmr):
        compare(teacher, student, place / "faces", fmrs=[1e-6])
    with pytest.raises(InputError, match="at least 100"):
        compare(teacher, student, place / "faces", resamples=1)


def test_a_certificate_decides(tmp_path: Path) -> None:
    made = certificate("s@sha256:1", "t@sha256:2", "t@sha256:3")
    (tmp_path / "c.json").write_text(made.model_dump_json())
    read = read_certificate(tmp_path / "c.json")
    fmr = read.points[0].fmr
    threshold = read.threshold(fmr)
    assert decide(read, threshold, fmr).match and not decide(read, threshold - 1e-6, fmr).match
    sure = decide(read, 1.0, fmr)
    assert sure.is_upper_bound and sure.fmr_ci95[0] <= sure.fmr <= sure.fmr_ci95[1] and sure.threshold == threshold
    with pytest.raises(UnsupportedFmr):
        decide(read, 0.5, 1e-12)
    with pytest.raises(BadVector):
        decide(read, float("nan"), fmr)


def test_importing_costs_nothing_and_knows_its_names() -> None:
    program = (
        "import sys, pkd.toolkit\nassert not {'numpy', 'cv2', 'torch', 'pydantic'} & set(sys.modules)\n"
        "from pkd.toolkit import embed, compare, open_encoder\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert set(pkd.toolkit.__all__) <= set(dir(pkd.toolkit))
    assert all(getattr(pkd.toolkit, name).__doc__ for name in pkd.toolkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pkd.toolkit.nonsense  # type: ignore[attr-defined]
