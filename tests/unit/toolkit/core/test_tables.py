"""Tables in narrow consoles: words, ids and headings stay whole, brackets are no markup."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from pkd.toolkit.core.tables import shared_prefix, show_table

ROOT = Path(__file__).parents[4]
WORDS = ("macro (balanced)", "94.12 (92.00 to 96.10)", "onnxruntime-int8", "3f2a9c0d1e", "p", "student–teacher")


def shown(table: Table, width: int) -> str:
    """Print to a console of that width."""
    file = io.StringIO()
    show_table(Console(file=file, width=width), table)
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("columns", [1, 3, 6, 9])
def test_no_word_is_broken_at_any_width(width: int, columns: int) -> None:
    table = Table(title="[results] of /data/[bold]/run", title_justify="left")
    headings = [WORDS[n % len(WORDS)] for n in range(columns)]
    rows = [[WORDS[(n + row) % len(WORDS)] for n in range(columns)] for row in range(5)]
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    said = shown(table, width)
    for word in " ".join(["[results] /data/[bold]/run", *headings, *(cell for row in rows for cell in row)]).split():
        assert word in said
    assert "…" not in said


def test_a_table_that_fits_is_printed_as_it_is_and_one_that_does_not_row_by_row() -> None:
    table = Table()
    for heading in ("encoder", "rate"):
        table.add_column(heading)
    table.add_row("sha256:" + 60 * "a", "[1]")
    assert len(shown(table, 80).splitlines()) == 5
    assert shown(table, 40).splitlines() == [f"encoder: sha256:{60 * 'a'}", "    rate: [1]"]


def test_what_names_share_is_told_apart_from_what_they_do_not() -> None:
    names = ["data/set/2024-05-01_anna", "data/set/2024-05-01_bert"]
    assert shared_prefix(names) == "data/set/2024-05-01_"
    assert shared_prefix(["data/set/x1", "data/set/x12"]) == "data/set/"
    assert shared_prefix(names[:1] * 2) == shared_prefix(["anna_1", "anna_2"]) == ""


def test_every_command_prints_its_tables_so() -> None:
    """No table reaches a console by ``print``, which cuts at its width."""
    seen = 0
    for folder in ("toolkit", "export", "serving"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if "show_table(" not in text and "Table(" not in text:
                continue
            for call in ast.walk(ast.parse(text)):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "print":
                    assert not any("table" in ast.unparse(one).lower() for one in call.args) or path.name == "tables.py"
                seen += isinstance(call, ast.Call) and ast.unparse(call.func) == "show_table"
    assert seen > 10
