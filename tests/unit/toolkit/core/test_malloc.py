"""A training keeps freed memory, a server gives it back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
import numpy as np
if sys.argv[1] == "keep":
    from pkd.toolkit.core.malloc import keep_freed_memory
    if not keep_freed_memory():
        print(-1)
        sys.exit()
def step():
    for size in (9_000_000, 4_000_000, 17_000_000):
        np.ones(size, np.float32)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_second_step_takes_no_fresh_pages() -> None:
    faults = {}
    for how in ("keep", "leave"):
        output = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        faults[how] = int(output.stdout)
    if faults["keep"] < 0:
        pytest.skip("the C library has no mallopt")
    assert faults["keep"] < 200
    assert faults["leave"] > 10 * max(faults["keep"], 1)


SERVER = """
import re, sys
import numpy as np
from pkd.toolkit.core.malloc import return_freed_memory
environment = {"MALLOC_ARENA_MAX": "2"} if sys.argv[1] == "own" else {}
if sys.argv[1] != "leave" and return_freed_memory(environment) == bool(environment):
    print(-1)
    sys.exit()
def held():
    return int(re.findall(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[0]) // 1024
before = held()
np.ones(30_000_000, np.uint8)  # from here on glibc takes blocks of this size from its heap
photographs = [np.ones(25_000_000, np.uint8) for _ in range(4)]
small = np.ones(100_000, np.uint8)  # lies behind them in a heap, which then cannot shrink
del photographs
print(held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_server_gives_back_what_photographs_took() -> None:
    held = {}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    for how in ("return", "leave", "own"):
        command = [sys.executable, "-c", SERVER, how]
        held[how] = int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    if min(held.values()) < 0:
        pytest.skip("the C library has no mallopt")
    assert held["return"] < 10  # MB
    assert held["leave"] > 50
    assert held["own"] > 50  # whoever sets glibc's variables decides
