"""pkd-serve as a process for tests: started on a free port, watched from outside, ended for certain."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from pkd.serving.galleries.crypto import MasterKey

COMMAND = Path(sys.executable).with_name("pkd-serve")
MB = 1024
Found = TypeVar("Found")


class Server:
    """The process, what it says, what it uses (from /proc), and how to ask it something."""

    def __init__(self, *arguments: object, **environment: object) -> None:
        """Start the server. Raises AssertionError, with what it said, where it does not come up."""
        self.said: list[str] = []
        self.headers: dict[str, str] = {}
        self.process = subprocess.Popen(
            [str(part) for part in (COMMAND, *arguments, "--port", "0")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        )
        # Image libraries write to stderr by themselves; a pipe that nobody empties would block them, and the server.
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        found = until(lambda: self.find(r"listening on (http://[^\s\"]+)") or self.process.poll() is not None, 240)
        assert isinstance(found, str), "\n".join(self.said)
        self.url = found.replace("0.0.0.0", "127.0.0.1")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip())

    def find(self, pattern: str) -> str | None:
        """Find the first group of ``pattern`` in the first line that has it."""
        return next((found[1] for line in self.said if (found := re.search(pattern, line))), None)

    def requests(self) -> list[dict[str, Any]]:
        """Read the lines of ``--log-requests`` with ``--log json``."""
        entries = [json.loads(line) for line in self.said if line.startswith("{")]
        return [entry for entry in entries if entry["logger"] == "pkd.serving.requests"]

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """On a new connection, which any worker may take; with ``headers`` in every request."""
        headers = {**self.headers, **options.pop("headers", {})}
        return httpx.request(method, self.url + path, headers=headers, **{"timeout": 60, **options})

    def workers(self) -> set[int]:
        """Process ids of ``--workers``."""
        listed = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "spawn_main"], capture_output=True, text=True
        )
        return {int(pid) for pid in listed.stdout.split()}

    def resident_mb(self) -> float:
        """Resident size now."""
        return self._status("VmRSS") / MB

    def peak_mb(self) -> float:
        """Largest resident size so far."""
        return self._status("VmHWM") / MB

    def own_mb(self) -> float:
        """Memory that is this process's alone, now. Files are left out, libraries above all.

        Of those the kernel keeps in memory what it likes, and a share of each counts that depends on what else runs.
        """
        return (self._status("RssAnon") + self._status("RssShmem")) / MB

    def cpu_seconds(self) -> float:
        """Seconds of processor time that it has used."""
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def descriptors(self) -> int:
        """Open file descriptors."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def stop(self) -> str:
        """As an operator does; what it printed."""
        if self.process.poll() is None:
            self.process.terminate()
        assert self.process.wait(30) == 0
        self.reader.join(10)
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def _status(self, field: str) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.findall(rf"{field}:\s+(\d+) kB", text)[0])


@contextmanager
def serving(*arguments: object, **environment: object) -> Iterator[Server]:
    """Run the real command with these arguments and variables; killed with the block at the latest."""
    server = Server(*arguments, **environment)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait(10)
        server.reader.join(10)  # ends when the last worker has let go of the pipe
        for pipe in (server.process.stdout, server.process.stderr):
            assert pipe is not None
            pipe.close()


def with_gallery(folder: Path) -> tuple[object, ...]:
    """Options for a store of galleries in ``folder``; the same again where there is one."""
    key = folder / "master.key"
    if not key.exists():
        MasterKey.create(key)
    return "--gallery", folder / "galleries", "--master-key", key


def until(true: Callable[[], Found], seconds: float = 20) -> Found:
    """Wait for what ``true`` gives once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found
