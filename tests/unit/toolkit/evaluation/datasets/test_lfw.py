"""LFW's pair list format."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.datasets.lfw import read_lfw

TWO_FOLDS = "2 1\nAda\t1\t2\nAda\t1\tBob\t1\nCy\t1\t3\nCy\t3\tBob\t2\n"


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    for name in ("Ada/Ada_0001.png", "Ada/Ada_0002.jpg", "Bob/Bob_0001.webp", "Bob/Bob_0002.png"):
        (tmp_path / "faces" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "faces" / name).write_bytes(b"never read here")
    for number in (1, 3):
        (tmp_path / "faces/Cy").mkdir(exist_ok=True)
        (tmp_path / f"faces/Cy/Cy_000{number}.png").write_bytes(b"never read here")
    return tmp_path / "faces"


def listing(faces: Path, text: str) -> Path:
    path = faces.parent / "pairs.txt"
    path.write_text(text)
    return path


def test_folds_kinds_and_images_whatever_their_suffix(faces: Path) -> None:
    pairs = read_lfw(listing(faces, TWO_FOLDS), faces)
    assert pairs.folds == 2
    assert pairs.fold.tolist() == [0, 0, 1, 1]
    assert pairs.same.tolist() == [True, False, True, False]
    names = pairs.faces.names
    assert [(names[a], names[b]) for a, b in zip(pairs.first, pairs.second, strict=True)] == [
        ("Ada/Ada_0001.png", "Ada/Ada_0002.jpg"),
        ("Ada/Ada_0001.png", "Bob/Bob_0001.webp"),
        ("Cy/Cy_0001.png", "Cy/Cy_0003.png"),
        ("Cy/Cy_0003.png", "Bob/Bob_0002.png"),
    ]
    labels = pairs.faces.labels
    assert ((labels[pairs.first] == labels[pairs.second]) == pairs.same).all()


def test_a_list_without_folds_is_one_fold(faces: Path) -> None:
    pairs = read_lfw(listing(faces, "1\nAda 1 2\nAda 1 Bob 2\n"), faces)
    assert (pairs.folds, len(pairs.same)) == (1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "pairs.txt:1: expected 'FOLDS PAIRS'"),
        ("people\n", "pairs.txt:1: expected 'FOLDS PAIRS'"),
        ("1 2 3\n", "pairs.txt:1: expected 'FOLDS PAIRS'"),
        ("2\nAda 1 2\n", "1 pairs, but its first line announces 1 × 2 × 2"),
        ("0\n", "announces 1 × 2 × 0"),
        ("1\nAda 1\nAda 1 Bob 1\n", "pairs.txt:2: expected 'name number number'"),
        ("1\nAda 1 2\nAda 1 Bob\n", "pairs.txt:3: expected 'name number name number'"),
        ("1\nAda 1 two\nAda 1 Bob 1\n", "pairs.txt:2: expected 'name number number'"),
        ("1\nAda 1 9\nDi 1 Bob 1\n", "2 of the 4 images of pairs.txt are missing (first: Ada/Ada_0009.*)"),
    ],
)
def test_what_is_wrong_is_named(faces: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_lfw(listing(faces, text), faces)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_list_or_folder_is_named(faces: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt: No such file"):
        read_lfw(faces / "none.txt", faces)
    with pytest.raises(InputError, match="no such folder"):
        read_lfw(listing(faces, TWO_FOLDS), faces / "none")


@pytest.mark.shared
def test_the_official_lists_read_as_published(shared: Path) -> None:
    protocol, aligned = shared / "faces/lfw/protocol", shared / "faces/lfw/aligned"
    view2 = read_lfw(protocol / "pairs.txt", aligned)
    assert (view2.folds, len(view2.same), view2.same.sum()) == (10, 6000, 3000)
    develop = read_lfw(protocol / "pairsDevTest.txt", aligned)
    assert (develop.folds, len(develop.same), len(develop.faces)) == (1, 1000, 1549)
