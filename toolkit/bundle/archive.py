"""Keep a bundle as one file: a plain zip archive that is read where it lies and never unpacked."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from pkd.toolkit.bundle.folder import MAX_FILE, MAX_FILES, check_name, check_sizes
from pkd.toolkit.core.errors import BundleError

SUFFIX = ".zip"
EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of every entry: the same bundle gives the same bytes, whenever it is packed."""
END = struct.Struct("<4s4H2LH")
"""End of central directory: signature, disk numbers, counts of entries, size and place of the directory, comment."""
ZIP64_LOCATOR = 20
MAX_DIRECTORY = 1 << 20
"""Bytes of the list of entries, which is read as a whole."""
ENCRYPTED = 1


def zip_path(folder: Path) -> Path:
    """Say where pkd-export --zip puts the bundle in ``folder``: beside it, ``.zip`` after its whole name."""
    if folder.name in ("", ".."):
        folder = folder.resolve()
    return folder.with_name(folder.name + SUFFIX)


def write_zip(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write ``files`` (name, content; in the order of their names) to ``path``, all or nothing.

    Stored, for weights hardly shrink and every zlib packs differently. Raises BundleError above 2 GiB.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with ZipFile(part, "w", ZIP_STORED, allowZip64=False) as archive:
            for name, data in files:
                info = ZipInfo(name, EPOCH)
                info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
                archive.writestr(info, data)
        part.replace(path)
    except zipfile.LargeZipFile:
        raise BundleError(f"{path}: a zip of pkd ends at 2 GiB, and this bundle is larger. Copy the folder.") from None
    finally:
        part.unlink(missing_ok=True)


def list_zip(path: Path) -> list[str]:
    """List the archive's files by name, sorted. Raises BundleError for anything but plain files within the limits."""
    with _opened(path) as (_, entries):
        return sorted(entries)


def read_zip(path: Path, name: str, *, limit: int = MAX_FILE) -> bytes:
    """Read the file ``name``, at most ``limit`` bytes once unpacked. Raises BundleError."""
    check_name(path, name)
    with _opened(path) as (archive, entries):
        if name not in entries:
            raise BundleError(f"{path / name}: is not in the archive, but it is part of the bundle. Copy it again.")
        if entries[name].file_size > limit:
            raise BundleError(f"{path / name}: is larger than {limit:,} bytes. Do not trust it.")
        with archive.open(entries[name]) as file:
            return file.read(limit + 1)  # at most what the entry declares, whatever it unpacks to


@contextmanager
def _opened(path: Path) -> Iterator[tuple[ZipFile, dict[str, ZipInfo]]]:
    try:
        _check_end(path)
        with ZipFile(path) as archive:
            yield archive, _entries(path, archive)
    except (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise BundleError(f"{path}: cannot be read as a zip: {error}. Copy it again.") from None


def _check_end(path: Path) -> None:
    """Check, before ``zipfile`` reads the list of entries into memory, that it is short and described once."""
    tail = ZIP64_LOCATOR + END.size
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - tail))
        data = file.read(tail)
    if len(data) < END.size:
        raise BundleError(f"{path}: is no zip archive. Give a bundle's folder, or what pkd-export --zip wrote.")
    signature, *_, entries, directory, _place, comment = END.unpack(data[-END.size :])
    if signature != b"PK\5\6" or comment:
        raise BundleError(f"{path}: is no zip archive of a bundle. Give a bundle's folder, or make one with --zip.")
    if data.startswith(b"PK\6\7") or directory > MAX_DIRECTORY or entries > 2 * MAX_FILES:
        raise BundleError(f"{path}: lists more than a bundle may hold ({MAX_FILES:,} files). Do not trust it.")


def _entries(path: Path, archive: ZipFile) -> dict[str, ZipInfo]:
    found: dict[str, ZipInfo] = {}
    for info in archive.infolist():
        name = info.orig_filename
        check_name(path, name.removesuffix("/"))
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise BundleError(f"{path / name}: is a link or a special file; a bundle holds plain files only.")
        if name.endswith("/"):
            continue
        if name in found:
            raise BundleError(f"{path / name}: is in the archive twice. Do not trust it.")
        if info.flag_bits & ENCRYPTED or info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            raise BundleError(f"{path / name}: is encrypted, or packed in a way that bundles are not. Pack it again.")
        found[name] = info
    check_sizes(path, {name: info.file_size for name, info in found.items()})
    return found
