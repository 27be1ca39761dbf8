"""Keep a bundle in a folder: which names and files are allowed, and how a new one takes an old one's place."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pkd.toolkit.core.errors import BundleError

MAX_FILE = 2 << 30
"""Bytes of one file; protobuf, and so ONNX, ends there, too."""
MAX_BUNDLE = 8 << 30
"""Bytes of all files together."""
MAX_FILES = 1000


def check_name(root: Path, name: str) -> None:
    """Raise BundleError unless ``name`` is a plain relative POSIX path below ``root``.

    Refused: absolute paths, ``..``, empty or dot parts, hidden files, backslashes, colons (drives, streams) and
    control characters.
    """
    parts = name.split("/")
    strange = any(c in '\\:*?"<>|' or not c.isprintable() for c in name)
    if strange or len(name) > 400 or any(not part or part.startswith(".") for part in parts):
        raise BundleError(f"{root}: the manifest names {name!r}, which is no plain file inside it. Do not trust it.")


def list_files(root: Path) -> list[str]:
    """List relative POSIX names of all files below ``root``, sorted, without hidden ones (``.DS_Store``).

    Raises BundleError for links, pipes, devices: nothing in a bundle may lead elsewhere. And for more, or larger, files
    than a bundle may have, before any of them is read.
    """
    sizes: dict[str, int] = {}
    for path in root.rglob("*"):
        name = path.relative_to(root)
        if any(part.startswith(".") for part in name.parts):
            continue
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise BundleError(f"{path}: is a link or a special file; a bundle holds plain files only. Copy the file.")
        if stat.S_ISREG(found.st_mode):
            sizes[name.as_posix()] = found.st_size
            if len(sizes) > MAX_FILES:
                break
    check_sizes(root, sizes)
    return sorted(sizes)


def check_sizes(root: Path, sizes: Mapping[str, int]) -> None:
    """Raise BundleError where the files, in bytes by name, are more or larger than a bundle may have."""
    if len(sizes) > MAX_FILES:
        raise BundleError(f"{root}: holds more than {MAX_FILES:,} files. Do not trust it.")
    for name, size in sizes.items():
        if size > MAX_FILE:
            raise BundleError(f"{root / name}: has {size:,} bytes, over the limit of {MAX_FILE:,}. Do not trust it.")
    if sum(sizes.values()) > MAX_BUNDLE:
        largest = max(sizes, key=lambda name: sizes[name])
        raise BundleError(
            f"{root}: its files have {sum(sizes.values()):,} bytes, over the limit of {MAX_BUNDLE:,} (largest: "
            f"{largest}). Do not trust it."
        )


def read_file(root: Path, name: str, *, limit: int = MAX_FILE) -> bytes:
    """Read the plain file ``name`` below ``root``, at most ``limit``. Raises BundleError; follows no links."""
    check_name(root, name)
    target = root
    try:
        for part in PurePosixPath(name).parts:
            target = target / part
            if stat.S_ISLNK(target.lstat().st_mode):
                raise BundleError(f"{target}: is a link; a bundle holds plain files only. Copy the file.")
        if not stat.S_ISREG(target.lstat().st_mode):
            raise BundleError(f"{target}: is not a plain file. Copy or export the bundle again.")
        with target.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size + 1) if size <= limit else b""
    except OSError as error:
        raise BundleError(f"{target}: {error.strerror}, but it is part of the bundle. Copy the whole bundle.") from None
    if max(size, len(data)) > limit:
        raise BundleError(f"{target}: is larger than {limit:,} bytes. Do not trust it.")
    return data


@contextmanager
def build_folder(path: Path, files: Mapping[str, bytes]) -> Iterator[Path]:
    """Make a hidden folder beside ``path`` with ``files`` in it; removed at the end unless it was moved away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        building.chmod(0o755)
        for name, data in files.items():
            check_name(path, name)
            target = building / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


def swap_in(building: Path, path: Path) -> None:
    """Move ``building`` to ``path``; what was there is first set aside, and deleted last."""
    if not path.exists():
        building.rename(path)
        return
    aside = aside_of(path)
    path.rename(aside)
    try:
        building.rename(path)
    except BaseException:
        if not path.exists():
            aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)  # what remains, ``recover`` deletes


def recover(path: Path) -> None:
    """Finish a ``swap_in`` that was killed: put the old folder back, or delete it where it was replaced."""
    aside = aside_of(path)
    if not aside.exists():
        return
    if path.exists():
        shutil.rmtree(aside)
    else:
        aside.rename(path)


def aside_of(path: Path) -> Path:
    """Say where ``swap_in`` keeps the old folder for a moment."""
    return path.with_name(f".{path.name}.replaced")
