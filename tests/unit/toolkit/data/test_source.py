"""Names of images are packed and come back."""

from __future__ import annotations

import os

import pytest

from pkd.toolkit.data.source import PackedNames


def test_names_come_back_whatever_they_are() -> None:
    names = ["ann/1.png", "", "Łukasz/ä 😀.png", os.fsdecode(b"not \xff UTF-8.png"), "x" * 1000]
    packed = PackedNames(iter(names))
    assert [packed[i] for i in range(len(packed))] == names
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            packed[outside]
    assert len(PackedNames([])) == 0
