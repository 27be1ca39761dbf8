"""pkd-demo from nothing to a verified pair, as a stranger runs it, on a size that trains in seconds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pkd.toolkit.images.codec import read_rgb

COMMAND = str(Path(sys.executable).with_name("pkd-demo"))


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = subprocess.run(
        [COMMAND, "--out", out, "--identities", "8", "--images", "4", "--steps", "80", "--json"],
        capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert json.loads((out / "demo.json").read_text()) == told
    assert told["synthetic"] is True
    assert told["parameters"]["teacher"] >= 4 * told["parameters"]["student"]
    assert told["genuine"]["queries"] == 4 * 2
    assert told["impostor"]["queries"] == 4 * 2 * 3
    assert set(told["seconds"]) >= {
        "faces",
        "teacher",
        "student",
        "control",
        "evaluate",
        "export teacher",
        "export student",
    }
    assert read_rgb(out / "demo.png").shape == (1215, 1800, 3)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "Synthetic faces" in html and "Over HTTP" in html and "data:image/png;base64," in html
    for cell in ("S–T", "C–T", "P–T", "R–T"):
        assert f"<b>{cell}</b>" in html
    assert not re.search(r'(src|href)="(?!data:|#)', html), "the report must be one file"
    for name in ("teacher", "student"):
        assert list((out / "bundles" / name / "certificates").glob("*.json"))
        assert (out / f"logs/export-{name}.log").is_file()
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(out) not in left
