"""Text files as editors of every system save them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from pkd.serving.api.api_keys import ApiKeys, new_key
from pkd.serving.galleries.crypto import MasterKey
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.heads.label_map import read_label_map
from pkd.toolkit.evaluation.datasets.lfw import read_lfw
from pkd.toolkit.evaluation.metrics.labels import read_labels

SAVED: dict[str, Callable[[str], bytes]] = {
    "utf-8": str.encode,
    "a mark": lambda text: text.encode("utf-8-sig"),
    "lines of Windows": lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    "PowerShell": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "big endian": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
}


@pytest.fixture(params=SAVED)
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.touch(0o600)
        path.write_bytes(SAVED[request.param](text))
        return path

    return write


def crops(folder: Path) -> Path:
    for person in ("Zoë", "Bob"):
        (folder / person).mkdir(parents=True)
        for number in (1, 2):
            cv2.imwrite(str(folder / person / f"{person}_{number:04d}.png"), np.full((112, 112, 3), number, np.uint8))
    return folder


def test_every_text_file_that_people_write_is_read(save: Callable[[str, str], Path], tmp_path: Path) -> None:
    faces = crops(tmp_path / "faces")
    assert read_label_map(save("map.txt", "Zoë\nBob\n")) == ("Zoë", "Bob")
    assert read_label_map(save("map.json", '["Zoë", "Bob"]')) == ("Zoë", "Bob")
    assert read_labels(save("labels.csv", "identity,site\nZoë,north\n")).values == {"Zoë": ("north",)}
    assert len(read_lfw(save("pairs.txt", "1\nZoë 1 2\nZoë 1 Bob 2\n"), faces).first) == 2
    assert FaceSet.read(save("list.txt", "faces/Zoë/Zoë_0001.png\n")).identities == ("faces/Zoë",)
    assert FaceSet.read(save("back.txt", "faces\\Bob\\Bob_0001.png\n")).identities == ("faces/Bob",)
    assert Preprocess.parse(str(save("p.json", '{"mean": 0, "std": 1}'))).scales_nothing
    made = new_key("kiosk", "embed", None)
    keys = ApiKeys.read(save("keys.txt", made["line"] + "\n"))
    assert keys.check(f"Bearer {made['key']}").name == "kiosk"
    assert MasterKey.read(save("master", "ab" * 32 + "\n")).key == bytes([0xAB]) * 32
