"""What a training step frees, the next one needs again: keep it instead of giving it back to the kernel."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


def keep_freed_memory() -> bool:
    """Let this process keep memory that it has freed. False where the C library is not glibc; then nothing changes.

    glibc takes each large activation straight from the kernel, which clears it page by page, and returns it after use.
    A small student's step spends up to a third of its CPU time on that (benchmarks/training_speed.py). Results are the
    same to the bit; the process stays as large as its largest step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
