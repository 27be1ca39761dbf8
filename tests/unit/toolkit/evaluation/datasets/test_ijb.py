"""IJB's layout, in fixtures written here: no IJB data is here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.core.errors import BadImage, InputError
from pkd.toolkit.evaluation.datasets.ijb import read_templates
from pkd.toolkit.images.alignment import TEMPLATE, warp
from pkd.toolkit.images.codec import decode_rgb, read_rgb
from tests.support.ijb_files import write_ijb


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    """Four people of two enrolled and three or four other crops: templates 1, 3, 6, 8 are enrolled."""
    random = np.random.default_rng(0)
    counts = {"ada": 5, "bob": 6, "cy": 5, "di": 6}
    people = {name: [random.integers(0, 256, (112, 112, 3), np.uint8) for _ in range(n)] for name, n in counts.items()}
    return write_ijb(tmp_path / "ijb", people)


def images(meta: Path) -> Path:
    return meta.parent / "loose_crop"


def test_templates_media_subjects_and_protocols_are_read(meta: Path) -> None:
    made = read_templates(meta, images(meta))
    assert made.ids.tolist() == list(range(1, 11)) and len(made.faces) == 22
    assert made.faces.labels.tolist() == [
        *[0] * 2,
        *[1] * 3,
        *[2] * 2,
        *[3] * 3,
        4,
        *[5] * 2,
        *[6] * 3,
        *[7] * 2,
        *[8] * 3,
        9,
    ]
    assert made.subject.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [gallery.tolist() for gallery in made.galleries] == [[0, 5], [2, 7]]
    assert made.probes.tolist() == [1, 3, 4, 6, 8, 9]
    assert made.pairs is not None
    first, second, same = made.pairs
    assert len(first) == 24 and set(first.tolist()) == {0, 2, 5, 7} and set(second.tolist()) == {1, 3, 4, 6, 8, 9}
    assert ((made.subject[first] == made.subject[second]) == same).all() and same.sum() == 6
    assert made.aligned and made.scored and made.rebuilt == 0
    assert made.media == 22 - 4  # in each full probe template two faces are of one medium


def test_a_face_weighs_its_score_over_the_faces_of_its_medium(meta: Path) -> None:
    made = read_templates(meta, images(meta))
    scores = [float(line.split()[-1]) for line in (meta / "ijbc_name_5pts_score.txt").read_text().splitlines()]
    assert made.weight[:5] == pytest.approx([scores[0], scores[1], scores[2] / 2, scores[3] / 2, scores[4]])
    plain = read_templates(meta, images(meta), scored=False)
    assert plain.weight[:5].tolist() == [1, 1, 0.5, 0.5, 1] and plain.aligned and not plain.scored


def test_loose_crops_are_aligned_by_their_points(meta: Path) -> None:
    faces = read_templates(meta, images(meta)).faces
    fields = (meta / "ijbc_name_5pts_score.txt").read_text().splitlines()[3].split()
    points = np.array(fields[1:11], np.float32).reshape(5, 2)
    left, top = np.round(points[0] - TEMPLATE[0]).astype(int)
    loose = read_rgb(images(meta) / fields[0])
    crop = faces.load([3], 112)[0]
    np.testing.assert_array_equal(crop, warp(loose, points))
    error = np.abs(crop.astype(int) - loose[top : top + 112, left : left + 112])
    assert error.max() <= 8  # the published points have three decimals
    assert np.array_equal(decode_rgb(faces.images.read(3)), crop)


def test_digests_know_the_points(meta: Path, tmp_path: Path) -> None:
    before = read_templates(meta, images(meta)).faces.digests(tmp_path / "cache")[:].copy()
    path = meta / "ijbc_name_5pts_score.txt"
    lines = path.read_text().splitlines()
    fields = lines[0].split()
    lines[0] = " ".join([fields[0], *(str(float(x) + 7) for x in fields[1:11]), fields[11]])
    path.write_text("\n".join(lines))
    faces = read_templates(meta, images(meta)).faces
    after = faces.digests(tmp_path / "cache")[:]
    assert (before[0] != after[0]).any() and (before[1:] == after[1:]).all()
    assert after[0].tobytes() == hashlib.sha256(faces.images.read(0)).digest()


def test_without_points_the_images_are_crops(meta: Path) -> None:
    (meta / "ijbc_name_5pts_score.txt").unlink()
    made = read_templates(meta, images(meta))
    assert not made.aligned and not made.scored
    with pytest.raises(InputError, match="170×160 pixels, expected an aligned 112×112 crop"):
        made.faces.load([0], 112)


def test_subjects_without_a_csv_are_those_declared_the_same(meta: Path) -> None:
    for path in meta.glob("*.csv"):
        path.unlink()
    made = read_templates(meta, images(meta))
    assert made.subject.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert made.rebuilt == 10 and not len(made.probes) and made.galleries == ()


def test_a_set_without_a_pair_list_is_searched_alone(meta: Path) -> None:
    (meta / "ijbc_template_pair_label.txt").unlink()
    assert read_templates(meta, images(meta)).pairs is None


def test_ijb_b_has_other_names(meta: Path) -> None:
    for path in list(meta.iterdir()):
        name = path.name.replace("ijbc", "ijbb").replace("_G1", "_S1").replace("_G2", "_S2")
        path.rename(path.with_name(name))
    made = read_templates(meta, images(meta))
    assert len(made.galleries) == 2 and made.pairs is not None


def line(number: int, text: str) -> Callable[[str], str]:
    """Replace one line, counted from 1; no text removes it."""

    def change(content: str) -> str:
        lines = content.splitlines()
        lines[number - 1 : number] = [text] if text else []
        return "\n".join(lines) + "\n"

    return change


def cut(content: str) -> str:
    return content[: len(content) // 2].rpartition("\n")[0]


POINTS = "1.png " + "10 20 " * 4 + "10 {} 0.9"
BROKEN: list[tuple[str, Callable[[str], str], str]] = [
    ("face_tid_mid.txt", lambda _: "", "ijbc_face_tid_mid.txt: empty"),
    (
        "face_tid_mid.txt",
        line(2, "2.png 1"),
        "ijbc_face_tid_mid.txt:2: expected 'image template medium', found '2.png 1'",
    ),
    ("face_tid_mid.txt", line(2, "2.png 1 x"), "ijbc_face_tid_mid.txt:2: expected"),
    ("face_tid_mid.txt", line(2, "2.png 1 2 3"), "ijbc_face_tid_mid.txt:2: expected"),
    ("face_tid_mid.txt", line(2, "1.png 1 9"), "ijbc_face_tid_mid.txt:2: 1.png occurs twice in template 1"),
    ("face_tid_mid.txt", line(22, "99.png 10 18"), "'22.png' where the list of faces has '99.png'"),
    ("face_tid_mid.txt", cut, "where the list of faces has no further face"),
    ("name_5pts_score.txt", line(1, POINTS.format("nan")), "ijbc_name_5pts_score.txt:1: expected image, ten finite"),
    ("name_5pts_score.txt", line(1, POINTS.format("inf")), "ijbc_name_5pts_score.txt:1: expected image, ten finite"),
    ("name_5pts_score.txt", line(1, POINTS.format("1 2")), "ijbc_name_5pts_score.txt:1: expected image, ten finite"),
    ("name_5pts_score.txt", line(1, POINTS.format("left")), "ijbc_name_5pts_score.txt:1: expected image, ten finite"),
    ("name_5pts_score.txt", line(1, "1.png " + "10 20 " * 5 + "-1"), "score of 0 or more"),
    ("name_5pts_score.txt", line(2, ""), "ijbc_name_5pts_score.txt:2: '3.png' where the list of faces has '2.png'"),
    ("name_5pts_score.txt", cut, "ijbc_name_5pts_score.txt: truncated: 11 faces, the list of faces has 22"),
    ("template_pair_label.txt", lambda _: "", "ijbc_template_pair_label.txt: empty"),
    ("template_pair_label.txt", line(3, "1 2"), "ijbc_template_pair_label.txt:3: expected 'template template label'"),
    ("template_pair_label.txt", line(3, "1 2 3 4"), "ijbc_template_pair_label.txt:3: expected"),
    ("template_pair_label.txt", line(3, "1 2 yes"), "ijbc_template_pair_label.txt:3: expected"),
    ("template_pair_label.txt", line(3, "1 -2 0"), "ijbc_template_pair_label.txt:3: expected"),
    ("template_pair_label.txt", line(3, "1 99 0"), "'1 99 0' names a template that has no faces"),
    ("template_pair_label.txt", line(3, "1 4 2"), "'1 4 2' has a label other than 0 and 1"),
    ("template_pair_label.txt", line(3, "1 1 1"), "'1 1 1' pairs a template with itself"),
    ("template_pair_label.txt", line(1, "1 4 1"), "declares templates of subjects 100 and 101 the same"),
    ("template_pair_label.txt", line(1, "1 2 0"), "1 2 0, but both are of one subject"),
    ("1N_gallery_G1.csv", lambda _: "", "ijbc_1N_gallery_G1.csv:1: expected columns TEMPLATE_ID and SUBJECT_ID"),
    ("1N_gallery_G1.csv", line(1, "a,b"), "expected columns TEMPLATE_ID and SUBJECT_ID, found ['A', 'B']"),
    ("1N_gallery_G1.csv", lambda text: text.splitlines()[0], "ijbc_1N_gallery_G1.csv: names no template"),
    ("1N_gallery_G1.csv", line(2, "x,100,1.png"), "ijbc_1N_gallery_G1.csv:2: no template number and subject"),
    ("1N_gallery_G1.csv", line(2, "1"), "ijbc_1N_gallery_G1.csv:2: no template number and subject"),
    ("1N_gallery_G1.csv", line(2, "99,100,1.png"), "ijbc_1N_gallery_G1.csv:2: template 99 has no faces"),
    ("1N_gallery_G1.csv", line(2, "1,,1.png"), "ijbc_1N_gallery_G1.csv:2: the subject is empty"),
    ("1N_gallery_G1.csv", line(2, "1,7,1.png"), "template 1 is of subject 100 here and of 7 above"),
    (
        "1N_gallery_G2.csv",
        line(2, "1,100,1.png"),
        "ijbc_1N_gallery_G2.csv: template 1 is also in ijbc_1N_gallery_G1.csv",
    ),
]


@pytest.mark.parametrize(("file", "change", "message"), BROKEN)
def test_what_is_wrong_is_named(meta: Path, file: str, change: Callable[[str], str], message: str) -> None:
    path = meta / f"ijbc_{file}"
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError) as caught:
        read_templates(meta, images(meta))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_whose_faces_all_score_nothing_is_named(meta: Path) -> None:
    path = meta / "ijbc_name_5pts_score.txt"
    lines = [text.rsplit(" ", 1)[0] + " 0" if i < 2 else text for i, text in enumerate(path.read_text().splitlines())]
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match="all faces of template 1 have score 0"):
        read_templates(meta, images(meta))
    assert len(read_templates(meta, images(meta), scored=False).ids) == 10


def test_missing_files_and_images_are_named(meta: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder\. Give the meta folder"):
        read_templates(tmp_path / "none", images(meta))
    with pytest.raises(InputError, match=r"holds 0 files \*_face_tid_mid"):
        read_templates(images(meta), images(meta))
    with pytest.raises(InputError, match=r"no such folder\. Pass the folder of the images"):
        read_templates(meta, tmp_path / "none")
    (images(meta) / "7.png").unlink()
    with pytest.raises(InputError, match=r"1 of the 22 images of ijbc_face_tid_mid\.txt are missing \(first: 7\.png\)"):
        read_templates(meta, images(meta))
    (meta / "ijbc_1N_probe_mixed.csv").unlink()
    (images(meta) / "7.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"has no ijbc_1N_probe_mixed\.csv"):
        read_templates(meta, images(meta))
    for path in meta.glob("*.csv"):
        path.unlink()
    (meta / "ijbc_template_pair_label.txt").unlink()
    with pytest.raises(InputError, match="nothing to compare"):
        read_templates(meta, images(meta))


def test_broken_images_and_points_are_named_when_read(meta: Path) -> None:
    path = meta / "ijbc_name_5pts_score.txt"
    path.write_text(line(2, "2.png " + "10 20 " * 5 + "0.9")(path.read_text()))
    (images(meta) / "1.png").write_bytes(b"no image")
    faces = read_templates(meta, images(meta)).faces
    with pytest.raises(BadImage, match=r"loose_crop/1\.png: not a JPEG"):
        faces.load([0], 112)
    with pytest.raises(BadImage, match=r"loose_crop/2\.png: the landmarks all lie on one point"):
        faces.load([1], 112)
