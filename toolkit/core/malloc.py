"""Tell glibc's allocator what a process does with memory that it has freed; other C libraries are left alone."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's mallopt(3)."""
LARGE = 4 << 20
"""Bytes of a block that a server takes from the kernel and gives back: more than the copy of a photograph that is
searched for faces first has (3.7 MB), so that an everyday request finds its memory where the last one left it."""
KEPT = 16 << 20
"""Bytes at the end of the heap that a server keeps for the next request."""


def keep_freed_memory() -> bool:
    """Let this process keep memory that it has freed. False where the C library is not glibc; then nothing changes.

    glibc takes each large activation straight from the kernel, which clears it page by page, and returns it after use.
    A small student's step spends up to a third of its CPU time on that (benchmarks/training_speed.py). Results are the
    same to the bit; the process stays as large as its largest step.
    """
    return _set({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})


def return_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let this process give large blocks back when it frees them. False where glibc is not asked or not there.

    By itself glibc keeps blocks of up to 32 MB once it has seen such blocks freed, in one heap for each thread, and
    which of them are whole again is chance: a server that has seen large photographs holds 50 MB more or less from one
    minute to the next. Whoever sets glibc's own variables (``MALLOC_…``, ``GLIBC_TUNABLES``) decides instead.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environment):
        return False
    return _set({M_MMAP_THRESHOLD: LARGE, M_TRIM_THRESHOLD: KEPT})


def _set(parameters: Mapping[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all(mallopt(name, value) for name, value in parameters.items())
