"""A command line made from a model: every kind of field, what is given and what is not, and every refusal."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator
from rich.console import Console

from pkd.toolkit.core.cli_options import Argument, Options, add_options, read_options, run_command
from pkd.toolkit.core.cli_support import Result, make_parser
from pkd.toolkit.core.errors import InputError


class Example(Options):
    """Hold one field of each kind."""

    source: Annotated[Path, Argument("SRC", positional=True)]
    """Folder with 100 % of it."""
    others: Annotated[tuple[str, ...], Argument("MORE", positional=True)] = ()
    """Further ones."""
    out: Annotated[str, Argument("DIR", flags=("-o",))]
    """Folder to write."""
    precision: tuple[Literal["fp32", "int8"], ...] = ("fp32",)
    """Number formats."""
    method: Literal["minmax", "entropy"] = "minmax"
    """How ranges are chosen."""
    batch: Annotated[int, Field(ge=2)] = 64
    """Images per step."""
    share: float | None = Field(None, gt=0, lt=1)
    """Share of the images."""
    mirror: bool = True
    """Look at mirror images."""
    force: bool = False
    """Replace what is there."""
    key: Annotated[tuple[Path, ...], Argument("PEM", repeatable=True, group="trust")] = ()
    """Public key; repeatable."""
    limit: Annotated[int | None, Argument(group="trust")] = None
    """Most keys."""

    @model_validator(mode="after")
    def _fit(self) -> Example:
        if self.limit and not self.key:
            raise InputError("--limit goes with --key. Give it, too.")
        return self


def read(*argv: str) -> Example:
    parser = make_parser("pkd-x", "Does x.", "  pkd-x a")
    add_options(parser, Example)
    return read_options(Example, parser.parse_args(argv))


def test_what_is_not_given_is_the_models_default() -> None:
    assert read("a", "-o", "b") == Example(source=Path("a"), out="b")  # type: ignore[call-arg]


def test_every_kind_of_value() -> None:
    given = read(
        *("a", "c", "d", "--out", "b", "--precision", "fp32", "int8", "--method", "entropy", "--batch", "2"),
        *("--share", "0.5", "--no-mirror", "--force", "--key", "k1", "--key", "k2", "--limit", "3"),
    )
    assert given == Example(
        source=Path("a"), others=("c", "d"), out="b", precision=("fp32", "int8"), method="entropy", batch=2,
        share=0.5, mirror=False, force=True, key=(Path("k1"), Path("k2")), limit=3,
    )  # fmt: skip


def test_what_was_not_given_can_be_told_from_what_was() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Example)
    assert set(vars(parser.parse_args(["a", "-o", "b", "--batch", "64"]))) == {"source", "out", "batch"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--batch", "1"), "--batch 1: give 2 or more."),
        (("--share", "0"), "--share 0.0: must lie between 0 and 1."),
        (("--share", "nan"), "--share nan: give a finite number."),
        (("--limit", "3"), "--limit goes with --key. Give it, too."),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(more: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError) as refused:
        read("a", "-o", "b", *more)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("a",), "the following arguments are required: -o/--out"),
        (("-o", "b"), "the following arguments are required: SRC"),
        (("a", "-o", "b", "--method", "best"), "invalid choice: 'best'"),
        (("a", "-o", "b", "--batch", "many"), "argument --batch: invalid int value: 'many'"),
        (("a", "-o", "b", "--no-force"), "unrecognized arguments: --no-force"),
    ],
)
def test_bad_usage_is_argparses_to_tell(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read(*argv)
    assert message in capsys.readouterr().err


def test_help_shows_each_docstring_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "SRC Folder with 100 % of it.",
        "-o DIR, --out DIR Folder to write.",
        "--batch N Images per step. [64]",
        "--share X Share of the images. --mirror",
        "--mirror, --no-mirror Look at mirror images. [on]",
        "Number formats. [fp32]",
        "trust: --key PEM Public key; repeatable. --limit N Most keys.",
    ):
        assert part in text, part
    assert "--force Replace what is there. [" not in text


def test_a_command_runs_with_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    def body(options: Example, console: Console) -> Result:
        return {"batch": options.batch}

    assert run_command("pkd-x", "Does x.", "  pkd-x a", Example, body, ["a", "-o", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"batch": 64}
    assert run_command("pkd-x", "Does x.", "  pkd-x a", Example, body, ["a", "-o", "b", "--batch", "1"]) == 2
    assert capsys.readouterr().err == "pkd-x: --batch 1: give 2 or more.\n"
