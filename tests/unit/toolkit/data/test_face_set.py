"""People are read from folders, lists, RecordIO and tar files alike."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from pkd.toolkit.core.errors import BadImage, InputError
from pkd.toolkit.data.face_set import FaceSet, join
from pkd.toolkit.data.source import UNLABELLED
from pkd.toolkit.images.codec import write_rgb
from tests.support.recordio_writer import insightface_records, write_records


def crop(value: int, size: int = 112) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(("faces/bob/1.png", "faces/ann/2.png", "faces/ann/1.png", "faces/eve/x/1.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_rgb(tmp_path / name, crop(i * 50))
    return tmp_path / "faces"


def test_a_folder_per_identity(folder: Path) -> None:
    faces = FaceSet.read(folder)
    assert faces.names == ("ann/1.png", "ann/2.png", "bob/1.png", "eve/x/1.png")
    assert [faces.identities[label] for label in faces.labels] == ["ann", "ann", "bob", "eve"]
    assert faces.labels.dtype == np.int64


def test_load_gives_the_pixels_in_the_order_asked_for(folder: Path) -> None:
    loaded = FaceSet.read(folder).load([2, 0], 112)
    assert loaded.shape == (2, 112, 112, 3)
    assert loaded[:, 0, 0, 0].tolist() == [0, 100]


def test_a_crop_of_another_size_is_refused_with_the_remedy(folder: Path) -> None:
    write_rgb(folder / "ann/1.png", crop(0, 250))
    with pytest.raises(
        InputError, match=r"ann/1\.png: 250×250 pixels, expected an aligned 112×112 crop. Run pkd-align"
    ):
        FaceSet.read(folder).load([0], 112)


def test_a_corrupt_crop_is_named(folder: Path) -> None:
    (folder / "ann/1.png").write_bytes(b"x")
    with pytest.raises(BadImage, match=r"ann/1\.png"):
        FaceSet.read(folder).load([0], 112)


def test_images_without_a_person_need_unlabelled(folder: Path) -> None:
    write_rgb(folder / "stray.png", crop(1))
    with pytest.raises(InputError, match=r"1 images lie directly in it \(first: stray\.png\)"):
        FaceSet.read(folder)
    loose = FaceSet.read(folder, labelled=False)
    assert len(loose) == 5
    assert set(loose.labels.tolist()) == {UNLABELLED}
    assert loose.identities == ()


def test_lists_beside_or_below_the_faces(folder: Path) -> None:
    text = "# comment\n\nann/1.png\nbob/1.png\n"
    below, beside = folder / "splits/train.txt", folder / "train.txt"
    below.parent.mkdir()
    below.write_text(text)
    beside.write_text(text)
    for listing in (below, beside):
        faces = FaceSet.read(listing)
        assert faces.names == ("ann/1.png", "bob/1.png")
        assert faces.identities == ("ann", "bob")
        assert faces.load([1], 112).shape[0] == 1


def test_a_list_of_absolute_paths(folder: Path, tmp_path: Path) -> None:
    listing = tmp_path / "elsewhere/list.txt"
    listing.parent.mkdir()
    listing.write_text("".join(f"{folder}/{name}\n" for name in ("ann/1.png", "bob/1.png")))
    faces = FaceSet.read(listing)
    assert faces.path(1) == folder / "bob/1.png"
    assert faces.load([1, 0], 112).shape[0] == 2
    assert len(set(faces.digests()[:, 0])) == 2


def test_a_folder_and_a_list_share_identities(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (folder / "more.txt").write_text("ann/1.png\n")
    faces = FaceSet.read(folder, folder / "more.txt")
    assert len(faces) == 5
    assert faces.identities == ("ann", "bob", "eve")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the list is empty"),
        (b"# only a comment\n", "the list is empty"),
        (b"nobody/1.png\n", "its first image 'nobody/1.png' lies neither"),
        (b"ann/1.png\nann/9.png\nbob/8.png\n", r"2 of 3 images do not exist \(first: ann/9\.png\)"),
        (b"\x81\xff\xfe\x00", "not a text file"),
    ],
)
def test_bad_lists(folder: Path, content: bytes, words: str) -> None:
    (folder / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match=words):
        FaceSet.read(folder / "list.txt")


def test_a_missing_source_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder or list file"):
        FaceSet.read(tmp_path / "gone")
    with pytest.raises(InputError, match="holds no image"):
        FaceSet.read(tmp_path)


def test_select_relabels(folder: Path) -> None:
    some = FaceSet.read(folder).select(np.array([3, 1]))
    assert some.identities == ("ann", "eve")
    assert some.labels.tolist() == [1, 0]
    assert some.names == ("eve/x/1.png", "ann/2.png")


def test_digest_depends_on_content_and_identity_only(folder: Path, tmp_path: Path) -> None:
    digest = FaceSet.read(folder).digest()
    folder.rename(tmp_path / "moved")
    moved = FaceSet.read(tmp_path / "moved")
    assert moved.digest() == digest
    assert moved.select(np.array([3, 2, 1, 0])).digest() == digest
    (tmp_path / "moved/ann/2.png").rename(tmp_path / "moved/bob/2.png")
    assert FaceSet.read(tmp_path / "moved").digest() != digest


def test_join_adds_only_unlabelled_images(folder: Path) -> None:
    faces = FaceSet.read(folder)
    both = join(faces, FaceSet.read(folder / "ann", labelled=False))
    assert both.labels.tolist() == [0, 0, 1, 2, -1, -1]
    with pytest.raises(InputError, match="only an unlabelled set"):
        join(faces, faces)


def encoded(value: int) -> bytes:
    return cv2.imencode(".png", crop(value, 16))[1].tobytes()


@pytest.fixture
def everywhere(tmp_path: Path) -> dict[str, Path]:
    """Write the same four images of two people as a folder, a list, RecordIO and two tar shards."""
    people = {"00000003": (10, 20), "00000011": (30, 40)}
    records, samples = [], []
    for name, values in people.items():
        (tmp_path / "folder" / name).mkdir(parents=True)
        for value in values:
            (tmp_path / "folder" / name / f"{value}.png").write_bytes(encoded(value))
            records.append((int(name), encoded(value)))
            samples.append((f"{value}.png", encoded(value), f"{value}.cls", str(int(name)).encode()))
    (tmp_path / "list.txt").write_text("".join(f"folder/{n}/{v}.png\n" for n, vs in people.items() for v in vs))
    (tmp_path / "record").mkdir()
    write_records(tmp_path / "record/train.rec", insightface_records(records))
    (tmp_path / "shards").mkdir()
    for i in (0, 2):
        with tarfile.open(tmp_path / f"shards/{i}.tar", "w") as tar:
            for name, data in ((s[k], s[k + 1]) for s in samples[i : i + 2] for k in (0, 2)):  # type: ignore[assignment]
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))  # type: ignore[arg-type]
    return {name: tmp_path / name for name in ("folder", "list.txt", "record", "record/train.rec", "shards")}


def test_all_sources_show_the_same_set(everywhere: dict[str, Path]) -> None:
    reference = FaceSet.read(everywhere["folder"])
    for name, source in everywhere.items():
        faces = FaceSet.read(source)
        assert [i[-8:] for i in faces.identities] == ["00000003", "00000011"], name
        assert faces.labels.tolist() == [0, 0, 1, 1]
        np.testing.assert_array_equal(faces.load(range(4), 16), reference.load(range(4), 16))
        np.testing.assert_array_equal(faces.digests()[:], reference.digests()[:])
        if name != "list.txt":  # its identities are paths from the list
            assert faces.digest() == reference.digest()
        assert faces.crop_size() == 16


def test_class_numbers_are_shared_within_a_folder_and_told_apart_between_folders(everywhere: dict[str, Path]) -> None:
    shards = sorted(everywhere["shards"].glob("*.tar"))
    assert FaceSet.read(*shards).identities == ("00000003", "00000011")
    both = FaceSet.read(everywhere["record"], everywhere["shards"])
    assert both.identities == ("record/00000003", "record/00000011", "shards/00000003", "shards/00000011")
    assert both.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    mixed = FaceSet.read(everywhere["folder"], everywhere["record"])
    assert mixed.identities == ("00000003", "00000011", "record/00000003", "record/00000011")
    np.testing.assert_array_equal(mixed.load([0, 4], 16)[0], mixed.load([0, 4], 16)[1])


def test_folders_of_one_name_are_told_apart_by_their_path(everywhere: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other/record"
    other.parent.mkdir()
    everywhere["record"].rename(other)
    write_records(everywhere["record"].parent / "record.rec", [(0, 3.0, encoded(1))])
    (tmp_path / "record").mkdir()
    (tmp_path / "record.rec").rename(tmp_path / "record/one.rec")
    identities = FaceSet.read(other, tmp_path / "record").identities
    assert len(identities) == 3
    assert f"{(tmp_path / 'record').resolve()}/00000003" in identities


def test_select_and_join_over_several_sources(everywhere: dict[str, Path]) -> None:
    both = FaceSet.read(everywhere["record"], everywhere["shards"])
    some = both.select(np.array([7, 0, 4]))
    assert some.identities == ("record/00000003", "shards/00000003", "shards/00000011")
    assert some.labels.tolist() == [2, 0, 1]
    assert some.names == ("40.png", "train.rec#1", "10.png")
    joined = join(some, FaceSet.read(everywhere["folder"], labelled=False).select(np.array([1])))
    assert joined.labels.tolist() == [2, 0, 1, -1]
    assert joined.load(range(4), 16)[:, 0, 0, 0].tolist() == [40, 10, 10, 20]
    assert joined.path(3) == everywhere["folder"] / "00000003/20.png"
    with pytest.raises(InputError, match="not a file of its own"):
        joined.path(1)


def test_a_corrupt_image_in_a_record_or_a_tar_is_named(tmp_path: Path) -> None:
    rec = write_records(tmp_path / "a.rec", [(5, 1.0, b"no image")])
    with pytest.raises(BadImage, match=r"a\.rec#5: not a JPEG, PNG, WebP, BMP, AVIF or HEIC"):
        FaceSet.read(rec).load([0], 16)


def test_an_empty_set_and_an_unlabelled_folder_of_records(everywhere: dict[str, Path]) -> None:
    assert len(FaceSet.read()) == 0
    assert FaceSet.read().identities == ()
    loose = FaceSet.read(everywhere["record"], everywhere["shards"], labelled=False)
    assert set(loose.labels.tolist()) == {UNLABELLED}
    assert loose.identities == ()


def test_a_crop_that_is_not_square(folder: Path) -> None:
    write_rgb(folder / "ann/1.png", np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(InputError, match=r"ann/1\.png: 9×8 pixels, expected a square crop"):
        FaceSet.read(folder).crop_size()


def test_a_folder_that_cannot_be_read_is_named(folder: Path) -> None:
    for loop in ("a", "b"):
        (folder / loop).symlink_to(folder / {"a": "b", "b": "a"}[loop])
    assert len(FaceSet.read(folder)) == 4  # links that lead nowhere are no images
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (folder / "ann").chmod(0)
    with pytest.raises(InputError, match="ann: Permission denied"):
        FaceSet.read(folder)
    (folder / "ann").chmod(0o755)
