"""One rule for a tree of people: who, what is hidden, links, nested folders, and what is said of the rest."""

from __future__ import annotations

import logging
import os
import tarfile
from pathlib import Path

import pytest

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.tree import LeftOut, person_of, walk_images
from tests.unit.toolkit.data.test_tar import write_tar


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def read(root: Path, **options: bool) -> tuple[list[str], dict[str, str]]:
    left_out: list[LeftOut] = []
    return list(walk_images(root, left_out.append, **options)), dict(left_out)


def test_the_person_is_the_first_folder_however_deep_the_image_lies(tmp_path: Path) -> None:
    faces = FaceSet.read(touch(tmp_path, "ann/video0/1.png", "ann/video1/a/2.png", "ann/3.png", "bob/4.png"))
    assert [faces.identities[label] for label in faces.labels] == ["ann", "ann", "ann", "bob"]
    assert (person_of("ann/v/1.png"), person_of("./ann/1.png"), person_of("1.png")) == ("ann", "ann", "")


def test_hidden_files_and_what_systems_add_are_no_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "ann/1.png", "ann/._1.png", ".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/ann/._1.png")
    touch(tmp_path, "ann/@eaDir/1.png", "ann/.DS_Store", "ann/.thumb.png", "ann/notes.txt", "align.json")
    assert read(tmp_path) == (["ann/1.png"], {".ipynb_checkpoints": "hidden", "ann/.thumb.png": "hidden"})
    assert FaceSet.read(tmp_path).identities == ("ann",)
    assert "2 not read: 2 hidden (first: .ipynb_checkpoints)" in caplog.text


def test_links_are_followed_once_and_broken_ones_are_said(tmp_path: Path) -> None:
    touch(tmp_path / "store", "bob/1.png")
    faces = touch(tmp_path / "faces", "ann/1.png")
    (faces / "bob").symlink_to(tmp_path / "store/bob")
    (faces / "ann/2.png").symlink_to("1.png")
    (faces / "ann/all").symlink_to(faces)
    (faces / "ann/self").symlink_to(faces / "ann")
    (faces / "ann/gone.png").symlink_to("nowhere.png")
    (faces / "circle").symlink_to("circle")
    (faces / "anna").symlink_to("ann")
    images, left_out = read(faces)
    assert images == ["ann/1.png", "ann/2.png", "bob/1.png"]
    assert left_out == {
        "ann/all": "a link to a folder that holds it",
        "ann/self": "a link to a folder that holds it",
        "ann/gone.png": "a broken link",
        "anna": "a link to a folder that is read by its own name",  # or one person would have two names
        "circle": "a broken link",
    }


def test_other_images_and_containers_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "ann/1.png", "ann/2.tif", "ann/3.JXL", "bob/x.rec", "ann/4.json")
    assert len(FaceSet.read(tmp_path)) == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "3 not read: 2 not one of" in record.getMessage() and "(first: ann/2.tif)" in record.getMessage()
    assert "1 a container within a tree" in record.getMessage()
    assert set(read(tmp_path, every_file=True)[1]) == {"ann/2.tif", "ann/3.JXL", "ann/4.json", "bob/x.rec"}


def test_folders_beside_containers_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(touch(tmp_path, "bob/1.png") / "a.tar", [("ann/1.jpg", b"a")])
    assert FaceSet.read(tmp_path).identities == ("ann",)
    assert "beside a.tar, which is read instead" in caplog.text and "(first: bob)" in caplog.text


def test_names_that_are_not_utf8_are_text_in_reports_and_found_on_disk(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/Andr\xe9"
    os.mkdir(folder)  # noqa: PTH102
    with open(folder + b"/\xe9.png", "wb") as file:  # noqa: PTH123
        file.write(b"content")
    faces = FaceSet.read(tmp_path)
    assert faces.identities == ("Andr\\xe9",) and faces.names == ("Andr\\xe9/\\xe9.png",)
    assert faces.path(0).read_bytes() == b"content"


@pytest.mark.parametrize("form", ["faces/{}/1.jpg", "{}/v/1.jpg", "./{}/1.jpg"])
def test_a_tar_is_read_by_the_same_rule(tmp_path: Path, form: str) -> None:
    files = [(form.format(name), b"a") for name in ("ann", "bob")]
    hidden = [("__MACOSX/ann/1.jpg", b"a"), ("ann/.cache/1.jpg", b"a")]
    found = FaceSet.read(write_tar(tmp_path / "x.tar", [*files, *hidden]))
    assert [name.split("/")[-1] for name in found.identities] == ["ann", "bob"]


def test_lists_of_windows_and_lists_with_labels(tmp_path: Path) -> None:
    touch(tmp_path, "ann/1.png", "bob/2.png")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfann\\1.png\r\nbob\\2.png\r\n")
    assert FaceSet.read(tmp_path / "list.txt").names == ("ann/1.png", "bob/2.png")
    for labelled in ("ann/1.png 0", "ann/1.png\t0", "ann/1.png,ann", "ann/1.png;0", '"ann/1.png","ann"', "1 ann/1.png"):
        (tmp_path / "labels.txt").write_text(labelled + "\n")
        with pytest.raises(InputError, match="A list holds one path a line and no labels"):
            FaceSet.read(tmp_path / "labels.txt")


def test_what_a_tar_has_besides_images_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "a.tar", [("f/ann/1.jpg", b"a"), ("f/bob/2.jpg", b"b"), ("f/bob/3.gif", b"c")])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("f/cid/4.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "f/ann/1.jpg"
        tar.addfile(link)
    assert FaceSet.read(path).identities == ("f/ann", "f/bob")
    assert "2 not read: 1 not one of" in caplog.text and "1 a link; pack files in its place" in caplog.text


def test_a_folder_of_a_tar_that_holds_images_and_folders_is_asked_about(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("f/ann/1.jpg", b"a"), ("f/bob/2.jpg", b"b"), ("f/loose.jpg", b"c")])
    with pytest.raises(InputError, match=r"in the folder f and in folders of it .*one person or hold people"):
        FaceSet.read(path)
    alone = write_tar(tmp_path / "b.tar", [("ann/1.jpg", b"a"), ("ann/session/2.jpg", b"b")])
    assert FaceSet.read(alone).identities == ("ann",)


def test_a_label_with_a_byte_order_mark_is_the_same_name(tmp_path: Path) -> None:
    files = [("1.jpg", b"a"), ("1.txt", b"\xef\xbb\xbfann\r\n"), ("2.jpg", b"b"), ("2.txt", "ann".encode("utf-16"))]
    assert FaceSet.read(write_tar(tmp_path / "a.tar", files)).identities == ("ann",)
