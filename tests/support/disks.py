"""File systems that can be full, read-only or broken, and databases that are damaged.

Tests skip where mounting is not allowed.
"""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pkd.serving.galleries.sqlite.database import NAME


def mounted(folder: Path, *command: str) -> Iterator[Path]:
    """Mount a file system of its own; skips where this is not allowed."""
    folder.mkdir()
    if not shutil.which("mount"):
        pytest.skip("no mount command here")
    done = subprocess.run(["mount", *command, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is refused here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """1 MB in memory."""
    yield from mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "tmpfs")


@pytest.fixture
def fragile_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a small ext4 that can be made to fail."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    if not shutil.which("mkfs.ext4"):
        pytest.skip("no mkfs.ext4 here")
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    yield from mounted(tmp_path / "fragile", "-t", "ext4", "-o", "loop", str(image))


def empty_log(folder: Path) -> None:
    """Move the write-ahead log into the database."""
    with closing(sqlite3.connect(folder / NAME)) as db:
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0


def damage(folder: Path, table: str) -> None:
    """Overwrite a table's first page, and have what was cached read again."""
    empty_log(folder)
    with closing(sqlite3.connect(folder / NAME)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
        before = db.execute("SELECT value FROM about WHERE name = 'heartbeat'").fetchone()
    with (folder / NAME).open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xa5" * size)
    with closing(sqlite3.connect(folder / NAME)) as db:
        db.execute("UPDATE about SET value = 'another' WHERE name = 'heartbeat'")
        db.commit()
        assert db.execute("SELECT value FROM about WHERE name = 'heartbeat'").fetchone() != before
