"""Check how pkd speaks, by ``python tools/prose.py``.

The rules, each kept for a reason that CONTRIBUTING.md gives:

1. A docstring opens with a sentence: a function's begins with a verb in the imperative (tools/verbs.txt; add yours),
   anything else's begins so or contains a finite verb. None begins with one of OPENINGS, which announce a half; nor
   does a note under a field or a constant, a ``description`` or a ``help``, which may be the name of a thing.
2. No identifier contains a word of RETIRED or is one of RETIRED_NAMES: there is a standard term for each.
3. No sentence of the documentation is longer than 40 words.
4. The help text of every numeric option names its unit, or what it counts.

`[tool.pkd.prose]` in pyproject.toml lists what is not clean yet.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
CODE = ("pkd/__init__.py", "toolkit", "export", "serving", "tools")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "RELEASE.md", "SECURITY.md", "docs")
LONGEST = 40
"""Words of a sentence in a document."""

OPENINGS = set(re.findall(r"\w+", "of that as what where whose which who whom how why for with in on by from"))
VERBS, FINITE = (
    set(" ".join(line for line in part.splitlines() if not line.startswith("#")).split())
    for part in (ROOT / "tools/verbs.txt").read_text().split("\n\n")
)
RETIRED = {"bury", "clerk", "clerks", "door", "lineup", "settle", "strangers", "told", "twins", "visit"}
RETIRED_NAMES = {"Sealed", "ties", "in_turn"}
UNITS = re.compile(
    r"""\b(seconds?|milliseconds?|ms|s|minutes?|hours?|days?|years?|bytes?|KiB|MiB|GiB|kB|MB|GB|pixels?|degrees?|radians?
    |percent|cosine|rates?|factor|share|fraction|probability|weight|scale|ratio|temperature|margin|threshold|port|seed|level
    |sigma|sharpness|power|dimensions?|numbers?|bits?|times|per|megapixels?|mode
    |images?|crops?|photographs?|faces?|people|identities|persons?|subjects?|templates?|galleries|pairs?|classes|rows?
    |steps?|epochs?|threads?|process(?:es)?|workers?|cores?|requests?|clients?|connections?|layers?|resamples|repetitions
    |runs?|shards?|entries|items|candidates|results|batch(?:es)?|replicas?|keys?|lines?|attempts)\b|%""",
    re.VERBOSE | re.IGNORECASE,
)


class Finding(NamedTuple):
    """Name a place and what is wrong there."""

    path: str
    line: int
    text: str


def first_sentence(docstring: str) -> str:
    """Return the text up to the first full stop that ends a sentence, or to the end of the first paragraph."""
    paragraph = re.split(r"\n\s*\n", re.sub(r"^pkd-\w+: ", "", docstring.strip()))[0]
    text = " ".join(paragraph.split())
    return re.split(r"(?<=[.!?:;])\s+(?=[A-Z`])", text)[0]


def check_docstring(docstring: str, imperative: bool) -> str | None:
    """Say what is wrong with how a docstring opens; None: nothing."""
    sentence = first_sentence(docstring)
    words = re.findall(r"[A-Za-z][A-Za-z'-]*", sentence.replace("``", " "))
    if not words:
        return "opens without words"
    first = words[0].lower()
    starts_in_code = sentence.startswith("`")
    if first in OPENINGS:
        return f"begins with {words[0]!r}: {sentence[:80]!r}"
    if first in VERBS and not starts_in_code:
        return None
    if imperative:
        return f"does not begin with a verb in the imperative: {sentence[:80]!r}"
    if not any(word.lower() in FINITE for word in words):
        return f"has no verb: {sentence[:80]!r}"
    return None


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.AST, str, bool]]:
    """Walk the public docstrings of a module → (node, text, whether it is a function's)."""
    stack: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
    while stack:
        node = stack.pop()
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        text = ast.get_docstring(node)
        if text:
            attribute = any(
                isinstance(d, ast.Name) and d.id.endswith("property") for d in getattr(node, "decorator_list", ())
            )
            yield node, text, function and not attribute
        if not function:
            for child in node.body:
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
                    stack.append(child)


def notes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Walk the notes under fields and constants, and texts given as ``description`` or ``help`` → (line, text)."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for before, after in pairwise(body) if isinstance(body, list) else ():
            if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
                yield from _text(after.value)
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in ("description", "help"):
                    yield from _text(keyword.value)


def _opening(note: str) -> str | None:
    words = re.findall(r"[A-Za-z][A-Za-z'-]*", note)
    return f"begins with {words[0]!r}: {note[:80]!r}" if words and words[0].lower() in OPENINGS else None


def _text(node: ast.expr) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Walk the names that a module defines: classes, functions, parameters, variables and fields → (line, name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr


def check_code(path: Path, text: str) -> Iterator[Finding]:
    """Check docstrings and identifiers of one file of Python."""
    name = path.as_posix()
    tree = ast.parse(text)
    for node, docstring, imperative in docstrings(tree):
        if fault := check_docstring(docstring, imperative):
            what = getattr(node, "name", "module")
            yield Finding(name, getattr(node, "lineno", 1), f"docstring of {what} {fault}")
    for line, note in notes(tree):
        if fault := _opening(note):
            yield Finding(name, line, f"note {fault}")
    for line, identifier in sorted(set(identifiers(tree))):
        parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)
        if words := RETIRED & {part.lower() for part in parts} | RETIRED_NAMES & {identifier}:
            yield Finding(name, line, f"{identifier}: the glossary has another word for {sorted(words)[0]!r}")


def check_document(path: Path, text: str) -> Iterator[Finding]:
    """Check the sentences of one Markdown file; code, tables, headings and addresses of links are no sentences."""
    text = re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)
    line = 1
    for paragraph in re.split(r"(\n\s*\n|\n(?=\s*(?:[-*] |\d+\. |#|\|)))", text):
        plain = re.sub(r"\]\([^)]*\)", "]", paragraph).strip()
        if plain and not plain.startswith(("|", "#")):
            for sentence in re.split(r"(?<=[.!?:;])[)*_]*\s+", plain):
                count = len(re.findall(r"[\w`’'-]*\w[\w`’'./-]*", sentence))
                if count > LONGEST:
                    begin = " ".join(sentence.split())[:60]
                    yield Finding(path.as_posix(), line, f"a sentence of {count} words: {begin!r}")
        line += paragraph.count("\n")


def check_options(program: str, main: object) -> Iterator[Finding]:
    """Check the help texts of one command's options: how they begin, and that numeric ones name a unit."""
    for parser in parsers_of(main):
        for action in parser._actions:
            if fault := _opening(action.help or ""):
                yield Finding(program, 0, f"{action.option_strings or action.dest}: its help {fault}")
            numeric = action.type in (int, float) or isinstance(action.default, int | float)
            if not numeric or isinstance(action.default, bool) or not action.option_strings or action.nargs == 0:
                continue
            if not UNITS.search((action.help or "").replace("%%", "%")):
                yield Finding(program, 0, f"{action.option_strings[0]}: its help names no unit: {action.help!r}")


def parsers_of(main: object) -> list[argparse.ArgumentParser]:
    """Start a command up to where it would read its arguments → its parser, and those of its subcommands."""
    assert callable(main)
    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", _captured), suppress(SystemExit):
        try:
            main([])
        except _Captured as captured:
            (parser,) = captured.args
            subcommands = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
            return [parser, *(one for choices in subcommands for one in choices.values())]
    raise RuntimeError(f"{main}: reads its arguments by something else than argparse")


class _Captured(Exception):
    pass


def _captured(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> object:
    raise _Captured(self)


def findings() -> list[Finding]:
    """Check all of the repository."""
    found: list[Finding] = []
    for pattern, check in ((CODE, check_code), (DOCUMENTS, check_document)):
        suffix = "*.py" if pattern is CODE else "*.md"
        for name in pattern:
            for path in sorted((ROOT / name).rglob(suffix)) if (ROOT / name).is_dir() else [ROOT / name]:
                found += check(path.relative_to(ROOT), path.read_text(encoding="utf-8"))
    for program, target in scripts():
        module, _, function = target.partition(":")
        found += check_options(program, getattr(importlib.import_module(module), function))
    return found


def scripts() -> list[tuple[str, str]]:
    """Read the commands from pyproject.toml → (name, module:function)."""
    return re.findall(r'^(pkd-\w+) = "([\w.]+:\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def exceptions() -> list[str]:
    """Read from pyproject.toml the paths and commands that are not clean yet."""
    text = (ROOT / "pyproject.toml").read_text()
    section = re.search(r"^\[tool\.pkd\.prose\]\n.*?^unclean = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    return re.findall(r'^\s*"([^"]+)"', section[1], re.MULTILINE) if section else []


def main() -> int:
    """Print what is wrong outside the exceptions, and exceptions that are needed no more; return the exit code."""
    found, excepted = findings(), exceptions()
    faults = [one for one in found if not one.path.startswith(tuple(excepted))] if excepted else found
    for one in faults:
        print(f"{one.path}:{one.line}: {one.text}")
    for name in excepted:
        if not any(one.path.startswith(name) for one in found):
            print(f"pyproject.toml: {name} is clean: delete its line in [tool.pkd.prose]")
    if "--all" in sys.argv:
        for one in found:
            print(f"{one.path}:{one.line}: {one.text}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
