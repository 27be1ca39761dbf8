"""pkd-distill as a user runs it: a killed run resumes to the same weights, and bad input gets one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pkd.toolkit.cli.distill import main
from pkd.toolkit.distill.models.student import load_student
from tests.support.training_data import SIZE, write_patterns, write_teacher

COMMAND = str(Path(sys.executable).with_name("pkd-distill"))
STATED = ["--teacher-preprocess", f"mean=127.5,std=127.5,size={SIZE},template=none"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with crops/ and teacher.onnx, a real small network."""
    folder = tmp_path_factory.mktemp("work")
    write_patterns(folder / "crops")
    write_teacher(folder / "teacher.onnx")
    return folder


def options(folder: Path, out: str, *more: str) -> list[str]:
    return [
        "--teacher", str(folder / "teacher.onnx"), *STATED, "--faces", str(folder / "crops"), "--student",
        "mobilefacenet-relu:0.125", "--batch", "8", "--precision", "fp32", "--threads", "1",
        "--cache", str(folder / "cache"), "--out", str(folder / out), *more,
    ]  # fmt: skip


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([COMMAND, *argv], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def last_line(capsys: pytest.CaptureFixture[str], code: int, argv: list[str]) -> str:
    """Run the command in this process, for a start costs seconds of CPU, and return the last line that it says."""
    capsys.readouterr()
    assert main(argv) == code
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_terminated_run_resumes_to_the_very_same_weights(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["--steps", "150"]
    assert main(options(workplace, "whole", *steps)) == 0
    process = subprocess.Popen([COMMAND, *options(workplace, "killed", *steps)], stderr=subprocess.PIPE, text=True)
    log = workplace / "killed" / "log.csv"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") > 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "pkd-distill --resume --out" in stderr
    assert not (workplace / "killed" / "student.pt").exists()
    assert "--resume" in last_line(capsys, 2, options(workplace, "killed", *steps))
    line = last_line(capsys, 2, options(workplace, "killed", "--resume", "--lr", "0.5"))
    assert "--lr 0.5" in line and "started with 0.02" in line
    run("--resume", "--out", str(workplace / "killed"))
    assert load_student(workplace / "killed").info.id == load_student(workplace / "whole").info.id
    rows = log.read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows[1:]] == list(range(1, 151))
    assert "finished run" in last_line(capsys, 2, options(workplace, "killed", *steps))


def test_json_goes_to_stdout_alone(workplace: Path) -> None:
    done = run(*options(workplace, "json", "--steps", "2", "--json"))
    summary = json.loads(done.stdout)
    assert summary["steps"] == 2 and summary["teacher"].startswith("teacher@sha256:")


def test_a_diverging_run_says_what_to_change(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = last_line(capsys, 1, options(workplace, "nan", "--steps", "50", "--lr", "1e20"))
    assert "diverged" in line and "lower --lr" in line
    assert not (workplace / "nan" / "student.pt").exists()
