"""A folder is replaced as a whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pkd.toolkit.bundle.bundle import Bundle, write_bundle
from pkd.toolkit.bundle.folder import aside_of, build_folder, check_name, list_files, read_file, recover, swap_in
from pkd.toolkit.core.errors import BundleError
from tests.support.bundle_factory import bundle, content

KILLED_AT_A_RENAME = """
import os, sys
from pathlib import Path
from pkd.toolkit.bundle.folder import build_folder, swap_in
path, survive = Path(sys.argv[1]), int(sys.argv[2])
rename, calls = Path.rename, []
def killed(self, target):
    if len(calls) == survive:
        os._exit(9)
    calls.append(1)
    return rename(self, target)
Path.rename = killed
with build_folder(path, {"name": b"new"}) as building:
    swap_in(building, path)
    os._exit(9)
"""


@pytest.mark.parametrize("name", ["manifest.json", "certificates/a@b__c@d.json", "targets/ort-fp32/x.onnx", "ünïcode"])
def test_plain_relative_names_are_allowed(name: str) -> None:
    check_name(Path("bundle"), name)


def test_files_are_listed_by_relative_name_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b", "a/c", "a/.hidden", ".git/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert list_files(tmp_path) == ["a/c", "b"]


def test_reading_stops_at_the_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_file(tmp_path, "x", limit=5) == b"12345"
    with pytest.raises(BundleError, match="larger than 4 bytes"):
        read_file(tmp_path, "x", limit=4)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(BundleError, match="not a plain file"):
        read_file(tmp_path, "x")


@pytest.mark.parametrize("survive", [0, 1, 2])
def test_a_writer_killed_at_any_point_of_the_swap_loses_neither(tmp_path: Path, survive: int) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "name").write_text("old")
    command = [sys.executable, "-c", KILLED_AT_A_RENAME, str(path), str(survive)]
    assert subprocess.run(command, check=False).returncode == 9
    recover(path)
    assert (path / "name").read_text() == ("new" if survive == 2 else "old")
    assert not aside_of(path).exists()


def test_opening_after_such_a_kill_says_where_the_old_one_is(tmp_path: Path) -> None:
    good = bundle(tmp_path).path
    good.rename(aside_of(good))
    with pytest.raises(BundleError, match=r"\.bundle\.replaced: rename it back"):
        Bundle.open(good)
    files, manifest = content()
    with pytest.raises(BundleError, match="exists already"):
        write_bundle(good, files, manifest)
    assert Bundle.open(good).manifest.encoder == manifest.encoder


def test_a_failing_rename_puts_the_old_one_back(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "name").write_text("old")
    with pytest.raises(FileNotFoundError):
        swap_in(tmp_path / "never built", path)
    assert (path / "name").read_text() == "old"


def test_an_exception_while_building_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), build_folder(tmp_path / "x", {"a/b": b"1"}) as building:
        assert (building / "a/b").read_bytes() == b"1"
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
