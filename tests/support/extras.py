"""Skip a file of tests whose optional packages are missing, without importing them: every worker collects all files."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def need(*packages: str, reason: str) -> None:
    """Skip the module that calls this unless all top-level ``packages`` are installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: {reason}", allow_module_level=True)
