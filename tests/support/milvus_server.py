"""A real Milvus standalone server for tests: the PyPI package ``milvus``, shut into a network namespace of its own.

Milvus 2.3 listens on every address and no setting changes that. So a launcher (this file, run as a program) enters a
new network namespace, which has nothing but its own loopback, starts the server there, and passes on what arrives at a
socket that was opened outside, on 127.0.0.1. Both processes die with their parent, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import importlib.util
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

PROXY, WEB = 19530, 9091
"""Ports inside the namespace."""
QUERY_COORDINATOR = """
queryCoord:
  checkChannelInterval: 100
  checkSegmentInterval: 100
  leaderViewUpdateInterval: 1
"""
READY = "ready"
START_SECONDS = 60


def missing() -> str | None:
    """Why no server can be started here; None: one can."""
    if platform.system() != "Linux":
        return "the package milvus and network namespaces need Linux"
    if importlib.util.find_spec("milvus") is None:
        return "the package milvus is not installed (extra dev)"
    try:
        done = subprocess.run([*ISOLATED, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no unshare(1)"
    return None if done.returncode == 0 else f"no network namespace may be made here: {done.stderr.strip()}"


ISOLATED = ("unshare", "--net", "--map-root-user")


class MilvusServer:
    """One server on one data folder; its address stays the same over stops and starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.uri = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._launcher: subprocess.Popen[str] | None = None
        self.pid = 0

    def start(self) -> None:
        """Return once the server says that it is healthy."""
        fd = self._listening.fileno()
        self._launcher = subprocess.Popen(
            [*ISOLATED, sys.executable, __file__, str(self.folder), str(fd), str(os.getpid())],
            pass_fds=[fd],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._launcher.stdout
        said, _, pid = self._launcher.stdout.readline().strip().partition(" ")
        if said != READY:
            self.stop()
            log = (self.folder / "milvus.log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"Milvus did not start:\n{log}")
        self.pid = int(pid)

    def send(self, signum: int) -> None:
        """Send a signal to the server; with SIGSTOP it still takes connections, and never answers."""
        os.kill(self.pid, signum)

    def stop(self) -> None:
        """Kill the server with SIGKILL and wait until its launcher has reaped it."""
        if self._launcher is None:
            return
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself; its log says why
            if self.pid:
                self.send(signal.SIGKILL)
        try:
            self._launcher.wait(timeout=10)
        finally:
            os.killpg(self._launcher.pid, signal.SIGKILL) if self._launcher.poll() is None else None
        assert self._launcher.stdout
        self._launcher.stdout.close()
        self._launcher, self.pid = None, 0

    def renew(self) -> None:
        """Stop, and start on an empty data folder: once killed, Milvus 2.3 may cease to give what it acknowledges."""
        self.stop()
        self.folder = self.folder.with_name(f"{self.folder.name}n")
        self.start()

    def close(self) -> None:
        """Stop for good."""
        self.stop()
        self._listening.close()


def _die_with_parent(parent: int | None = None) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os._exit(1)  # it had died before we asked


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sh", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP


def _spawn(folder: Path) -> subprocess.Popen[bytes]:
    from milvus import MilvusServerConfig, _initialize_data_files

    config = MilvusServerConfig(data_dir=str(folder))
    config.set("rootCoord.dmlChannelNum", 4)  # fewer channels tick on an idle machine
    config.set("queryNode.segcore.interimIndex.enableIndex", "false")  # approximate; 2.3.5 makes none beside FLAT
    # s: for so long a killed server blocks its successor. Too short, and a busy machine misses its own leases.
    config.set("common.session.ttl", 20)
    config.set("queryCoord.distPullInterval", 100)
    config.set("proxy.timeTickInterval", 50)  # ms: for so long a strong read waits
    config.resolve()
    written = folder / "configs" / "milvus.yaml"
    written.write_text(written.read_text().replace("\nqueryCoord:\n", QUERY_COORDINATOR))
    _initialize_data_files(str(folder))
    # Beside an asyncio loop: the log goes to a file, and the server leaves when this process does.
    with (folder / "milvus.log").open("ab") as log:
        return subprocess.Popen(
            [str(folder / "bin" / "milvus"), "run", "standalone"],
            cwd=folder,
            env={
                **os.environ,
                "DEPLOY_MODE": "STANDALONE",
                "METRICS_PORT": str(WEB),
                "MILVUS_RUN_DIR": str(folder / "run"),
                "LD_LIBRARY_PATH": str(folder / "bin"),
            },
            stdout=log,
            stderr=log,
            preexec_fn=_die_with_parent,
        )


def _wait_healthy(server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{WEB}/healthz", timeout=5) as answer:
                if b"OK" in answer.read():
                    return
        except OSError:
            pass
        time.sleep(0.1)
    sys.exit(1)


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what arrives until it ends."""
    try:
        while data := await reader.read(1 << 18):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def _forward(listening: socket.socket, pid: int) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", PROXY)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    server = await asyncio.start_server(connected, sock=listening, limit=1 << 18)
    print(READY, pid, flush=True)
    await server.serve_forever()


def _launch(folder: Path, fd: int, parent: int) -> None:
    _die_with_parent(parent)
    _loopback_up()
    folder.mkdir(parents=True, exist_ok=True)
    server = _spawn(folder)
    _wait_healthy(server)
    threading.Thread(target=lambda: os._exit(server.wait()), daemon=True).start()
    asyncio.run(_forward(socket.socket(fileno=fd), server.pid))


if __name__ == "__main__":
    _launch(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
