"""Tables of demographic labels are read as spreadsheets save them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.evaluation.metrics.labels import MAX_GROUPS, read_labels


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "labels.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_file_as_a_spreadsheet_saves_it(tmp_path: Path) -> None:
    text = '\ufeffidentity, sex ,age_band\r\nann,f,20-29\r\n"Smith, Bob",m,\r\n\r\n'
    labels = read_labels(write(tmp_path, text))
    assert labels.attributes == ("sex", "age_band")
    assert labels.values == {"ann": ("f", "20-29"), "Smith, Bob": ("m", None)}
    assert labels.of("sex", ["Smith, Bob", "nobody", "ann"]) == ["m", None, "f"]
    assert labels.name == "labels.csv" and len(labels.sha256) == 64
    assert labels.matched(["ann", "Smith, Bob", "nobody"]) == labels


BAD = {
    "empty": ("", "holds no line"),
    "blank": ("\n\n , \n", "holds no line"),
    "no header": ("ann,f\nbob,m\n", "its first line is 'ann,f', not a header"),
    "no attribute": ("identity\nann\n", "not a header"),
    "nameless attribute": ("identity,,sex\nann,1,f\n", "not a header"),
    "header alone": ("identity,sex\n", "holds a header and no identity"),
    "column twice": ("identity,sex,sex\nann,f,f\n", "names a column twice"),
    "identity twice": ("identity,sex\nann,f\nbob,m\nann,m\n", r"labels\.csv:4: 'ann' occurs a second time"),
    "too many fields": ("identity,sex\nann,f,x\n", r"labels\.csv:2: has 3 fields, the header 2"),
    "too few fields": ("identity,sex\nann,f\nbob\n", r"labels\.csv:3: has 1 fields"),
    "no identity": ("identity,sex\n,f\n", r"labels\.csv:2: names no identity"),
    "open quote": ('identity,sex\n"ann,f\n', "not CSV"),
    "latin-1": ("identity,sex\nann,weiblich\nJosé,m\n".encode("latin-1"), "not UTF-8"),
    "picture": (b"\x89PNG\r\n\x1a\n\x00\x00", "not UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, name: str) -> None:
    text, said = BAD[name]
    with pytest.raises(InputError, match=said) as refused:
        read_labels(write(tmp_path, text))  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv: No such file"):
        read_labels(tmp_path / "none.csv")
    with pytest.raises(InputError, match="Is a directory"):
        read_labels(tmp_path)


def test_measurements_and_empty_columns_are_no_groups(tmp_path: Path) -> None:
    people = [f"p{i}" for i in range(MAX_GROUPS + 1)]
    rows = "".join(f"{name},{i},\n" for i, name in enumerate(people))
    labels = read_labels(write(tmp_path, f"identity,age,note\n{rows}"))
    with pytest.raises(InputError, match="age has 201 different values, more than 200"):
        labels.matched(people)
    with pytest.raises(InputError, match="note has no value"):
        read_labels(write(tmp_path, "identity,sex,note\nann,f,\n")).matched(["ann"])


def test_the_last_part_of_a_name_will_do_where_one_has_it(tmp_path: Path) -> None:
    labels = read_labels(write(tmp_path, "identity,sex\nann,f\nlfw/bob,m\n"))
    assert labels.matched(["lfw/ann", "lfw/bob", "celeb/bob"]).values == {"lfw/ann": ("f",), "lfw/bob": ("m",)}
    with pytest.raises(InputError, match=r"or several are called so \(first: 'ann'\).*names like 'celeb/ann'"):
        labels.matched(["lfw/ann", "celeb/ann", "lfw/bob"])
    assert labels.matched(["lfw/ann", "ann", "lfw/bob"]).values == {"ann": ("f",), "lfw/bob": ("m",)}
    with pytest.raises(InputError, match="'lfw/ann' occurs twice, once by its last part"):
        read_labels(write(tmp_path, "identity,sex\nann,f\nlfw/ann,m\n")).matched(["lfw/ann"])
