"""Label maps: forms they come in, and what is wrong with them, by line or row."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkd.toolkit.core.errors import BadHead
from pkd.toolkit.distill.heads.label_map import class_names, read_label_map


@pytest.mark.parametrize(
    "text",
    ["anna\nbert\nçelik\n", '["anna", "bert", "çelik"]', '{"bert": 1, "çelik": 2, "anna": 0}', "anna\r\nbert\r\nçelik"],
)
def test_forms(tmp_path: Path, text: str) -> None:
    (tmp_path / "map").write_text(text, encoding="utf-8")
    assert read_label_map(tmp_path / "map") == ("anna", "bert", "çelik")


def test_integers_of_recordio_are_names(tmp_path: Path) -> None:
    (tmp_path / "map").write_text("[7, 3]")
    assert read_label_map(tmp_path / "map") == ("7", "3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no identity"),
        ("[]", "names no identity"),
        ("a\n\nb", "line 2 is empty"),
        ("a\nb\nc\nb", "b stands at row 1 and row 3"),
        ("[1, 2", "not JSON"),
        ('{"a": 0, "b": 0}', "row 0 stands for more than one identity"),
        ('{"a": 0, "b": 2}', "row 1 has no identity"),
        ('{"a": 1, "b": 2}', "row 0 has no identity"),
        ('{"a": "x"}', "neither a list"),
        ("[[1]]", "neither a list"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(BadHead, match=f"labels.txt: .*{message}"):
        read_label_map(tmp_path / "labels.txt")


def test_no_file_and_no_text(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(b"\x81\xff\xfe\x00")
    for name in ("missing", "noise", "."):
        with pytest.raises(BadHead, match="--head-labels"):
            read_label_map(tmp_path / name)


def test_a_map_wins_over_the_order_of_the_identities() -> None:
    assert class_names(("b", "a"), ("a", "b"), 2, "h", "map") == ("b", "a")
    with pytest.raises(BadHead, match="map: names 2 identities, h has 3 class rows"):
        class_names(("b", "a"), ("a", "b"), 3, "h", "map")
    with pytest.raises(BadHead, match=r"no centre for 1 of 2 identities \(first: c\)"):
        class_names(("b", "a"), ("a", "c"), 2, "h", "map")


def test_numbers_are_rows_and_need_not_all_occur() -> None:
    assert class_names(None, ("0", "10", "2"), 12, "h", None) == tuple(map(str, range(12)))
    with pytest.raises(BadHead, match=r"no centre for 1 of 2 identities \(first: 12\).*all shards"):
        class_names(None, ("0", "12"), 1, "h", None)
    assert class_names(None, ("00000000", "00000010"), 12, "h", None)[10] == "00000010"  # RecordIO and tar shards
    assert class_names(None, ("00", "01"), 2, "h", None) == ("00", "01")  # folder names, not labels


def test_names_take_the_rows_in_their_order() -> None:
    assert class_names(None, ("a", "b"), 2, "h", None) == ("a", "b")
    with pytest.raises(BadHead, match=r"h: 3 centres, but the images show 2 identities.*--head-labels"):
        class_names(None, ("a", "b"), 3, "h", None)
