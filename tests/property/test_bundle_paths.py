"""Whatever a manifest names, nothing outside the bundle is ever read or written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pkd.toolkit.bundle.bundle import Bundle, write_bundle
from pkd.toolkit.bundle.folder import check_name, list_files
from pkd.toolkit.core.errors import BundleError
from tests.support.bundle_factory import bundle, content

PARTS = st.one_of(
    st.sampled_from(["..", ".", "", "a", "b.onnx", "C:", "~", "\\", "..\\x", "/", "\0", " ", "..."]),
    st.text(max_size=6),
)
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("/".join)
SECRET = b"secret"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paths")
    (folder / "a").write_bytes(SECRET)
    (folder / "b.onnx").write_bytes(SECRET)
    return bundle(folder).path


@given(name=NAMES)
def test_an_allowed_name_stays_inside_and_any_other_is_refused(name: str) -> None:
    root = Path("/bundle")
    try:
        check_name(root, name)
    except BundleError as error:
        assert "\n" not in str(error)
        return
    target = Path("/bundle", name)
    assert target.is_relative_to(root)
    assert target != root
    assert ".." not in target.parts
    assert target.relative_to(root).as_posix() == name


@given(name=NAMES)
def test_a_manifest_that_lists_anything_else_does_not_open(good: Path, name: str) -> None:
    manifest = json.loads((good / "manifest.json").read_text())
    assume(name not in manifest["files"])
    original = (good / "manifest.json").read_bytes()
    manifest["files"][name] = hashlib.sha256(SECRET).hexdigest()
    try:
        (good / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError):
            Bundle.open(good)
    finally:
        (good / "manifest.json").write_bytes(original)


@given(name=NAMES)
def test_writing_stays_inside_or_writes_nothing(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    files, manifest = content()
    folder = tmp_path_factory.mktemp("w")
    try:
        write_bundle(folder / "made", {**files, name: SECRET}, manifest)
    except (BundleError, OSError):
        assert list(folder.iterdir()) == []
        return
    assert [path.name for path in folder.iterdir()] == ["made"]
    assert set(list_files(folder / "made")) == {*files, name, "manifest.json"}


@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3))
def test_any_changed_byte_of_the_encoder_is_noticed(good: Path, flips: list[tuple[int, int]]) -> None:
    original = (good / "encoder.onnx").read_bytes()
    data = bytearray(original)
    for place, value in flips:
        data[place % len(data)] ^= value
    assume(bytes(data) != original)
    try:
        (good / "encoder.onnx").write_bytes(data)
        with pytest.raises(BundleError, match=r"encoder\.onnx: its SHA-256"):
            Bundle.open(good)
    finally:
        (good / "encoder.onnx").write_bytes(original)
