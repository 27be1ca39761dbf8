"""Run the demo's steps as processes: commands beside this Python, their logs, a server that is always stopped."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from pkd.toolkit.core.errors import InputError, PkdError

QUIET = {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"}
"""Set for each command unless the user set it: idle threads sleep. On cores that are shared with others, threads that
wait actively made a training ten times slower."""
START_SECONDS = 60.0
"""Longest time in which the server must answer."""
STOP_SECONDS = 15.0
"""Time that a step gets to end after SIGTERM, before it is killed."""


class StepFailed(PkdError):
    """Say that a command of the demo ended with an error; carries its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Steps:
    """Run the other commands as a user would: print each command line, log to ``folder/logs``, time it."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder = folder
        self.console = console
        self.seconds: dict[str, float] = {}
        self._logs = folder / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)

    def run(self, title: str, *words: str | Path) -> str:
        """Run one command to its end → what it wrote to stdout. Raises StepFailed with its last line and exit code."""
        log = self._log(title)
        line = self._announce(title, words)
        with log.open("w", encoding="utf-8") as errors, (self._logs / f"{log.stem}.out").open("w+") as output:
            with self.timed(title), self.console.status(f"{title} …"), _process(line, output, errors) as process:
                code = process.wait()
            output.seek(0)
            said = output.read()
        if not said:
            (self._logs / f"{log.stem}.out").unlink()
        if code:
            raise StepFailed(f"{title}: {_last_line(log)} (log: {log})", code if code > 0 else 1)
        return said

    @contextmanager
    def serve(self, *words: str | Path) -> Iterator[Client]:
        """Start ``pkd-serve`` on a free port, wait until it is ready, and stop it whatever happens inside."""
        log = self._log("serve")
        line = self._announce("serve", words)
        with log.open("w", encoding="utf-8") as errors, _process(line, errors, errors) as process:
            yield Client(self._address(process, log))

    def _address(self, process: subprocess.Popen[bytes], log: Path) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise StepFailed(f"serve: {_last_line(log)} (log: {log})", process.returncode or 1)
            found = re.search(r"listening on (http\S+)", log.read_text(encoding="utf-8"))
            if found and Client(found[1]).ready():
                return found[1]
            time.sleep(0.1)
        raise StepFailed(f"serve: not ready after {START_SECONDS:.0f} s (log: {log})", 1)

    def _announce(self, title: str, words: Sequence[str | Path]) -> list[str]:
        shown = [str(word) for word in words]
        self.console.print(f"\n[bold]{title}[/bold]")
        self.console.print(f"  $ {shlex.join(shown)}", style="cyan", markup=False, soft_wrap=True)
        return [str(command(shown[0])), *shown[1:]]

    @contextmanager
    def timed(self, title: str) -> Iterator[None]:
        """Time a step and print how long it took."""
        start = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - start
        self.console.print(f"  {self.seconds[title]:.0f} s", style="dim")

    def _log(self, title: str) -> Path:
        return self._logs / f"{title.replace(' ', '-')}.log"


class Client:
    """Make the three calls of the REST API that the demo needs; a refusal becomes StepFailed in the server's words."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._open = build_opener(ProxyHandler({})).open  # the server is on this machine, whatever proxy is set

    def ready(self) -> bool:
        """Ask whether ``/readyz`` says yes: the golden crops of every bundle reproduced their embeddings."""
        try:
            with self._open(f"{self.url}/readyz", timeout=60):
                return True
        except (OSError, HTTPException):
            return False

    def embed(self, crop: Path, encoder: str) -> Mapping[str, Any]:
        """Call ``POST /embed`` with one aligned crop file → its embedding object for ``verify``."""
        query = urlencode({"encoder": encoder, "aligned": "true", "encoding": "b64_f32"})
        kind = crop.suffix.lower()[1:].replace("jpg", "jpeg")
        answer = self._post(f"/embed?{query}", crop.read_bytes(), f"image/{kind}")
        found = answer["data"][0]
        return embedding_object(found["embedding"], answer["encoder"]["id"], answer["space"]["id"])

    def verify(self, query: Mapping[str, Any], gallery: Mapping[str, Any], fmr: float) -> Mapping[str, Any]:
        """Call ``POST /verify`` with two embedding objects at a target false match rate."""
        body = {"a": query, "b": gallery, "policy": {"target_fmr": fmr}}
        return self._post("/verify", json.dumps(body).encode(), "application/json")

    def _post(self, path: str, body: bytes, kind: str) -> Mapping[str, Any]:
        try:
            with self._open(Request(self.url + path, body, {"Content-Type": kind}), timeout=60) as answer:
                found: Mapping[str, Any] = json.load(answer)
                return found
        except HTTPError as error:
            said = f"POST {path}: {error.code} {error.read().decode(errors='replace')}"
        except (OSError, HTTPException, ValueError) as error:
            said = f"{self.url}{path.partition('?')[0]}: {error or type(error).__name__}"
        raise StepFailed(f"serve: {said}", 1)


def embedding_object(embedding: str | NDArray[np.float32], encoder: str, space: str) -> dict[str, Any]:
    """Make what ``/verify`` takes for an embedding made elsewhere; float32 D, or base64 of it, little-endian."""
    text = embedding if isinstance(embedding, str) else base64.b64encode(embedding.astype("<f4").tobytes()).decode()
    return {"embedding": text, "encoding": "b64_f32", "encoder": encoder, "space": space}


def command(name: str) -> Path:
    """Find a pkd command of the environment that runs this. Raises InputError where it is not installed."""
    found = Path(sys.executable).with_name(name)
    if not found.is_file():
        raise InputError(
            f"{name}: not found beside {sys.executable}. Install with: pip install 'pkd[train,export,serve]'"
        )
    return found


@contextmanager
def _process(line: list[str], output: IO[str], errors: IO[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a child in a session of its own, so that Ctrl-C reaches only the demo, which then stops the child."""
    environment = QUIET | os.environ
    process = subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "ended without a message"
