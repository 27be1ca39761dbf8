"""tools/prose.py: the repository passes, and what each rule is there to stop does not."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tools import prose

ROOT = Path(__file__).resolve().parents[2]


def test_the_repository_is_clean_outside_its_exceptions() -> None:
    excepted = tuple(prose.exceptions())
    assert not [one for one in prose.findings() if not one.path.startswith(excepted)]


def test_no_file_is_longer_than_contributing_says() -> None:
    files = [path for part in ("toolkit", "export", "serving") for path in (ROOT / part).rglob("*.py")]
    assert len(files) > 300
    assert not [(path.name, n) for path in files if (n := len(path.read_text(encoding="utf-8").splitlines())) > 500]


@pytest.mark.parametrize(
    ("sentence", "function", "fault"),
    [
        ("Resolve a full id, short id or name; raises if several fit.", True, None),
        ("Hold a gallery's templates in memory and search them exactly.", False, None),
        ("A certificate is about one ordered pair.", False, None),
        ("A certificate is about one ordered pair.", True, "imperative"),
        ("A gallery's templates in memory, searched exactly.", False, "has no verb"),
        ("``name@0123456789``, for tables.", True, "imperative"),
        ("What every command shares.", False, "begins with 'What'"),
        ("Of the server.", True, "begins with 'Of'"),
    ],
)
def test_how_a_docstring_opens(sentence: str, function: bool, fault: str | None) -> None:
    found = prose.check_docstring(sentence, function)
    assert found is None if fault is None else found is not None and fault in found


def test_private_names_and_functions_within_functions_need_no_docstring() -> None:
    code = 'def a():\n    """Count."""\n    def b():\n        """Of a."""\ndef _c():\n    """Of a."""\n'
    assert not list(prose.check_code(Path("a.py"), '"""Count things."""\n' + code))


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ('SECONDS = 1\n"""How long it waits."""\n', 1),
        ('SECONDS = 1\n"""Longest wait."""\n', 0),
        ('class A:\n    """Hold it."""\n\n    b: int\n    """Of the log."""\n', 1),
        ('field = Field(description="Of the log")', 1),
        ('parser.add_argument("--a", help="of the log")', 1),
        ('parser.add_argument("--a", help="path of the log")', 0),
    ],
)
def test_notes_name_their_subject(code: str, faults: int) -> None:
    assert len(list(prose.check_code(Path("a.py"), code))) == faults


@pytest.mark.parametrize("code", ["told = 1", "class AtTheDoor: pass", "def f(lineup): pass", "self.twins = []"])
def test_retired_words_do_not_return(code: str) -> None:
    (fault,) = prose.check_code(Path("a.py"), code)
    assert "glossary" in fault.text
    assert not list(prose.check_code(Path("a.py"), "doors_of_perception = visitor = untold = 1"))


def test_long_sentences_are_found_outside_code_and_tables() -> None:
    words = " ".join(["word"] * 41)
    assert [one.line for one in prose.check_document(Path("a.md"), f"Short.\n\n{words}.\n")] == [3]
    assert not list(prose.check_document(Path("a.md"), f"```\n{words}\n```\n\n| {words} |\n\n# {words}\n"))


@pytest.mark.parametrize(("text", "faults"), [("start of the resampling (0)", 1), ("wait for so many seconds (5)", 0)])
def test_numeric_options_name_their_unit(text: str, faults: int) -> None:
    def main(argv: list[str]) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--wait", type=float, help=text)
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.parse_args(argv)

    assert len(list(prose.check_options("pkd-x", main))) == faults
