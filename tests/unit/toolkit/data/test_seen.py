"""Know again what a training saw, by image and by name; nothing else can be read from the file."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.seen import FILE, seen_in, write_seen


def faces(folder: Path, people: dict[str, list[int]]) -> FaceSet:
    for person, images in people.items():
        (folder / person).mkdir(parents=True)
        for grey in images:
            cv2.imwrite(str(folder / person / f"{grey}.png"), np.full((8, 8, 3), grey, np.uint8))
    return FaceSet.read(folder)


def test_images_and_people_that_a_training_saw_are_counted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_seen(run, faces(tmp_path / "train", {"ann": [1, 2], "bob": [3, 4], "7": [9]}))
    assert b"ann" not in (run / FILE).read_bytes()
    tested = faces(tmp_path / "test", {"ann": [5, 6], "someone": [4, 7], "7": [8, 10]})
    assert seen_in(run, tested, tmp_path / "cache") == (1, 1)  # bob's image under another name, ann by name
    assert seen_in(run, faces(tmp_path / "other", {"eve": [11]}), None) == (0, 0)


def test_a_run_that_does_not_say_and_a_broken_file_count_nothing(tmp_path: Path) -> None:
    tested = faces(tmp_path / "test", {"ann": [5]})
    assert seen_in(tmp_path, tested, None) == (0, 0)
    (tmp_path / FILE).write_bytes(b"PK\x03\x04 nonsense")
    assert seen_in(tmp_path, tested, None) == (0, 0)
