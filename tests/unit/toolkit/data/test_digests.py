"""Digests: remembered while nothing changed, taken anew when anything may have."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.core.errors import BadImage
from pkd.toolkit.data import source
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.row_store import StoredRows
from pkd.toolkit.data.source import ImageCollection
from tests.support.recordio_writer import write_records


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(30):
        path = tmp_path / f"faces/p{i % 3}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image %d" % i)
    return tmp_path / "faces"


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as left alone for long enough."""
    monkeypatch.setattr(source, "UNTOUCHED_NS", -(10**18))


class Counted:
    """Counts the reads of every image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads = 0
        read = ImageCollection.read

        def counting(images: ImageCollection, row: int) -> bytes:
            self.reads += 1
            return read(images, row)

        monkeypatch.setattr(ImageCollection, "read", counting)


def hexes(faces: FaceSet, cache: Path | None) -> list[str]:
    return [row.tobytes().hex() for row in faces.digests(cache)[:]]


def expected(faces: FaceSet) -> list[str]:
    return [hashlib.sha256(faces.path(i).read_bytes()).hexdigest() for i in range(len(faces))]


@pytest.mark.usefixtures("old")
def test_the_second_start_reads_no_image(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FaceSet.read(folder)
    assert hexes(first, tmp_path / "cache") == expected(first)
    counted = Counted(monkeypatch)
    again = FaceSet.read(folder).select(np.random.default_rng(0).permutation(30))
    assert hexes(again, tmp_path / "cache") == expected(again)
    assert isinstance(again.digests(), StoredRows)
    assert again.digest() == first.digest()
    assert counted.reads == 0


@pytest.mark.usefixtures("old")
def test_a_change_of_the_same_size_is_seen_even_with_its_old_time(folder: Path, tmp_path: Path) -> None:
    FaceSet.read(folder).digests(tmp_path / "cache")
    target = folder / "p0/0.png"
    times = target.stat()
    time.sleep(0.01)
    target.write_bytes(b"imago 0")
    os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = FaceSet.read(folder)
    assert hexes(changed, tmp_path / "cache") == expected(changed)


def test_a_file_written_a_moment_ago_is_not_remembered(folder: Path, tmp_path: Path) -> None:
    faces = FaceSet.read(folder)
    assert hexes(faces, tmp_path / "cache") == expected(faces)
    assert not (tmp_path / "cache/digests/sha256.keys").stat().st_size


def test_old_and_young_files_together(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "UNTOUCHED_NS", 500_000_000)
    time.sleep(0.6)
    for path in sorted(folder.rglob("*.png"))[::2]:
        path.write_bytes(b"anew " + path.name.encode())
    for _ in range(2):
        faces = FaceSet.read(folder)
        assert hexes(faces, tmp_path / "cache") == expected(faces)
    assert (tmp_path / "cache/digests/sha256.keys").stat().st_size == 15 * 8


@pytest.mark.usefixtures("old")
def test_records_are_remembered_by_file_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_records(tmp_path / f"{name}.rec", [(i, float(i % 2), b"%s %d" % (name.encode(), i)) for i in range(9)])
    both = FaceSet.read(tmp_path / "a.rec", tmp_path / "b.rec")
    first = hexes(both, tmp_path / "cache")
    assert first == [hashlib.sha256(both.images.read(i)).hexdigest() for i in range(18)]
    counted = Counted(monkeypatch)
    assert hexes(FaceSet.read(tmp_path / "b.rec"), tmp_path / "cache") == first[9:]
    assert counted.reads == 0


def test_an_image_that_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    faces = FaceSet.read(folder)
    (folder / "p1/4.png").unlink()
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(BadImage, match=r"p1/4\.png"):
            faces.digests(cache)


def test_the_digest_of_a_set_is_what_it_has_always_been(folder: Path) -> None:
    """Sorted lines of digest and identity: running checkpoints depend on it. With copies of an image."""
    (folder / "p2/copy.png").write_bytes(b"image 0")
    (folder / "p0/copy.png").write_bytes(b"image 0")
    loose = FaceSet.read(folder, labelled=False)
    faces = FaceSet.read(folder)
    for one in (faces, loose, faces.select(np.array([3, 1, 30, 0]))):
        owners = [one.identities[label] if label >= 0 else "" for label in one.labels]
        lines = sorted(f"{digest} {owner}" for digest, owner in zip(expected(one), owners, strict=True))
        assert one.digest() == hashlib.sha256("\n".join(lines).encode()).hexdigest()
