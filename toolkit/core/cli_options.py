"""Make a command line from a typed model: one place for every option's name, type, default, unit and help.

Each field is an option, its docstring the help text, its default the default; nothing else configures a command::

    class AlignOptions(Options):
        photographs: Annotated[Path, Argument("SRC", positional=True)]
        "Folder with one folder of photographs per person."
        min_score: float = Field(0.5, ge=0, le=1)
        "Detector confidence, 0 to 1, below which a face is ignored."
        trust_key: Annotated[tuple[Path, ...], Argument("PUB.pem", repeatable=True)] = ()
        "Public key that must have signed; repeatable."
        mirror: bool = True
        "Look at the mirror image, too."

    def main(argv: Sequence[str] | None = None) -> int:
        return run_command("pkd-align", "Align photographs.", EXAMPLES, AlignOptions, align, argv)

    def align(options: AlignOptions, console: Console) -> Result: ...

``min_score`` becomes ``--min-score X``, ``mirror`` ``--mirror`` and ``--no-mirror`` (a bool that is False by default
only ``--mirror``), a Literal ``choices``, a tuple ``nargs="+"``. What options say together is checked in a
``model_validator`` that raises InputError. A command that needs more calls ``add_options`` on its own parser, adds to
it, and reads the model with ``read_options``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from rich.console import Console

from pkd.toolkit.core.cli_support import Result, make_parser, run
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.models import Record

Model = TypeVar("Model", bound=BaseModel)
NO_NAMES: Mapping[str, str] = {}
PLACEHOLDERS = {int: "N", float: "X", Path: "PATH"}
"""Type of a value → its placeholder in --help, where the field's Argument names none."""
KINDS = {
    "int_parsing": "a whole number", "int_from_float": "a whole number", "float_parsing": "a number",
    "bool_parsing": "1 or 0",
}  # fmt: skip
"""Kind of pydantic's error about a text → what to give instead."""


class Options(Record):
    """Hold what a command was asked for. The docstring of each field is its help text."""

    model_config = ConfigDict(use_attribute_docstrings=True)


@dataclass(frozen=True)
class Argument:
    """Say how a field appears on the command line where its type does not: ``Annotated[Path, Argument("DIR")]``."""

    metavar: str | None = None
    """Placeholder of the value in --help."""
    positional: bool = False
    """Take the value without a flag; optional where the field has a default."""
    flags: tuple[str, ...] = ()
    """Further flags, such as ``-o``."""
    repeatable: bool = False
    """Take one value per flag, and the flag several times; for tuples."""
    group: str | None = None
    """Heading in --help that the option stands under."""


def run_command(
    program: str,
    description: str,
    examples: str,
    model: type[Model],
    body: Callable[[Model, Console], Result],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a command whose options are ``model``; returns the exit code. See ``cli_support.run``."""
    parser = make_parser(program, description, examples)
    add_options(parser, model)
    return run(parser, lambda args, console: body(read_options(model, args), console), argv)


def add_options(
    parser: argparse.ArgumentParser, model: type[BaseModel], note: Callable[[str], str] = lambda name: ""
) -> None:
    """Give ``parser`` an argument for every field. One that is not on the command line is absent from its result.

    ``note``: adds to the help of the option of a name.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in model.model_fields.items():
        given = next((each for each in field.metadata if isinstance(each, Argument)), Argument())
        add = parser.add_argument
        if given.group is not None:
            if given.group not in groups:
                groups[given.group] = parser.add_argument_group(given.group)
            add = groups[given.group].add_argument
        settings = _settings(field, given) | {"default": argparse.SUPPRESS, "help": _help(field) + note(name)}
        if given.positional:
            add(name, **settings)
        else:
            add(*given.flags, flag(name), dest=name, required=field.is_required(), **settings)


def read_options(model: type[Model], args: argparse.Namespace) -> Model:
    """Make the model from what was given on the command line. Raises InputError that names option, value and remedy."""
    return validate_options(model, {name: vars(args)[name] for name in model.model_fields if name in vars(args)})


def validate_options(model: type[Model], values: Mapping[str, Any], names: Mapping[str, str] = NO_NAMES) -> Model:
    """Make the model from values by field name. Raises InputError that names option, value and remedy.

    ``names``: field → name of it in errors, where that is not its flag.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if name not in model.model_fields:
            raise InputError(f"{name or 'options'}: {first['msg']}.") from None
        said = names.get(name, flag(name))
        raise InputError(f"{said} {_shown(first['input'])}: {_remedy(model.model_fields[name], first)}") from None


def flag(name: str) -> str:
    """Name the flag of a field: ``min_score`` → ``--min-score``."""
    return f"--{name.replace('_', '-')}"


def _settings(field: FieldInfo, given: Argument) -> dict[str, Any]:
    """Translate a field's type to argparse's action, nargs, type, choices and metavar."""
    kind = _plain(field.annotation)
    many = get_origin(kind) is tuple
    if many:
        kind = _plain(get_args(kind)[0])
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
    settings: dict[str, Any] = {"metavar": given.metavar}
    if get_origin(kind) is Literal:
        settings |= {"choices": get_args(kind)}
    elif kind in PLACEHOLDERS:
        settings |= {"type": kind, "metavar": given.metavar or PLACEHOLDERS[kind]}
    else:
        settings |= {"metavar": given.metavar or "VALUE"}
    if many:
        settings |= {"action": "append"} if given.repeatable else {"nargs": "*" if given.positional else "+"}
    elif given.positional and not field.is_required():
        settings |= {"nargs": "?"}
    return settings


def _plain(annotation: Any) -> Any:
    """Strip Annotated and ``| None`` from a type."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in {Union, UnionType}:
        return _plain(next(each for each in get_args(annotation) if each is not type(None)))
    return annotation


def _help(field: FieldInfo) -> str:
    default = field.get_default()
    shown = "" if default is None or default is False else "on" if default is True else _shown(default)
    return f"{field.description}{f' [{shown}]' if shown and not field.is_required() else ''}".replace("%", "%%")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _remedy(field: FieldInfo, error: Any) -> str:
    """Say in a sentence what the value must be."""
    bounds = {
        name: getattr(each, name) for each in field.metadata for name in ("ge", "gt", "le", "lt") if hasattr(each, name)
    }
    if error["type"].startswith(("greater_than", "less_than")):
        if len(bounds) == 2:
            return f"must lie between {' and '.join(f'{bound:g}' for bound in bounds.values())}."
        ((name, bound),) = bounds.items()
        return {
            "ge": f"give {bound:g} or more.",
            "gt": f"must be above {bound:g}.",
            "le": f"give {bound:g} or less.",
            "lt": f"must be below {bound:g}.",
        }[name]
    if error["type"] == "literal_error":
        return f"give {error['ctx']['expected']}."
    if error["type"] == "finite_number":
        return "give a finite number."
    if error["type"] in KINDS:
        return f"give {KINDS[error['type']]}."
    said = error["msg"].removeprefix("Value error, ").removesuffix(".")
    return f"{said[:1].lower()}{said[1:]}."
