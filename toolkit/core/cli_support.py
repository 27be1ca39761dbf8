"""Share what every command does: its parser, errors as one line, exit codes, ``--json``, how it is stopped."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from rich.console import Console

from pkd import __version__
from pkd.toolkit.core.errors import PkdError, TargetUnavailable
from pkd.toolkit.core.tables import UNLIMITED

STUCK_SECONDS = 3.0
"""Time after a signal to stop in which the main thread must come back from native code, seconds."""
Result = Mapping[str, Any]
Run = Callable[[argparse.Namespace, Console], Result]


def make_parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Make a parser whose ``--help`` ends with examples and that knows ``--json`` and ``--version``."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=textwrap.fill(description, 80),
        epilog=f"examples:\n{textwrap.indent(textwrap.dedent(examples).strip(), '  ')}\n\nexit codes: 0 done, "
        "1 failed while running, 2 bad usage or input, 3 target unavailable, 4 a gate failed or not trusted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on stdout, and nothing else there"
    )
    parser.add_argument("--version", action="version", version=tool_version())
    return parser


def run(parser: argparse.ArgumentParser, body: Run, argv: Sequence[str] | None = None) -> int:
    """Parse, run ``body`` and return the exit code. Known errors become one line on stderr.

    People read the console on stderr; stdout carries only the JSON result when ``--json`` is given.
    """
    import cv2  # not before the command's own start: OpenCV reads its limits from the environment once

    args = parser.parse_args(argv)
    console = Console(stderr=True, quiet=args.json, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:  # a file or a pipe takes lines of any length
        console.width = UNLIMITED
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what it has to say, our errors say better
    guard = _Guard()
    try:
        result = body(args, console)
        if args.json:
            print(json.dumps(result, indent=2, allow_nan=False, default=str), flush=True)
    except PkdError as error:
        if args.json and isinstance(error, TargetUnavailable) and error.done is not None:
            print(json.dumps(error.done, indent=2, allow_nan=False, default=str), flush=True)
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        print(f"{parser.prog}: stopped. {stop}".rstrip(), file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # disk full, no permission: the operator's to mend, a traceback would not help
        print(f"{parser.prog}: {error.filename or 'input/output'}: {error.strerror or error}.", file=sys.stderr)
        return 1
    finally:
        guard.close()
    return 0


class _Guard:
    """Raise KeyboardInterrupt at a signal to stop, and end the process where native code keeps that from happening.

    Python runs a signal's handler between two of its own instructions: a runtime that never returns from one call, for
    a graph with an endless loop, would make Ctrl-C and SIGTERM do nothing. The signal's number reaches a pipe at once.
    """

    def __init__(self) -> None:
        self._write, self._handled = -1, 0
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._interrupt)
        if os.name == "posix":
            read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(read,), daemon=True, name="pkd-signals").start()

    def close(self) -> None:
        """Leave signals to whom they belonged before."""
        if self._write >= 0:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._write)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._handled += 1
        raise KeyboardInterrupt

    def _watch(self, read: int) -> None:
        while numbers := os.read(read, 64):
            before = self._handled
            if not any(signal.getsignal(number) == self._interrupt for number in numbers):
                continue  # a training or a server holds signals back itself
            time.sleep(STUCK_SECONDS)
            if self._handled == before:
                print("stopped while native code was running.", file=sys.stderr, flush=True)
                os._exit(130)
        os.close(read)


class StopRequest:
    """Hold Ctrl-C and SIGTERM back: they only set ``requested``, so that a step ends and a checkpoint is written.

    A second signal interrupts at once; within half a second it is the same wish, told twice by the terminal and by
    torchrun. Outside the main thread, where Python sets no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.requested and time.monotonic() - self._since > 0.5:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._since = True, time.monotonic()


def tool_version() -> str:
    """Name pkd and its version, as in "pkd 0.2.0": stamped into bundles, certificates and reports."""
    return f"pkd {__version__}"
