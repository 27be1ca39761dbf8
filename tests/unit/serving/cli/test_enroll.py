"""Names of folders become subject ids, and a table keeps which is whose."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from pkd.serving.cli.enroll import keep_names, subject_id
from pkd.toolkit.core.errors import InputError


@pytest.mark.parametrize("name", ["ann", "ann.bee", "a_b", "ann@example.org", "7", "a" * 128])
def test_a_name_that_can_be_an_id_is_one(name: str) -> None:
    assert subject_id(name) == name


def test_other_names_keep_what_is_readable_and_are_never_taken_for_each_other() -> None:
    names = [
        "Zoë Müller",
        "Zoe Muller",
        "ZOE MULLER",
        "王伟",
        "王芳",
        " ann",
        "-ann",
        "a:b",
        "x" * 200,
        "new\nline",
    ]
    names.append(os.fsdecode(b"caf\xe9"))
    ids = [subject_id(name) for name in names]
    assert len(set(ids)) == len(names)
    assert all(subject_id(one) == one for one in ids)  # they are ids
    assert ids[0] == "Zoe-Muller-d6e575a6" and ids[3].startswith("subject-")


def test_composed_and_decomposed_characters_are_one_name() -> None:
    assert subject_id(unicodedata.normalize("NFD", "Zoë Müller")) == subject_id("Zoë Müller")


def test_the_table_grows_is_private_and_spares_other_files(tmp_path: Path) -> None:
    table = tmp_path / "names.csv"
    keep_names(table, {"b-1": "B, b"})
    keep_names(table, {"a-1": "王伟"})
    assert table.read_text("utf-8").splitlines() == ["subject,name", "a-1,王伟", 'b-1,"B, b"']
    assert table.stat().st_mode & 0o777 == 0o600
    other = tmp_path / "other.csv"
    other.write_text("file,reason\n")
    with pytest.raises(InputError, match="its columns are not subject, name"):
        keep_names(other, {"a": "b"})
