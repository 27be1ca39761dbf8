"""Bundles as zips: the same bundle, and one test per attack. Each is refused, and the file at fault is named."""

from __future__ import annotations

import re
import shutil
import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.toolkit.bundle import archive, folder
from pkd.toolkit.bundle.archive import zip_path
from pkd.toolkit.bundle.bundle import Bundle, write_bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.cli.verification import verify
from pkd.toolkit.core.errors import BundleError, NotTrusted
from pkd.toolkit.distill.models.open_encoder import open_encoder
from tests.support.bundle_attack import OURS, TRUSTED, refused, signed_bundle
from tests.support.bundle_factory import content


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    return signed_bundle(tmp_path)


def zipped(path: Path, change: Callable[[zipfile.ZipFile, dict[str, bytes]], object]) -> Path:
    """Pack the bundle at ``path`` as an attacker would: ``change`` writes what it likes."""
    made = path.parent / "made.zip"
    files = {name: (path / name).read_bytes() for name in folder.list_files(path)}
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w") as archive:
        warnings.simplefilter("ignore")
        change(archive, files)
        for name, data in files.items():
            archive.writestr(name, data)
    return made


def entry(name: str, mode: int = 0, packing: int = zipfile.ZIP_STORED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x", archive.EPOCH)
    info.filename, info.external_attr, info.compress_type = name, mode << 16, packing
    return info


def test_a_zip_is_the_bundle_and_the_same_bundle_gives_the_same_bytes(signed: Path) -> None:
    opened = Bundle.open(signed, TRUSTED)
    made = opened.pack(zip_path(signed))
    assert made == signed.with_name("signed.zip")
    again = Bundle.open(made, TRUSTED)
    assert (again.manifest, again.signature, again.data) == (opened.manifest, opened.signature, opened.data)
    assert [file.data for file in again.certificate_files()] == [file.data for file in opened.certificate_files()]
    assert not verify(made, TRUSTED).failures
    assert open_encoder(str(made)).info == opened.manifest.encoder
    copy = Path(shutil.copytree(signed, signed.parent / "copy"))
    (copy / "golden.npz").touch()
    assert Bundle.open(copy).pack(copy.with_name("copy.zip")).read_bytes() == made.read_bytes()
    assert again.pack(signed.parent / "again.zip").read_bytes() == made.read_bytes()


def test_a_target_is_found_in_a_zip(tmp_path: Path) -> None:
    files, manifest = content()
    target = Target(
        runtime="onnxruntime",
        precision="fp32",
        encoder=manifest.encoder,
        graph="encoder.onnx",
        file="encoder.onnx",
        golden_tolerance=1e-5,
        checked_with="x",
        made_with="x",
    )
    opened = write_bundle(tmp_path / "b", files, manifest.model_copy(update={"targets": (target,)}))
    made = opened.pack(tmp_path / "b.zip")
    assert open_encoder(str(made / "targets/onnxruntime-fp32")).info == manifest.encoder
    assert not verify(made, None).failures


def test_a_zip_is_written_whole_or_not_at_all(signed: Path) -> None:
    opened, before = Bundle.open(signed), sorted(signed.parent.iterdir())
    (signed / "golden.npz").write_bytes(b"changed since")
    with pytest.raises(BundleError, match=r"golden\.npz: its SHA-256"):
        opened.pack(signed.with_name("signed.zip"))
    assert sorted(signed.parent.iterdir()) == before


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\b", "C:x", ".hidden", "a\0b", "a//b"])
def test_a_name_in_a_zip_that_leads_out_is_refused(signed: Path, name: str) -> None:
    made = zipped(signed, lambda archive, files: archive.writestr(entry(name), b"x"))
    refused(made, re.escape(repr(name)))


def test_links_doubles_and_strange_packing_in_a_zip_are_refused(signed: Path) -> None:
    for mode in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR):
        made = zipped(signed, lambda archive, files, mode=mode: archive.writestr(entry("x", mode | 0o777), b"/etc"))  # type: ignore[misc]
        refused(made, r"made\.zip/x: is a link or a special file")
    made = zipped(signed, lambda archive, files: archive.writestr(entry("encoder.onnx"), b"other"))
    refused(made, r"made\.zip/encoder\.onnx: is in the archive twice")
    made = zipped(signed, lambda archive, files: archive.writestr(entry("x", packing=zipfile.ZIP_BZIP2), b"other"))
    refused(made, r"made\.zip/x: is encrypted, or packed")
    made = Bundle.open(signed).pack(signed.parent / "made.zip")
    data = bytearray(made.read_bytes())
    directory = int.from_bytes(data[-6:-2], "little")
    data[directory + 8] |= 1  # the first entry is said to be encrypted
    made.write_bytes(data)
    refused(made, r"made\.zip/certificates/.*\.json: is encrypted, or packed")
    made = zipped(signed, lambda archive, files: files.update({"notes.txt": b"x"}))
    refused(made, r"made\.zip/notes\.txt: not listed")
    made = zipped(signed, lambda archive, files: files.pop("golden.npz"))
    refused(made, r"made\.zip/golden\.npz: is not in the archive")
    made = zipped(signed, lambda archive, files: files.pop("manifest.json"))
    refused(made, r"made\.zip: not a bundle, it has no manifest\.json")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "MAX_BUNDLE", 10 << 20)
    zeros = bytes(4 << 20)

    def bomb(archive: zipfile.ZipFile, files: dict[str, bytes]) -> None:
        for number in range(3):
            archive.writestr(entry(f"zeros{number}", packing=zipfile.ZIP_DEFLATED), zeros)

    made = zipped(signed, bomb)
    assert made.stat().st_size < 200_000
    refused(made, r"made\.zip: its files have .* bytes, over the limit of 10,485,760 \(largest: zeros0\)")
    monkeypatch.setattr(folder, "MAX_FILE", 1 << 20)
    refused(made, r"made\.zip/zeros0: has 4,194,304 bytes")


def test_a_zip_that_lies_about_its_sizes_is_refused(signed: Path) -> None:
    """The list says four bytes, the content unpacks to more: no more than four are read, and they do not fit."""
    made = zipped(
        signed,
        lambda archive, files: archive.writestr(
            entry("certificates/x.json", packing=zipfile.ZIP_DEFLATED), bytes(9999)
        ),
    )
    data = made.read_bytes()
    made.write_bytes(data.replace((9999).to_bytes(4, "little"), (4).to_bytes(4, "little")))
    with pytest.raises(BundleError, match=r"made\.zip"):
        archive.read_zip(made, "certificates/x.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: b"", "is no zip archive"),
        (lambda data: b"x" * 100, "is no zip archive"),
        (lambda data: data[:-1], "is no zip archive"),
        (lambda data: data + b"x", "is no zip archive"),
        (lambda data: data[:-22] + b"PK\6\7" + bytes(16) + data[-22:], "lists more than a bundle may hold"),
        (lambda data: data[:-14] + b"\xff\xff\xff\xff" + data[-10:], "lists more than"),
        (lambda data: data[: len(data) // 2] + data[-22:], "cannot be read as a zip"),
    ],
)
def test_a_zip_that_is_none_is_refused(signed: Path, change: Callable[[bytes], bytes], said: str) -> None:
    made = Bundle.open(signed).pack(signed.with_name("signed.zip"))
    made.write_bytes(change(made.read_bytes()))
    refused(made, rf"signed\.zip: {said}")


@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3))
@settings(max_examples=60)
def test_any_changed_byte_of_a_signed_zip_is_refused_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    """Some bytes of a zip say nothing, as the time of a file; what opens is always what was signed."""
    files, manifest = content()
    folder = tmp_path_factory.mktemp("flips")
    signed = write_bundle(folder / "b", files, manifest, key=OURS)
    made = signed.pack(folder / "b.zip")
    data = bytearray(made.read_bytes())
    for place, value in flips:
        data[place % len(data)] ^= value
    made.write_bytes(data)
    try:
        opened = Bundle.open(made, TRUSTED)
    except (BundleError, NotTrusted) as error:
        assert "b.zip" in str(error) and "\n" not in str(error)
    else:
        assert opened.data == signed.data
        assert {name: opened.read(name) for name in opened.manifest.files} == files
