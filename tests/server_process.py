"""pkd-serve as a process for tests: started with a gallery, watched from outside, ended for certain."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pkd.serving.galleries.vault import MasterKey

MB = 1024


@dataclass(frozen=True)
class Running:
    """A server that answers. Figures are of the process itself, from /proc."""

    url: str
    pid: int

    def resident_mb(self) -> float:
        """Resident size now."""
        return self._status("VmRSS") / MB

    def peak_mb(self) -> float:
        """Largest resident size so far."""
        return self._status("VmHWM") / MB

    def descriptors(self) -> int:
        """Open file descriptors."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def _status(self, field: str) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return int(re.findall(rf"{field}:\s+(\d+) kB", text)[0])


@contextmanager
def pkd_serve(folder: Path, *options: object) -> Iterator[Running]:
    """The real command on a free port of this machine, with a gallery in ``folder``. Ends with the block."""
    key = folder / "master.key"
    if not key.exists():
        MasterKey.create(key)
    command = [Path(sys.executable).with_name("pkd-serve"), *options, "--port", "0"]
    command += ["--gallery", folder / "galleries", "--master-key", key]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"^listening on (http://\S+)$", line):
                break
        else:
            raise AssertionError("".join(said))
        # Image libraries write to stderr by themselves; a pipe that nobody empties would block them, and the server.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Running(found[1], process.pid)
        assert process.poll() is None, "the server died"
    finally:
        process.kill()
        process.communicate()
