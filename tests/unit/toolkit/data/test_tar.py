"""Tar shards: every dialect that tarfile and GNU tar write is read, and what is broken is named."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.core.errors import BadImage, InputError
from pkd.toolkit.data.tar import read_tar

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
Files = Sequence[tuple[str, bytes]]


def write_tar(path: Path, files: Files, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w:", format=form) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", FORMATS)
def test_webdataset_samples(tmp_path: Path, form: int) -> None:
    files = [
        ("000.jpg", b"a"), ("000.cls", b"12\n"),
        ("sub/001.json", b'{"label": 3, "other": [1]}'), ("sub/001.webp", b"bb" * 300),
        ("002.png", b""), ("002.txt", "Zoë".encode()),
        ("003.cls", b"12"), ("003.json", b"{}"), ("003.JPEG", b"ccc"), ("003.npy", b"ignored"),
        ("004.jpg", b"d"), ("004.json", b'{"identity": "Bo", "label": 4}'),
    ]  # fmt: skip
    found = read_tar(write_tar(tmp_path / "x.tar", files, form), labelled=True)
    names = [found.images.name(i) for i in range(len(found.images))]
    assert names == ["000.jpg", "sub/001.webp", "002.png", "003.JPEG", "004.jpg"]
    assert [found.identities[owner] for owner in found.owners] == ["00000012", "00000003", "Zoë", "00000012", "Bo"]
    assert [found.images.read(i) for i in range(5)] == [b"a", b"bb" * 300, b"", b"ccc", b"d"]
    assert not found.numbered
    assert found.images.root / found.images.name(0) == tmp_path / "x.tar/000.jpg"


@pytest.mark.parametrize("form", FORMATS)
def test_a_packed_folder_per_identity_with_long_and_foreign_names(tmp_path: Path, form: int) -> None:
    long = "x" * 90 + "/" + "y" * 80 + ".png"
    names = ["ann/1.png", "./bob/2.v1.png", long, *(["Łukasz/ä.png"] if form != tarfile.USTAR_FORMAT else [])]
    if form != tarfile.USTAR_FORMAT:
        names.append("z" * 300 + "/1.png")
    path = write_tar(tmp_path / "x.tar", [(name, name.encode()) for name in names], form)
    found = read_tar(path, labelled=True)
    assert [found.images.read(i).decode() for i in range(len(names))] == names
    assert [found.images.name(i) for i in range(len(names))] == names
    assert [found.identities[i] for i in found.owners][:3] == ["ann", "bob", "x" * 90]


def test_class_numbers_alone_are_numbered(tmp_path: Path) -> None:
    found = read_tar(write_tar(tmp_path / "x.tar", [("0.jpg", b"a"), ("0.cls", b"7")]), labelled=True)
    assert (found.numbered, found.identities) == (True, ("00000007",))


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command here")
def test_what_the_tar_command_writes(tmp_path: Path) -> None:
    for name in ("ann/1.png", "bob/" + "n" * 120 + ".png"):
        (tmp_path / "faces" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "faces" / name).write_bytes(name.encode())
    (tmp_path / "faces/bob/link.png").symlink_to("other.png")
    (tmp_path / "faces/bob/._1.png").write_bytes(b"what macOS adds")
    subprocess.run(["tar", "-cf", tmp_path / "x.tar", "-C", tmp_path / "faces", "ann", "bob"], check=True)
    found = read_tar(tmp_path / "x.tar", labelled=True)
    assert sorted(found.images.read(i).decode() for i in range(len(found.images))) == [
        "ann/1.png", "bob/" + "n" * 120 + ".png",
    ]  # fmt: skip


def test_images_without_identity(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a/1.jpg", b"a"), ("2.jpg", b"b")])
    with pytest.raises(InputError, match=r"1 images have neither a \.cls, .* nor a folder \(first: 2\.jpg\)"):
        read_tar(path, labelled=True)
    assert read_tar(path, labelled=False).owners.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (("1.json", b"{"), "1.json: not a JSON object with 'identity' or 'label'"),
        (("1.json", b"[]"), "not a JSON object"),
        (("1.json", b'{"caption": "x"}'), "not a JSON object"),
        (("1.cls", b"\xff"), "1.cls: not text"),
        (("1.cls", b" \n"), "'' is no label"),
        (("1.txt", b"two\nlines"), "is no label"),
    ],
)
def test_bad_labels(tmp_path: Path, label: tuple[str, bytes], words: str) -> None:
    path = write_tar(tmp_path / "x.tar", [("1.jpg", b"a"), label])
    with pytest.raises(InputError, match=words):
        read_tar(path, labelled=True)


def test_a_label_away_from_its_image_is_not_lost_in_silence(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a/1.jpg", b"a"), ("a/2.jpg", b"b"), ("a/1.cls", b"5"), ("a/2.cls", b"5")])
    with pytest.raises(InputError, match=r"a/1\.cls: no image next to it"):
        read_tar(path, labelled=True)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar(tmp_path: Path, mode: str) -> None:
    with tarfile.open(tmp_path / "x.tar", mode) as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo("1.jpg"))
    with pytest.raises(InputError, match="compressed with"):
        read_tar(tmp_path / "x.tar", labelled=True)


def test_no_tar_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for data, words in ((b"", "empty"), (b"x" * 5000, "no tar header at byte 0"), (b"\0" * 1024, "holds no image")):
        path.write_bytes(data)
        with pytest.raises(InputError, match=words):
            read_tar(path, labelled=True)


@pytest.mark.parametrize("form", FORMATS)
def test_every_cut_within_the_content_is_noticed(tmp_path: Path, form: int) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"p/{i}.png", b"x" * 700) for i in range(3)], form)
    whole = path.read_bytes()
    end = whole.rindex(b"x" * 700) + 700
    for length in range(1, end, 97):
        path.write_bytes(whole[:length])
        if length % 512 == 0 and length // 512 % 3 == 0:
            continue  # between two members: nothing in a tar says how many there are
        with pytest.raises(InputError, match=r"truncated|no tar|empty"):
            read_tar(path, labelled=True)


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"p/{i}.png", b"x") for i in range(3)], tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="no tar header at byte 1,024"):
        read_tar(path, labelled=True)


def test_a_tar_that_shrinks_after_it_was_indexed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"p/{i}.png", b"x" * 700) for i in range(2)])
    images = read_tar(path, labelled=True).images
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(BadImage, match=r"x\.tar/p/0\.png: truncated, 188 of 700 bytes"):
        images.read(0)
    path.unlink()
    with pytest.raises(BadImage, match="No such file"):
        images.read(0)


def test_sizes_over_eight_gigabytes_are_read(tmp_path: Path) -> None:
    """GNU's base 256 size, on a sparse file."""
    path = tmp_path / "x.tar"
    big = tarfile.TarInfo("p/big.bin")
    big.size = 9 << 30
    small = tarfile.TarInfo("p/1.png")
    small.size = 3
    with path.open("wb") as file:
        file.write(big.tobuf(tarfile.GNU_FORMAT))
        file.seek(512 + big.size)
        file.write(small.tobuf(tarfile.GNU_FORMAT) + b"abc" + bytes(509) + bytes(1024))
    found = read_tar(path, labelled=True)
    assert found.images.read(0) == b"abc"


def test_stamps_differ_by_place(tmp_path: Path) -> None:
    found = read_tar(write_tar(tmp_path / "x.tar", [(f"p/{i}.png", b"x") for i in range(3)]), labelled=True)
    keys, settled = found.images.stamps(np.array([2, 0]))
    assert keys[0] != keys[1]
    assert not settled.any()
