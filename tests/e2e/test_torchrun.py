"""pkd-distill over two ranks: a killed rank ends the run, which goes on with two ranks and then with one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pkd.toolkit.distill.models.student import load_student
from tests.support.training_data import SIZE, write_patterns, write_teacher

MODULE = ["-m", "pkd.toolkit.cli.distill"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", *MODULE]
STEPS = 40


def options(folder: Path, out: str) -> list[str]:
    return [
        "--teacher", str(folder / "teacher.onnx"), "--faces", str(folder / "crops"), "--out", str(folder / out),
        "--teacher-preprocess", f"mean=127.5,std=127.5,size={SIZE},template=none",
        "--student", "mobilefacenet-relu:0.125", "--batch", "8", "--steps", str(STEPS), "--precision", "fp32",
        "--threads", "1", "--cache", str(folder / "cache"), "--method", "proxylesskd+l2kd:30",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with crops/ and teacher.onnx, a real small network."""
    folder = tmp_path_factory.mktemp("ranks")
    write_patterns(folder / "crops", identities=4, images=4)
    write_teacher(folder / "teacher.onnx")
    return folder


def start_pair(folder: Path, argv: list[str]) -> list[subprocess.Popen[str]]:
    """Two ranks without torchrun's agent, so that each one's exit code can be seen."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *MODULE, *argv], env=os.environ | shared | {"RANK": str(rank)},
            stderr=subprocess.PIPE, text=True, cwd=folder,
        )
        for rank in range(2)
    ]  # fmt: skip


def rows(log: Path) -> list[int]:
    return [int(row.split(",")[0]) for row in log.read_text().splitlines()[1:]] if log.is_file() else []


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_any_number_of_ranks_goes_on(workplace: Path) -> None:
    log = workplace / "killed" / "log.csv"
    pair = start_pair(workplace, options(workplace, "killed"))
    deadline = time.monotonic() + 240
    while len(rows(log)) < 3:
        assert all(rank.poll() is None for rank in pair) and time.monotonic() < deadline
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGKILL)
    _, told = pair[0].communicate(timeout=120)
    pair[1].communicate()
    assert pair[0].returncode == 1 and "Traceback" not in told, told
    line = told.strip().splitlines()[-1]
    assert line.startswith("pkd-distill: rank 0: another rank has ended") and "--resume --out" in line
    assert not (workplace / "killed" / "student.pt").exists()

    torchrun = subprocess.Popen(
        [*TORCHRUN, "--resume", "--out", str(workplace / "killed")], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    reached = max(rows(log), default=0)
    while max(rows(log), default=0) < reached + 3:
        assert torchrun.poll() is None and time.monotonic() < deadline + 240
        time.sleep(0.05)
    torchrun.send_signal(signal.SIGTERM)
    _, told = torchrun.communicate(timeout=120)
    assert f"of {STEPS} is saved: torchrun --nproc_per_node 2" in told, told

    alone = subprocess.run(
        [sys.executable, *MODULE, "--resume", "--out", str(workplace / "killed")],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    assert rows(log) == list(range(1, STEPS + 1))
    assert load_student(workplace / "killed").training["steps"] == STEPS


def test_an_odd_batch_is_refused_before_training(workplace: Path) -> None:
    pair = start_pair(workplace, [*options(workplace, "odd"), "--batch", "7"])
    for rank in pair:
        _, told = rank.communicate(timeout=240)
        assert rank.returncode == 2 and told.strip().startswith("pkd-distill: --batch 7: 2 ranks"), told
    assert not (workplace / "odd").exists()
