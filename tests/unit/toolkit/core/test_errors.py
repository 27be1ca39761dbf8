from __future__ import annotations

import inspect
import re

from pkd.toolkit.core import errors


def drawn() -> dict[str, tuple[str | None, int]]:
    """Name → (parent, exit code) as drawn in the docstring's tree."""
    tree: dict[str, tuple[str | None, int]] = {}
    above: list[tuple[int, str, int]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^    ([│├└─ ]*)([A-Z]\w+)(?: +(\d)(?= ))?", line)
        if not found:
            continue
        depth = len(found[1])
        while above and above[-1][0] >= depth:
            above.pop()
        parent = above[-1][1] if above else None
        code = int(found[3]) if found[3] else above[-1][2]  # a leaf without a number has its parent's
        tree[found[2]] = (parent, code)
        above.append((depth, found[2], code))
    return tree


def test_the_drawn_tree_is_the_tree() -> None:
    classes = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, Exception)}
    real = {
        name: (cls.__base__.__name__ if cls.__base__ is not Exception else None, cls.exit_code)
        for name, cls in classes.items()
    }
    assert drawn() == real
    assert len(real) > 10


def test_a_missing_extra_says_what_to_install() -> None:
    assert str(errors.MissingExtra("torch", "train")) == (
        "torch is not installed. Install it with: pip install 'pkd[train]'"
    )
