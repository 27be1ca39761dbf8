"""Print tables whose words stay whole however narrow the console is: an id that is cut cannot be searched for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from rich.console import Console
from rich.table import Table
from rich.text import Text

UNLIMITED = 10_000
"""Width of a console that nobody looks at through a window, columns."""


def show_table(console: Console, table: Table) -> None:
    """Print a table as it is where it fits, else with cells over several lines, else row by row.

    Lines break between words alone. Row by row means a line for each cell, behind its heading. Strings are taken as
    they are: a name in brackets is no markup.
    """
    if isinstance(table.title, str):
        table.title = Text(table.title)
    if _fit(console, table):
        console.print(table, markup=False)
    else:
        _print_rows(console, table)


def shared_prefix(names: Sequence[str], least: int = 8) -> str:
    """Return what different names begin with alike, up to a separator: the part that tells them apart follows.

    Empty where that is shorter than ``least`` characters.
    """
    if len(set(names)) < 2:
        return ""
    first, last = min(names), max(names)
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    common = first[:alike]
    common = common[: max(common.rfind(mark) for mark in "/\\._- ") + 1]
    return common if len(common) >= least else ""


def _fit(console: Console, table: Table) -> bool:
    """Set the columns' widths so that every word fits. False where the console is too narrow for that.

    Columns that lack least get what is spare first: they need no second line then.
    """
    options = console.options.update(max_width=UNLIMITED, markup=False)
    sizes = [
        [console.measure(cell, options=options) for cell in (column.header, *column.cells)] for column in table.columns
    ]
    least = [max(size.minimum for size in column) for column in sizes]
    most = [max(size.maximum for size in column) for column in sizes]
    borders = console.measure(table, options=options).maximum - sum(most)
    spare = console.width - borders - sum(least)
    if spare < 0:
        return False
    for number in sorted(range(len(most)), key=lambda number: most[number] - least[number]):
        more = min(most[number] - least[number], spare)
        spare -= more
        column = table.columns[number]
        column.min_width, column.width, column.no_wrap = None, least[number] + more, False
    return True


def _print_rows(console: Console, table: Table) -> None:
    if table.title:
        console.print(table.title, style="table.title", soft_wrap=True)
    for number in range(table.row_count):
        for place, column in enumerate(table.columns):
            cell, heading = str(list(column.cells)[number]), str(column.header) if table.show_header else ""
            if cell:
                line = f"{heading}: {cell}" if heading else cell
                console.print(Text(line if place == 0 else f"    {line}"), soft_wrap=True)
