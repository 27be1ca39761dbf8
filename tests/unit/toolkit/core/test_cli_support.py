"""Every command ends with its exit code and at most one line."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from pkd.toolkit.core.cli_support import make_parser, run, tool_version
from pkd.toolkit.core.errors import BadImage, GateFailed, PkdError, TrainingDiverged


def outcome(error: BaseException | None, *argv: str, result: Mapping[str, object] | None = None) -> int:
    def body(args: argparse.Namespace, console: Console) -> Mapping[str, object]:
        console.print("for people")
        if error:
            raise error
        return result or {"n": 1}

    return run(make_parser("pkd-x", "Does x.", "  pkd-x --json"), body, list(argv))


@pytest.mark.parametrize(
    ("error", "code"),
    [(BadImage("a.jpg: bad."), 2), (GateFailed("worse."), 4), (TrainingDiverged("NaN."), 1), (PkdError("no."), 1)],
)
def test_known_errors_are_one_line_with_their_code(
    error: PkdError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(error, "--json") == code
    assert capsys.readouterr() == ("", f"pkd-x: {error}\n")


def test_an_unknown_error_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        outcome(ZeroDivisionError())


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(OSError(28, "No space left on device", "out/x.webp")) == 1
    assert capsys.readouterr().err.endswith("pkd-x: out/x.webp: No space left on device.\n")


def test_json_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(None, "--json", result={"path": Path("a"), "n": 1.5}) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"path": "a", "n": 1.5}
    assert err == ""


def test_people_read_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(None) == 0
    assert capsys.readouterr() == ("", "for people\n")


def test_ctrl_c_exits_with_130() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert outcome(KeyboardInterrupt()) == 130
    assert signal.getsignal(signal.SIGTERM) is before


def command(body: str, stdout: int) -> subprocess.CompletedProcess[str]:
    """Run ``body`` as a command in a process of its own: signals and closed pipes are no business of this one."""
    program = (
        "import os, signal, sys\nfrom pkd.toolkit.core.cli_support import make_parser, run\n"
        f"def body(args, console):\n    {body}\nsys.exit(run(make_parser('pkd-x', '', ''), body, ['--json']))"
    )
    return subprocess.run([sys.executable, "-c", program], stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_sigterm_is_ctrl_c() -> None:
    done = command("os.kill(os.getpid(), signal.SIGTERM)", subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "pkd-x: stopped.\n")


def test_a_closed_pipe_leaves_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    done = command("return {'a': 'x' * 200_000}", write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_help_shows_the_examples_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        outcome(None, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "examples:\n  pkd-x --json\n" in text
    assert "2 bad usage or input" in text


def test_bad_usage_exits_with_2() -> None:
    with pytest.raises(SystemExit) as ended:
        outcome(None, "--nope")
    assert ended.value.code == 2


def test_the_version_is_the_packages() -> None:
    assert tool_version().startswith("pkd 0.")
