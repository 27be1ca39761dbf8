"""The README is true: its commands parse, its files exist, its program runs against a real server."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from pkd.serving.core.options import Settings
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.service import Service
from pkd.toolkit.images.codec import write_rgb
from tests.support.serving_bundles import crops, family, running

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    if not language
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("pkd-")
]
TREE = next(block for _, block in BLOCKS if block.startswith("toolkit/"))


def test_there_is_something_to_check() -> None:
    assert len({line.split()[0] for line in COMMANDS}) == 7
    assert len(TEXT.splitlines()) <= 150


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: " ".join(line.split()[:3]))
def test_every_option_exists(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(line)
    (entry,) = entry_points(group="console_scripts", name=program)
    with pytest.raises(SystemExit) as ended:
        entry.load()(["--help"])
    assert ended.value.code == 0
    offered = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out))
    assert {argument for argument in arguments if argument.startswith("-")} <= offered


def test_every_file_of_the_tree_exists() -> None:
    folder = ""
    for line in TREE.splitlines():
        names = [name for name in line.split() if re.fullmatch(r"[\w/]+(\.py|/)", name)]
        if not line.startswith(" "):
            folder = names[0]
            assert (ROOT / folder).is_dir(), folder
        else:
            assert names, line
            for name in names:
                assert (ROOT / folder / name).exists(), folder + name


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).is_file(), target


def test_the_program_for_the_device_runs(tmp_path: Path) -> None:
    """Executed as printed, in a process of its own; only the server's port is another."""
    (program,) = (block for language, block in BLOCKS if language == "python")
    made = family(tmp_path / "bundles")
    for i, crop in enumerate(crops(2)):
        path = tmp_path / f"faces/test/ann/{i + 1}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rgb(path, crop)
    with running(Service(Encoders.open(made.folders), Settings(threads=1), None)) as client:
        address = str(client.base_url).rstrip("/")
        assert "http://127.0.0.1:8000" in program
        program = program.replace("http://127.0.0.1:8000", address)
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    match, score, threshold, fmr = done.stdout.split()
    assert match == str(float(score) >= float(threshold))
    assert float(threshold) == 0.5  # the student → teacher certificate's at FMR 1e-2
    assert 0 < float(fmr) <= 1
