"""Refuse to build pkd without its code; everything else that a build needs is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

for name in ("toolkit", "export", "serving"):
    if not (Path(__file__).parent / "pkd" / name / "__init__.py").is_file():
        raise SystemExit(
            f"pkd/{name} must be a symbolic link to {name}/, and this checkout has none, as git makes it on Windows. "
            "Clone again with: git clone -c core.symlinks=true URL"
        )

setup()
