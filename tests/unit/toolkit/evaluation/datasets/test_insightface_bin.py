"""InsightFace's .bin sets, written here as its tools write them: none of the published ones is here."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.datasets.insightface_bin import looks_pickled, read_bin

A, B, C, D = (bytes([0xFF, i, 0, 0x80]) for i in range(4))
IMAGES = [A, B, C, D, B, C, A, D]
SAME = [True, False, True, False]


def write(folder: Path, content: Any, protocol: int = 4) -> Path:
    path = folder / "set.bin"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def python2(images: list[bytes], same: list[bool]) -> bytes:
    """Pickle as Python 2 does at protocol 2: ``str`` as SHORT_BINSTRING, which is no bytes to Python 3."""
    strings = b"".join(b"U" + bytes([len(image)]) + image for image in images)
    flags = b"".join(b"\x88" if flag else b"\x89" for flag in same)
    return b"\x80\x02](" + strings + b"e](" + flags + b"e\x86."


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["lists", "tuples", "numpy flags", "numpy images", "object array", "numpy scalars"])
def test_every_protocol_and_container_reads_alike(tmp_path: Path, protocol: int, kind: str) -> None:
    content: Any = {
        "lists": (IMAGES, SAME),
        "tuples": [tuple(IMAGES), tuple(SAME)],
        "numpy flags": (IMAGES, np.array(SAME)),
        "numpy images": ([np.frombuffer(image, np.uint8) for image in IMAGES], [int(flag) for flag in SAME]),
        "object array": (np.array(IMAGES, object), SAME),
        "numpy scalars": (IMAGES, [np.bool_(flag) for flag in SAME]),
    }[kind]
    pairs = read_bin(write(tmp_path, content, protocol))
    assert [pairs.faces.images.read(row) for row in range(4)] == [A, B, C, D]
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([0, 2, 1, 0], [1, 3, 2, 3])
    assert pairs.same.tolist() == SAME and pairs.sides_differ


def test_a_file_of_python_2_reads_and_is_told_from_a_list(tmp_path: Path) -> None:
    path = tmp_path / "lfw.bin"
    path.write_bytes(python2(IMAGES, SAME))
    assert looks_pickled(path)
    assert read_bin(path).same.tolist() == SAME
    (tmp_path / "pairs.txt").write_text("10\t300\nAda\t1\t2\n")
    assert not looks_pickled(tmp_path / "pairs.txt")


def test_people_are_joined_by_bytes_and_by_what_is_declared_the_same(tmp_path: Path) -> None:
    pairs = read_bin(write(tmp_path, (IMAGES, SAME)))
    assert pairs.faces.labels.tolist() == [0, 0, 0, 1]  # A–B and B–C are declared the same
    assert "4 distinct images form 2 groups" in pairs.notes[0]
    assert pairs.faces.name(2) == "set.bin#2"
    assert len(pairs.notes) == 2
    clash = read_bin(write(tmp_path, ([A, B, B, A], [True, False])))
    assert "1 pairs that are declared different join images of one group" in clash.notes[2]


@pytest.mark.parametrize(("pairs", "folds"), [(6000, [600] * 10), (7, [1] * 7), (23, [3, 3, 3, *[2] * 7])])
def test_neighbouring_pairs_make_ten_folds(tmp_path: Path, pairs: int, folds: list[int]) -> None:
    """As scikit-learn's KFold(10) without shuffling, which arcface_torch uses."""
    same = [i % 2 == 0 for i in range(pairs)]
    images = [i.to_bytes(4, "big") for i in range(2 * pairs)]
    fold = read_bin(write(tmp_path, (images, same))).fold
    assert np.bincount(fold).tolist() == folds and (np.diff(fold) >= 0).all()


class Evil:
    """What an attacker pickles."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.marker, "owned")


class Shell:
    """Run a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("exit 1",)


class Numpy:
    """A function of numpy that would run what it is told to."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.fromfile, ("/etc/hostname",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_a_pickle_is_refused_by_name_and_never_run(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(InputError, match=r"set\.bin: names \S+, which is code and not data; nothing was run"):
        read_bin(write(tmp_path, ([A, B, Evil(marker)], SAME), protocol))
    assert not marker.exists()
    with pytest.raises(InputError, match=r"names (posix|nt)\.system, which is code"):
        read_bin(write(tmp_path, Shell(), protocol))
    with pytest.raises(InputError, match=r"names numpy\S*\.fromfile, which is code"):
        read_bin(write(tmp_path, Numpy(), protocol))


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02c_codecs\nencode\nX\x03\x00\x00\x00abcX\x03\x00\x00\x00zip\x86R.",  # any codec
        b"\x80\x02cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R.",  # two gigabytes of zeros
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R}X\x09\x00\x00\x00__class__K\x01sb.",
        b"\x80\x02c_codecs\nencode\n}X\x0c\x00\x00\x00__defaults__K\x01sb.",
        b"\x80\x02cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.",
        b"\x80\x02\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"\x80\x02\x82\x01.",  # extension registry
        b"\x80\x02Pid\n.",  # persistent id
        b"\x80\x02Nr\xff\xff\xff\xff.",  # room for four thousand million memos
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0fabc.",  # an exabyte of bytes
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01NcX\nY\nNC\x01ctb.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01K\x05cnumpy\ndtype\n)R\x89]tb]\x86.",  # a shape of 5
    ],
)
def test_hand_written_programs_end_in_one_clear_line(tmp_path: Path, program: bytes) -> None:
    (tmp_path / "set.bin").write_bytes(program)
    with pytest.raises(InputError) as caught:
        read_bin(tmp_path / "set.bin")
    assert str(caught.value).startswith(f"{tmp_path / 'set.bin'}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds a dict, not two lists"),
        ((IMAGES, SAME, 1), "holds a tuple, not two lists"),
        ((5, SAME), "its images are a int, not a list"),
        ((IMAGES, "yes"), "its is-same are a str, not a list"),
        (([], []), "holds no pair"),
        ((IMAGES[:-1], SAME), "7 images for 4 pairs, expected two each"),
        ((IMAGES, [*SAME, True]), "8 images for 5 pairs"),
        ((IMAGES, [True, False, 2, True]), "is-same entry 2 is '2', not true or false"),
        ((IMAGES, [True, False, None, True]), "is-same entry 2 is 'None'"),
        ((IMAGES, [True] * 4), "all 4 pairs are declared same"),
        ((IMAGES, [False] * 4), "all 4 pairs are declared different"),
        (([*IMAGES[:-1], b""], SAME), "image 7 is empty"),
        (([*IMAGES[:-1], "text"], SAME), "image 7 is a str, not bytes"),
        (([*IMAGES[:-1], np.zeros(4)], SAME), "holds 'f8', not truth values or whole numbers"),
        (([*IMAGES[:-1], np.zeros((2, 2), np.uint8)], SAME), "is uint8 (2, 2), expected encoded bytes"),
        ((IMAGES, np.zeros((2, 2), bool)), "has the shape (2, 2), expected one dimension"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_bin(write(tmp_path, content))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, (IMAGES, SAME))
    whole = path.read_bytes()
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"set\.bin: not a pickle, or truncated|set\.bin: a corrupt pickle"):
            read_bin(path)
    path.write_bytes(b"(this is a letter")
    with pytest.raises(InputError, match="not a pickle"):
        read_bin(path)
