"""CFP's protocol, in a fixture of the published layout: no CFP data is here."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.datasets.cfp import read_cfp

PEOPLE = 3


@pytest.fixture
def cfp(tmp_path: Path) -> Path:
    """``cfp/Protocol`` of three people in two folds, and ``crops`` with two frontal and one profile image each."""
    protocol = tmp_path / "cfp/Protocol"
    lists: dict[str, list[str]] = {"F": [], "P": []}
    for person in range(1, PEOPLE + 1):
        for kind, folder, count in (("F", "frontal", 2), ("P", "profile", 1)):
            for number in range(1, count + 1):
                image = f"{person:03d}/{folder}/{number:02d}"
                lists[kind].append(f"{len(lists[kind]) + 1} ../Data/Images/{image}.jpg")
                crop = tmp_path / "crops" / f"{image}.webp"
                crop.parent.mkdir(parents=True, exist_ok=True)
                crop.write_bytes(b"never read here")
    folds = {
        "FF": {"01": ("1,2\n", "1,3\n"), "02": ("3,4\n5,6\n", "4,5\n6,1\n")},
        "FP": {"01": ("1,1\n", "1,2\n"), "02": ("3,2\n6,3\n", "4,3\n6,1\n")},
    }
    for split, each in folds.items():
        for fold, (same, diff) in each.items():
            folder_path = protocol / "Split" / split / fold
            folder_path.mkdir(parents=True)
            (folder_path / "same.txt").write_text(same)
            (folder_path / "diff.txt").write_text(diff)
    for kind, lines in lists.items():
        (protocol / f"Pair_list_{kind}.txt").write_text("\r\n".join(lines) + "\r\n")
    return protocol


def test_frontal_images_are_queries_and_profile_images_the_gallery(cfp: Path, tmp_path: Path) -> None:
    pairs = read_cfp(cfp / "Split/FP", tmp_path / "crops")
    names = pairs.faces.names
    assert [(names[a], names[b]) for a, b in zip(pairs.first, pairs.second, strict=True)] == [
        ("001/frontal/01.webp", "001/profile/01.webp"),
        ("001/frontal/01.webp", "002/profile/01.webp"),
        ("002/frontal/01.webp", "002/profile/01.webp"),
        ("003/frontal/02.webp", "003/profile/01.webp"),
        ("002/frontal/02.webp", "003/profile/01.webp"),
        ("003/frontal/02.webp", "001/profile/01.webp"),
    ]
    assert pairs.same.tolist() == [True, False, True, True, False, False]
    assert pairs.fold.tolist() == [0, 0, 1, 1, 1, 1]
    labels = pairs.faces.labels
    assert ((labels[pairs.first] == labels[pairs.second]) == pairs.same).all()
    assert pairs.sides_differ and pairs.faces.identities == ("001", "002", "003")


def test_frontal_against_frontal_has_one_kind_of_image(cfp: Path, tmp_path: Path) -> None:
    pairs = read_cfp(cfp / "Split/FF", tmp_path / "crops")
    assert not pairs.sides_differ and pairs.folds == 2
    assert all("frontal" in name for name in pairs.faces.names)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("Pair_list_P.txt", "1\n", "Pair_list_P.txt:1: expected 'number …/person/kind/image'"),
        ("Pair_list_P.txt", "x ../Data/Images/001/profile/01.jpg\n", "Pair_list_P.txt:1: expected 'number"),
        ("Pair_list_P.txt", "1 ../../../../x\n", "Pair_list_P.txt:1: expected 'number"),
        ("Pair_list_P.txt", "1 a/1/f/1.jpg\n1 a/2/f/1.jpg\n", "Pair_list_P.txt:2: number 1 occurs twice"),
        ("Pair_list_F.txt", "", "Pair_list_F.txt: empty"),
        ("Split/FP/01/same.txt", "1 1\n", "same.txt:1: expected 'number,number', found '1 1'"),
        ("Split/FP/01/same.txt", "1,\n", "same.txt:1: expected 'number,number'"),
        ("Split/FP/02/diff.txt", "\n\n99,1\n", "diff.txt:3: image 99 is not in the first side's"),
        ("Split/FP/02/diff.txt", "1,99\n", "diff.txt:1: image 99 is not in the second side's"),
        ("Split/FP/01/same.txt", "1,2\n", "001/frontal/01 and 002/profile/01 are of two people"),
        ("Split/FP/01/diff.txt", "1,1\n", "001/frontal/01 and 001/profile/01 are of one person"),
        ("Split/FP/01/diff.txt", "\n", "diff.txt: empty"),
    ],
)
def test_what_is_wrong_is_named(cfp: Path, tmp_path: Path, file: str, text: str, message: str) -> None:
    (cfp / file).write_text(text)
    with pytest.raises(InputError) as caught:
        read_cfp(cfp / "Split/FP", tmp_path / "crops")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_and_crops_are_named(cfp: Path, tmp_path: Path) -> None:
    crops = tmp_path / "crops"
    with pytest.raises(InputError, match="no pair list"):
        read_cfp(cfp, crops)
    with pytest.raises(InputError, match="no such folder"):
        read_cfp(cfp / "Split/FP", tmp_path / "none")
    (crops / "002/profile/01.webp").unlink()
    with pytest.raises(InputError, match=r"1 of the \d images of FP are missing \(first: 002/profile/01\.\*\)"):
        read_cfp(cfp / "Split/FP", crops)
    (cfp / "Split/FP/02/diff.txt").unlink()
    with pytest.raises(InputError, match=r"02/diff\.txt: No such file"):
        read_cfp(cfp / "Split/FP", crops)
    (cfp / "Pair_list_P.txt").unlink()
    with pytest.raises(InputError, match=r"Pair_list_P\.txt: No such file"):
        read_cfp(cfp / "Split/FP", crops)
    (tmp_path / "FP").mkdir()
    for kind in "FP":
        (tmp_path.parent / f"Pair_list_{kind}.txt").write_text("1 a/001/frontal/01.jpg\n")
    with pytest.raises(InputError, match="holds no folders 01"):
        read_cfp(tmp_path / "FP", crops)
