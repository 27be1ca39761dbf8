"""keep_freed_memory: the kernel is asked once, not at every step."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
if sys.argv[1] == "keep":
    from pkd.toolkit.distill.training.loop import keep_freed_memory
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
