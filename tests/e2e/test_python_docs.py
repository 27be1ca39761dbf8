"""docs/python.md is true: its blocks run as they are printed, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pkd.toolkit.images.codec import write_rgb
from pkd.toolkit.synthetic.faces import write_faces
from tests.support.bundle_factory import teacher_file
from tests.support.serving_bundles import certificate, family
from tests.support.spot_detector import picture, write_spot_detector

TEXT = (Path(__file__).resolve().parents[2] / "docs/python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = family(tmp_path / "bundles")
    (tmp_path / "certificate.json").write_text(certificate(made.student.info, made.teacher.info).model_dump_json())
    write_faces(tmp_path / "faces", 5, 48, 3, difficulty=0.5)
    for name in ("ann", "bob"):
        for i in (1, 2):
            path = tmp_path / f"faces/{name}/{i}.webp"
            path.parent.mkdir(exist_ok=True)
            write_rgb(path, picture(112, 112, (20 * i, 40)))
    write_rgb(tmp_path / "photo.jpg", picture(320, 240, (96, 96)))
    write_spot_detector(tmp_path / "yunet.onnx", "yunet")
    teacher_file(tmp_path / "teacher.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) == 6
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, names)
    said = capsys.readouterr().out
    assert names["vector"].shape == (1, names["encoder"].info.space.dim)
    assert names["crop"].shape == (112, 112, 3)
    assert re.search(r"^S–T: TAR \d\.\d+ \(\d\.\d+ to \d\.\d+\) at FMR 0\.01$", said, re.MULTILINE)
    assert names["decision"].score == pytest.approx(names["score"])
    assert np.allclose(np.linalg.norm(names["vectors"], axis=1), 1, atol=1e-5)
