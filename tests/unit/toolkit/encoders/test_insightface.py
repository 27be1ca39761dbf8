"""Packs are read by the installed insightface itself; the detector's network is a small one with SCRFD's outputs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from pkd.toolkit.core.errors import InputError, MissingExtra
from pkd.toolkit.encoders.detector import open_detector
from pkd.toolkit.encoders.insightface import detector, recogniser
from tests.support.spot_detector import FACE_SIDE, LANDMARKS, picture, write_spot_detector

pytest.importorskip("insightface", reason="insightface is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # insightface's own


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    folder = tmp_path / "pack"
    folder.mkdir()
    write_spot_detector(folder / "det_spots.onnx", "scrfd")
    return folder


def test_scrfd_finds_the_spot(pack: Path) -> None:
    (face,) = open_detector(f"insightface:{pack}").detect(picture(640, 640, (160, 96)))
    centre = np.array([164, 100])
    np.testing.assert_allclose(face.box, np.r_[centre - FACE_SIDE / 2, centre + FACE_SIDE / 2], atol=5)
    np.testing.assert_allclose(face.landmarks, LANDMARKS + centre, atol=5)
    assert 0.5 < face.score <= 1


def test_scrfd_shows_no_face_on_dark_and_tiny_images(pack: Path) -> None:
    found = detector(f"insightface:{pack}", 0.5)
    assert found.detect(picture(300, 200)) == []
    assert found.detect(picture(3, 3)) == []


def test_a_single_file_serves_too(pack: Path) -> None:
    assert detector(f"insightface:{pack / 'det_spots.onnx'}", 0.5).detect(picture(640, 640, (160, 96)))


def test_a_pack_by_name_under_insightface_home(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSIGHTFACE_HOME", str(tmp_path / "home"))
    nested = tmp_path / "home/models/buffalo_x/buffalo_x"  # some packs are zipped with their folder
    nested.parent.mkdir(parents=True)
    shutil.copytree(pack, nested)
    assert detector("insightface:buffalo_x", 0.5).detect(picture(640, 640, (160, 96)))


def test_a_pack_that_cannot_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Start insightface's own download, against a proxy that is not there."""
    monkeypatch.setenv("INSIGHTFACE_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"'buffalo_l' is not in .*models and could not be downloaded \(ProxyError\)"):
        detector("insightface:buffalo_l", 0.5)
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="could not be downloaded"):  # also the second time: nothing half made is left
        detector("insightface:buffalo_l", 0.5)


@pytest.mark.parametrize("spec", ["insightface:", "insightface:./missing", "insightface:a/b/c"])
def test_a_path_that_is_missing_is_not_downloaded(spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no such folder|names no pack"):
        recogniser(spec)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.onnx file"):
        recogniser(f"insightface:{tmp_path}")


def test_a_folder_without_a_recogniser_says_what_is_there(pack: Path) -> None:
    with pytest.raises(InputError, match=r"0 recognition networks \(det_spots\.onnx is detection\)"):
        recogniser(f"insightface:{pack}")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "w600k.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"w600k\.onnx cannot be read"):
        recogniser(f"insightface:{tmp_path}")


def test_two_detectors_are_ambiguous(pack: Path) -> None:
    shutil.copy(pack / "det_spots.onnx", pack / "det_other.onnx")
    with pytest.raises(InputError, match="holds 2 detection networks"):
        detector(f"insightface:{pack}", 0.5)


def test_without_insightface_the_extra_is_named(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "insightface", None)
    monkeypatch.setitem(sys.modules, "insightface.model_zoo", None)
    with pytest.raises(MissingExtra, match=r"pip install 'pkd\[insightface\]'"):
        detector(f"insightface:{pack}", 0.5)


@pytest.mark.shared
@pytest.mark.parametrize("file", ["teacher_mobilefacenet_y1_128.onnx", "teacher_edgeface_xs_512.onnx"])
def test_a_real_recogniser_and_the_scaling_insightface_gives_it(shared: Path, pack: Path, file: str) -> None:
    """See insightface go by node names and miss the scaling in the first graph; --teacher-preprocess overrides."""
    shutil.copy(shared / "models" / file, pack / "w600k_r50.onnx")
    path, preprocess = recogniser(f"insightface:{pack}")
    assert path == pack / "w600k_r50.onnx"
    assert (preprocess.mean, preprocess.std, preprocess.size, preprocess.channels) == (127.5, 127.5, 112, "rgb")


@pytest.mark.shared
def test_a_graph_with_its_scaling_inside_as_mxnet_named_it(shared: Path, pack: Path) -> None:
    model = onnx.load(shared / "models/teacher_mobilefacenet_y1_128.onnx")
    for node in model.graph.node[:8]:
        node.name = node.name.lstrip("/")
    onnx.save(model, pack / "w600k_r50.onnx")
    _, preprocess = recogniser(f"insightface:{pack}")
    assert (preprocess.mean, preprocess.std) == (0.0, 1.0)


@pytest.mark.parametrize("inside", ["pack", "another-name", "a/b"])
def test_a_folder_in_the_folder_is_followed(pack: Path, tmp_path: Path, inside: str) -> None:
    nested = tmp_path / "unzipped" / inside
    nested.parent.mkdir(parents=True)
    shutil.copytree(pack, nested)
    (tmp_path / "unzipped" / "__MACOSX").mkdir()
    assert detector(f"insightface:{tmp_path / 'unzipped'}", 0.5).detect(picture(640, 640, (160, 96)))
