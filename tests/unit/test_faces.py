from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.errors import BadImage, InputError
from pkd.toolkit.faces import UNLABELLED, FaceSet, join
from pkd.toolkit.images import write_rgb


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
    assert [faces.identities[label] for label in faces.labels] == ["ann", "ann", "bob", "eve/x"]
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


def test_a_folder_and_a_list_share_identities(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (folder / "more.txt").write_text("ann/1.png\n")
    faces = FaceSet.read(folder, folder / "more.txt")
    assert len(faces) == 5
    assert faces.identities == ("ann", "bob", "eve/x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the list is empty"),
        (b"# only a comment\n", "the list is empty"),
        (b"nobody/1.png\n", "its first image 'nobody/1.png' lies neither"),
        (b"ann/1.png\nann/9.png\nbob/8.png\n", r"2 of 3 images do not exist \(first: ann/9\.png\)"),
        (b"\xff\xfe\x00\x81", "not a text file"),
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
    assert some.identities == ("ann", "eve/x")
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
