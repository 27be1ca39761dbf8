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
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PARTS = ("toolkit", "export", "serving")


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


def test_the_map_of_the_house_shows_every_folder_and_no_other() -> None:
    (block,) = re.findall(r"^```\n(toolkit/.*?)^```$", CONTRIBUTING, re.MULTILINE | re.DOTALL)
    shown: set[str] = set()
    for line in block.splitlines():
        if not line.startswith(" "):
            part = line.split()[0]
        else:
            shown |= {part + folder for folder in re.findall(r"[a-z_]+/", re.split(r"\s{2,}", line.strip())[0])}
    folders = [init.parent for part in PARTS for init in (ROOT / part).glob("*/__init__.py")]
    assert shown == {f"{folder.relative_to(ROOT).as_posix()}/" for folder in folders}


def test_every_table_that_a_newcomer_adds_a_line_to_is_where_contributing_says() -> None:
    named = re.findall(r"`(\w+)`, `([\w/]+\.py)` \|$", CONTRIBUTING, re.MULTILINE)
    assert {name for name, _ in named} >= {"METHODS", "FORMATS", "PROTOCOLS"}
    for name, path in named:
        assert re.search(rf"^(def )?{name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (name, path)


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT + CONTRIBUTING):
        assert (ROOT / target).is_file(), target


def test_the_program_for_the_device_runs(tmp_path: Path) -> None:
    """Executed as printed, in a process of its own; only the server's port is another."""
    (program,) = (block for language, block in BLOCKS if language == "python")
    made = family(tmp_path / "bundles")
    for i, crop in enumerate(crops(2)):
        path = tmp_path / f"faces/test/somebody/{i + 1}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rgb(path, crop)
    (tmp_path / "faces/test/skipped.csv").write_text("")  # as pkd-align leaves it
    with running(Service(Encoders.open(made.folders), Settings(threads=1), None)) as client:
        address = str(client.base_url).rstrip("/")
        assert "http://127.0.0.1:8000" in program
        program = program.replace("http://127.0.0.1:8000", address)
        done = _run(program, tmp_path)
        refused = _run(program.replace("1e-2", "1e-9"), tmp_path)
    assert done.returncode == 0, done.stderr
    match, score, threshold, fmr = done.stdout.split()
    assert match == str(float(score) >= float(threshold))
    assert float(threshold) == 0.5  # the student → teacher certificate's at FMR 1e-2
    assert 0 < float(fmr) <= 1
    assert refused.returncode == 1
    assert refused.stderr.startswith("422: ") and "1e-09" in refused.stderr, "the server's explanation is shown"


def _run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=60)
