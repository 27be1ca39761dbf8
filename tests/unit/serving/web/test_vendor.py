"""Compare what is vendored with what the lock file names, and with its hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pkd import __version__
from pkd.serving.web import FOLDER
from tests.parity.test_onnxruntime_web import PACKAGE

ROOT = Path(__file__).resolve().parents[4]
VENDOR = FOLDER / "vendor"
LOCK = json.loads((ROOT / "tools/vendor/package-lock.json").read_text())
DEVICE = json.loads((FOLDER / "device/package.json").read_text())


def test_every_file_has_the_hash_that_was_written_down() -> None:
    stated = dict(line.split()[::-1] for line in (VENDOR / "SHA256SUMS").read_text().splitlines())
    there = {path.name for path in VENDOR.iterdir()} - {"SHA256SUMS", "README.txt"}
    assert set(stated) == there
    for name, digest in stated.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name


def test_there_is_one_version_everywhere() -> None:
    version = LOCK["packages"]["node_modules/onnxruntime-web"]["version"]
    assert json.loads((ROOT / "tools/vendor/package.json").read_text())["dependencies"] == {"onnxruntime-web": version}
    assert f"ONNX Runtime Web v{version}\n" in (VENDOR / "ort.wasm.min.mjs").read_text(encoding="utf-8")[:200]
    assert f"onnxruntime-web@{version}" == PACKAGE, "the parity test runs what is vendored"
    assert f"onnxruntime-web {version}," in (VENDOR / "README.txt").read_text()
    assert DEVICE["peerDependencies"] == {"onnxruntime-web": f"^{version}"}
    assert DEVICE["version"] == __version__


def test_the_lock_file_names_no_registry_and_every_hash() -> None:
    for name, package in LOCK["packages"].items():
        assert "resolved" not in package, name
        assert not name or package["integrity"].startswith("sha512-"), name


def test_the_licences_are_those_of_what_the_wheel_holds() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # tomllib came with Python 3.11
    assert 'license = "Apache-2.0 AND MIT"' in project
    for name in ("LICENSE", "ThirdPartyNotices.txt"):
        assert f'"serving/web/vendor/{name}"' in project
    assert "Microsoft" in (VENDOR / "LICENSE").read_text()
    assert (FOLDER / "device/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("name", sorted(path.name for path in (FOLDER / "device").glob("*.js")))
def test_the_package_holds_its_own_imports_only(name: str) -> None:
    """The device runs without the page: its modules import one another, and nothing by a bare name."""
    lines = (FOLDER / "device" / name).read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith(("import ", "export {")) and " from " in line:
            source = line.rpartition(' from "')[2].rstrip('";')
            assert source.startswith("./") and (FOLDER / "device" / source).is_file(), line
