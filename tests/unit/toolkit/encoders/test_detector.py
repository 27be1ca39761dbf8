"""Faces are found in photographs of any size."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest

from pkd.toolkit.core.errors import InputError, NoFace
from pkd.toolkit.encoders.detector import Face, choose, open_detector
from pkd.toolkit.images.codec import read_rgb
from tests.support.spot_detector import FACE_SIDE, LANDMARKS, picture, write_spot_detector


@pytest.fixture(scope="module")
def spots(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_spot_detector(tmp_path_factory.mktemp("detector") / "spots.onnx", "yunet"))


def face(x: float, y: float, side: float) -> Face:
    return Face(np.array([x, y, x + side, y + side], np.float32), np.zeros((5, 2), np.float32), 0.9)


def test_box_and_landmarks_are_where_the_network_says(spots: str) -> None:
    (found,) = open_detector(spots).detect(picture(320, 240, (160, 96)))
    centre = np.array([164, 100])
    np.testing.assert_allclose(found.box, np.r_[centre - FACE_SIDE / 2, centre + FACE_SIDE / 2], atol=1e-3)
    np.testing.assert_allclose(found.landmarks, LANDMARKS + centre, atol=1e-3)
    assert 0.5 < found.score <= 1


def test_sizes_that_are_no_multiple_of_32(spots: str) -> None:
    detector = open_detector(spots)
    for width, height in ((33, 47), (129, 250), (640, 17), (500, 375)):
        (found,) = detector.detect(picture(width, height, (8, 8)))
        np.testing.assert_allclose(found.landmarks, LANDMARKS + 12, atol=1e-3)


def test_landmarks_of_a_downscaled_photograph_come_back_in_its_own_pixels(spots: str) -> None:
    image = cv2.resize(picture(640, 480, (320, 240)), None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
    (found,) = open_detector(spots).detect(image)  # type: ignore[arg-type]
    centre = (found.box[:2] + found.box[2:]) / 2
    # the spot covers [1280, 1312) × [960, 992); its centre in pixel-centre coordinates is half a pixel less
    assert np.abs(centre - (1296, 976)).max() <= 4


def test_a_small_spot_is_found_at_the_larger_side(spots: str) -> None:
    image = cv2.resize(picture(1920, 960, (960, 480)), (3840, 1920), interpolation=cv2.INTER_NEAREST)
    (found,) = open_detector(spots).detect(image)  # type: ignore[arg-type]
    assert np.abs((found.box[:2] + found.box[2:]) / 2 - (1928, 968)).max() <= 8


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (15, 100), (16, 16), (16, 9000)])
def test_odd_shapes_show_no_face_and_do_not_fail(spots: str, shape: tuple[int, int]) -> None:
    assert open_detector(spots).detect(np.zeros((*shape, 3), np.uint8)) == []


def test_threads_share_a_detector(spots: str) -> None:
    detector = open_detector(spots)
    sizes = [(320 + 8 * i, 240 + 8 * (i % 5), 8 * (i % 20)) for i in range(40)]
    gate = threading.Barrier(4)

    def work(part: int) -> list[np.ndarray]:
        gate.wait()
        return [detector.detect(picture(w, h, (x, 80)))[0].landmarks for w, h, x in sizes[part::4]]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(4)))
    for part, landmarks in enumerate(together):
        for (_, _, x), points in zip(sizes[part::4], landmarks, strict=True):
            np.testing.assert_allclose(points, LANDMARKS + np.array([x + 4, 84]), atol=1e-3)


HELD = """
import re, sys
import numpy as np
from pathlib import Path
from pkd.toolkit.core.malloc import return_freed_memory
from pkd.toolkit.encoders.detector import open_detector
print(return_freed_memory({}))
detector = open_detector(sys.argv[1])
def held():
    return int(re.findall(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0]) // 1024
before = held()
detector.detect(np.zeros((1440, 1920, 3), np.uint8))
print(held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_thread_does_not_keep_what_a_large_photograph_took(spots: str) -> None:
    said = subprocess.run([sys.executable, "-c", HELD, spots], capture_output=True, text=True, check=True).stdout
    gives_back, held = re.findall(r"\S+", said)
    if gives_back != "True":
        pytest.skip("the C library has no mallopt")
    assert int(held) < 60  # MB; 140 where the network stays


def test_nothing_reaches_stderr(spots: str, capfd: pytest.CaptureFixture[str]) -> None:
    open_detector(spots).detect(picture(320, 240, (160, 96)))
    assert capfd.readouterr() == ("", "")


def test_choose_takes_the_largest() -> None:
    image = np.zeros((400, 600, 3), np.uint8)
    assert choose([face(250, 150, 60), face(150, 100, 160)], image).box[0] == 150


def test_choose_prefers_the_centre_among_equals() -> None:
    image = np.zeros((400, 600, 3), np.uint8)
    assert choose([face(0, 0, 100), face(260, 160, 100), face(500, 300, 100)], image).box[0] == 260


def test_choose_does_not_take_a_speck_in_the_centre_for_the_subject() -> None:
    image = np.zeros((3000, 4000, 3), np.uint8)
    assert choose([face(1990, 1490, 20), face(600, 600, 400)], image).box[0] == 600


def test_no_face_is_an_error() -> None:
    with pytest.raises(NoFace, match="no face found"):
        choose([], np.zeros((10, 10, 3), np.uint8))


def test_a_missing_detector_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"yunet\.onnx: No such file"):
        open_detector(str(tmp_path / "yunet.onnx"))


def test_a_text_file_is_no_detector(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("hello")
    with pytest.raises(InputError, match="not an ONNX file"):
        open_detector(str(tmp_path / "a.onnx"))


def test_another_network_is_no_yunet(tmp_path: Path) -> None:
    other = write_spot_detector(tmp_path / "scrfd.onnx", "scrfd")
    with pytest.raises(InputError, match="not a YuNet network"):
        open_detector(str(other))


@pytest.mark.parametrize("score", [0, 1, -1, 2, float("nan")])
def test_min_score_must_be_a_confidence(spots: str, score: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        open_detector(spots, score)


@pytest.mark.shared
def test_a_graph_that_opencv_does_not_run_is_refused_when_it_is_opened(
    spots: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(spots)  # onnxruntime takes nodes out of order, OpenCV does not
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes[::-1])
    onnx.save(model, str(tmp_path / "turned.onnx"))
    with pytest.raises(InputError, match=r"turned\.onnx: onnxruntime loads it, but OpenCV, which runs it") as caught:
        open_detector(str(tmp_path / "turned.onnx"))
    assert "cpp" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("file", ["yunet_n_dynamic.onnx", "yunet_n_640_640.onnx"])
def test_real_faces_of_many_sizes(shared: Path, file: str) -> None:
    """The same photograph from 60 to 3,000 pixels wide: always found, landmarks within a tenth of the face.

    YuNet itself moves its points by 3.5 % of the face's width on average, and 9 % at most, from size to size.
    """
    detector = open_detector(str(shared / "models" / file))
    for path in sorted((shared / "faces/lfw/raw-devtest").glob("*/*.jpg"))[::400]:
        image = read_rgb(path)
        reference = choose(detector.detect(image), image)
        width = reference.box[2] - reference.box[0]
        for factor in (0.25, 0.5, 2, 5, 12):
            how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
            scaled = cv2.resize(image, None, fx=factor, fy=factor, interpolation=how)
            found = choose(detector.detect(scaled), scaled)  # type: ignore[arg-type]
            back = (found.landmarks + 0.5) / factor - 0.5
            moved = np.linalg.norm(back - reference.landmarks, axis=1).mean()
            assert moved < 0.1 * width, (path.name, factor)
