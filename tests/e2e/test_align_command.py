"""pkd-align as a user runs it: a process, folders of photographs, what it writes and how it refuses."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pkd.toolkit.cli.align import main
from pkd.toolkit.images.codec import read_rgb, write_rgb
from tests.support.spot_detector import picture, write_spot_detector

PROGRAM = str(Path(sys.executable).with_name("pkd-align"))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_spot_detector(tmp_path_factory.mktemp("detector") / "spots.onnx", "yunet"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two people, four photographs that show a spot."""
    for name, x in (("ann/1.jpg", 64), ("ann/2.png", 96), ("bob/1.jpeg", 128), ("bob/album/2.webp", 160)):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        write_rgb(tmp_path / "photos" / name, picture(320, 240, (x, 96)))
    return tmp_path / "photos"


def align(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def skipped(folder: Path) -> dict[str, str]:
    with (folder / "skipped.csv").open(newline="", encoding="utf-8") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def crops(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.webp"))


def test_keeps_the_folder_of_every_person(photos: Path, tmp_path: Path, detector: str) -> None:
    done = align(photos, tmp_path / "faces", "--detector", detector, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["written"] == 4
    assert crops(tmp_path / "faces") == ["ann/1.webp", "ann/2.webp", "bob/1.webp", "bob/album/2.webp"]
    crop = read_rgb(tmp_path / "faces/ann/1.webp")
    assert crop.shape == (112, 112, 3)
    assert crop[50:62, 50:62].mean() > 230  # the spot's centre is the middle of the template
    assert crop[:30].mean() < 40
    assert skipped(tmp_path / "faces") == {}


def test_everything_left_out_is_listed_with_its_reason(photos: Path, tmp_path: Path, detector: str) -> None:
    write_rgb(photos / "ann/dark.png", picture(320, 240))
    (photos / "ann/empty.jpg").touch()
    (photos / "ann/text.jpg").write_text("not a picture")
    whole = (photos / "ann/1.jpg").read_bytes()
    (photos / "bob/torn.jpg").write_bytes(whole[: len(whole) // 3])
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(b"")
    header = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (ihdr, idat)
    )
    (photos / "bob/huge.png").write_bytes(header)
    (photos / "bob/scan.tif").write_bytes(b"II*")
    (photos / "bob/gone.jpg").symlink_to("nowhere.jpg")
    (photos / ".DS_Store").write_bytes(b"x")
    done = align(photos, tmp_path / "faces", "--detector", detector)
    assert done.returncode == 0
    assert "4 crops written" in done.stderr
    assert "7 files skipped" in done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("aligning: ")]  # that it is slow today
    assert len(said) == 2  # and nothing of OpenCV's own
    reasons = skipped(tmp_path / "faces")
    assert {name: next(word for word in WORDS if word in reason) for name, reason in reasons.items()} == {
        "ann/dark.png": "no face found",
        "ann/empty.jpg": "empty image",
        "ann/text.jpg": "not a JPEG",
        "bob/torn.jpg": "truncated or corrupt",
        "bob/huge.png": "over the limit",
        "bob/scan.tif": "convert it first",
        "bob/gone.jpg": "a broken link",
    }
    assert len(crops(tmp_path / "faces")) == 4


WORDS = (
    "no face found",
    "empty image",
    "not a JPEG",
    "truncated or corrupt",
    "over the limit",
    "convert it first",
    "a broken link",
)


def test_exif_orientation_is_applied(tmp_path: Path, detector: str) -> None:
    upright = picture(320, 240, (64, 96))
    upright[100:140, 240:280] = (200, 40, 40)
    stored = Image.fromarray(np.rot90(upright).copy())  # as a camera held sideways stores it
    exif = stored.getexif()
    exif[0x0112] = 6  # "turn by 90° clockwise to view"
    for person, extra in (("plain", None), ("turned", exif)):
        (tmp_path / "photos" / person).mkdir(parents=True)
        image = stored if extra else Image.fromarray(upright)
        image.save(tmp_path / "photos" / person / "a.png", exif=extra)
    assert align(tmp_path / "photos", tmp_path / "faces", "--detector", detector).returncode == 0
    plain, turned = (read_rgb(tmp_path / "faces" / person / "a.webp").astype(int) for person in ("plain", "turned"))
    assert np.abs(plain - turned).mean() < 1


def test_same_stem_twice_keeps_both(photos: Path, tmp_path: Path, detector: str) -> None:
    shutil.copy(photos / "ann/2.png", photos / "ann/1.png")
    assert align(photos, tmp_path / "faces", "--detector", detector).returncode == 0
    assert crops(tmp_path / "faces")[:3] == ["ann/1.jpg.webp", "ann/1.png.webp", "ann/2.webp"]


def test_a_second_run_only_does_what_is_left(photos: Path, tmp_path: Path, detector: str) -> None:
    faces = tmp_path / "faces"
    align(photos, faces, "--detector", detector)
    stamps = {name: (faces / name).stat().st_mtime_ns for name in crops(faces)}
    (faces / "bob/1.webp").unlink()
    done = json.loads(align(photos, faces, "--detector", detector, "--json").stdout)
    assert (done["written"], done["already_there"]) == (1, 3)
    assert {n for n in crops(faces) if (faces / n).stat().st_mtime_ns != stamps[n]} == {"bob/1.webp"}
    newer = time.time() + 10
    os.utime(photos / "ann/1.jpg", (newer, newer))  # replaced since: done again
    assert json.loads(align(photos, faces, "--detector", detector, "--json").stdout)["written"] == 1


def test_larger_crops_for_encoders_that_take_them(photos: Path, tmp_path: Path, detector: str) -> None:
    assert align(photos, tmp_path / "out", "--detector", detector, "--size", "160").returncode == 0
    assert all(read_rgb(path).shape == (160, 160, 3) for path in (tmp_path / "out").rglob("*.webp"))
    mixed = align(photos, tmp_path / "out", "--detector", detector)
    assert mixed.returncode == 2 and "--size" in mixed.stderr


def test_crops_of_two_settings_are_not_mixed(photos: Path, tmp_path: Path, detector: str) -> None:
    align(photos, tmp_path / "faces", "--detector", detector)
    done = align(photos, tmp_path / "faces", "--detector", detector, "--min-score", "0.7")
    assert done.returncode == 2
    assert "made with another detector, --min-score or --size" in done.stderr


def test_one_thread_and_many_give_the_same_bytes(photos: Path, tmp_path: Path, detector: str) -> None:
    for jobs in ("1", "5"):
        assert align(photos, tmp_path / jobs, "--detector", detector, "--jobs", jobs).returncode == 0
    for name in crops(tmp_path / "1"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "5" / name).read_bytes()


def refusals(tmp_path: Path) -> dict[str, tuple[str, list[str | Path]]]:
    photos, empty, file = tmp_path / "photos", tmp_path / "empty", tmp_path / "file.txt"
    empty.mkdir()
    file.write_text("x")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    return {
        "missing source": ("no such folder", [tmp_path / "nope", tmp_path / "out"]),
        "source is a file": ("no such folder", [file, tmp_path / "out"]),
        "empty source": ("holds no photograph", [empty, tmp_path / "out"]),
        "same folder": ("must not hold one another", [photos, photos]),
        "inside": ("must not hold one another", [photos, photos / "crops"]),
        "around": ("must not hold one another", [photos, tmp_path]),
        "target is a file": ("is a file", [photos, file]),
        "somebody's folder": ("not made by pkd-align", [photos, other]),
        "no threads": ("--jobs 0", [photos, tmp_path / "out", "--jobs", "0"]),
        "score": ("--min-score 2", [photos, tmp_path / "out", "--min-score", "2"]),
    }


def test_bad_input_is_one_line_and_exit_code_2(
    photos: Path, tmp_path: Path, detector: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (words, arguments) in refusals(tmp_path).items():
        assert main([*map(str, arguments), "--detector", detector]) == 2, name
        out, line = capsys.readouterr()
        assert words in line, name
        assert line.count("\n") == 1, name
        assert line.startswith("pkd-align: "), name
        assert out == "", name
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_no_crop_at_all_is_an_error(tmp_path: Path, detector: str) -> None:
    (tmp_path / "photos/ann").mkdir(parents=True)
    write_rgb(tmp_path / "photos/ann/dark.png", picture(320, 240))
    done = align(tmp_path / "photos", tmp_path / "faces", "--detector", detector)
    assert done.returncode == 2
    assert "none of 1 files gave a crop (first: ann/dark.png: no face found" in done.stderr


def test_a_stop_leaves_whole_crops_and_the_next_run_goes_on(tmp_path: Path, detector: str) -> None:
    (tmp_path / "photos/ann").mkdir(parents=True)
    image = cv2.resize(picture(640, 480, (320, 240)), (2560, 1920), interpolation=cv2.INTER_NEAREST)
    write_rgb(tmp_path / "photos/ann/0.png", image)  # type: ignore[arg-type]
    for i in range(1, 30):
        (tmp_path / f"photos/ann/{i}.png").hardlink_to(tmp_path / "photos/ann/0.png")
    faces = tmp_path / "faces"
    running = subprocess.Popen([PROGRAM, tmp_path / "photos", faces, "--detector", detector, "--jobs", "1"])
    limit = time.monotonic() + 30
    while not crops(faces) and time.monotonic() < limit:
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 130
    made = crops(faces)
    assert 0 < len(made) < 30
    assert not list(faces.rglob("*.part"))
    assert all(read_rgb(faces / name).shape == (112, 112, 3) for name in made)
    done = json.loads(align(tmp_path / "photos", faces, "--detector", detector, "--json").stdout)
    assert (done["written"], done["already_there"]) == (30 - len(made), len(made))


@pytest.mark.shared
def test_real_photographs(shared: Path, tmp_path: Path) -> None:
    """Crops of real photographs lie on those that were made from the same photographs elsewhere."""
    for person in sorted((shared / "faces/lfw/raw-devtest").iterdir())[:12]:
        shutil.copytree(person, tmp_path / "photos" / person.name)
    done = align(tmp_path / "photos", tmp_path / "faces", "--detector", shared / "models/yunet_n_dynamic.onnx")
    assert done.returncode == 0, done.stderr
    for name in crops(tmp_path / "faces"):
        ours, theirs = read_rgb(tmp_path / "faces" / name), read_rgb(shared / "faces/lfw/aligned" / name)
        assert np.abs(ours.astype(int) - theirs).mean() < 6, name
