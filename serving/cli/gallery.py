"""pkd-gallery: make keys, check, copy and rekey galleries.

Run as: pkd-gallery verify galleries --master-key FILE
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from pkd.serving.cli.extras import serving_installed
from pkd.serving.cli.gallery_store import StoreOptions
from pkd.serving.cli.migrate import MappedOptions, MigrateOptions, list_mapped, migrate
from pkd.serving.cli.review import MoveOptions, ReviewOptions, move, review_gallery
from pkd.toolkit.core.cli_options import Argument, Options, add_options, read_options
from pkd.toolkit.core.cli_support import Result, make_parser, run
from pkd.toolkit.core.errors import InputError, NotTrusted
from pkd.toolkit.core.progress import ConsoleProgress

if TYPE_CHECKING:
    from pkd.serving.galleries.audit import Head

EXAMPLES = """
  pkd-gallery new-key master.key
  pkd-gallery verify galleries --master-key master.key          # prints the head of the audit log: note it elsewhere
  pkd-gallery verify galleries --master-key master.key --noted 1200:5f0c…
  pkd-gallery export galleries staff staff.jsonl --master-key master.key
  pkd-gallery import galleries staff.jsonl --master-key new.key --sealed-with master.key
  pkd-gallery migrate galleries staff --map map.npz --evaluation evaluation --master-key master.key
  pkd-gallery mapped galleries staff --map map.npz --master-key master.key
  pkd-gallery review galleries staff --certificates bundle --csv doubts.csv --master-key master.key
  pkd-gallery move galleries staff ann-2 ann --master-key master.key
  pkd-gallery rekey galleries --master-key master.key --new-key new.key
  pkd-gallery verify milvus+tls://milvus.example:19530 --milvus-token token --audit audit.db --master-key master.key
"""
_NOTED = re.compile(r"(\d{1,18}):([0-9a-f]{64})", re.ASCII)
_File = Annotated[Path, Argument("FILE", positional=True)]


class NewKeyOptions(Options):
    """Hold what ``pkd-gallery new-key`` was asked for."""

    file: _File
    """File to write, mode 600; it must not exist."""


class VerifyOptions(StoreOptions):
    """Hold what ``pkd-gallery verify`` was asked for."""

    noted: Annotated[str | None, Argument("SEQUENCE:HASH")] = None
    """Head of the audit log, noted outside earlier."""


class ExportOptions(StoreOptions):
    """Hold what ``pkd-gallery export`` was asked for."""

    gallery: Annotated[str, Argument("GALLERY", positional=True)]
    """Name of the gallery."""
    file: _File
    """File to write; it must not exist."""
    plain: bool = False
    """Do not encrypt: the file then holds readable embeddings."""


class ImportOptions(StoreOptions):
    """Hold what ``pkd-gallery import`` was asked for."""

    file: _File
    """File that pkd-gallery export wrote."""
    gallery: Annotated[str | None, Argument("NAME")] = None
    """Gallery to import into (default: the exported one's name)."""
    sealed_with: Annotated[Path | None, Argument("FILE")] = None
    """Master key of the export (default: the store's)."""


class RekeyOptions(StoreOptions):
    """Hold what ``pkd-gallery rekey`` was asked for."""

    new_key: Annotated[Path, Argument("FILE")]
    """Master key from now on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run pkd-gallery and return its exit code."""
    parser = make_parser("pkd-gallery", "Look after galleries that pkd-serve --gallery keeps.", EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (says, model, _) in COMMANDS.items():
        made = commands.add_parser(name, help=says, description=says, allow_abbrev=False)
        made.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        add_options(made, model)
    return run(parser, _run, argv)


def _run(args: argparse.Namespace, console: Console) -> Result:
    _, model, body = COMMANDS[args.command]
    with serving_installed():
        return body(read_options(model, args), console)


def _new_key(options: NewKeyOptions, console: Console) -> Result:
    from pkd.serving.galleries.crypto import MasterKey

    made = MasterKey.create(options.file)
    console.print(f"wrote {options.file}, master key {made.id}. Keep a copy where the database's backups are not.")
    return {"file": str(options.file), "master": made.id}


def _verify(options: VerifyOptions, console: Console) -> Result:
    noted = _noted(options.noted)
    with closing(options.open()) as store:
        found = store.verify(noted, ConsoleProgress(console))
    for line in found.wrong:
        console.print(line, style="red", markup=False, soft_wrap=True)
    if found.wrong:
        many = "1 thing is wrong" if len(found.wrong) == 1 else f"{len(found.wrong)} things are wrong, first"
        raise NotTrusted(f"{options.store}: {many}: {found.wrong[0]}")
    head = f"{found.head.sequence}:{found.head.hash}"
    galleries = "1 gallery" if found.galleries == 1 else f"{found.galleries:,} galleries"
    console.print(
        f"{galleries}, {found.subjects:,} subjects, {found.templates:,} templates: all are whole, "
        f"and searched as they are kept. The audit log is whole; note its head elsewhere:\n{head}",
        markup=False,
        soft_wrap=True,
    )
    counts = {"galleries": found.galleries, "subjects": found.subjects, "templates": found.templates}
    return {**counts, "audit_head": head, "noted_head_checked": bool(noted)}


def _export(options: ExportOptions, console: Console) -> Result:
    from pkd.serving.galleries.crypto import MasterKey
    from pkd.serving.galleries.file_export import export

    master = None if options.plain else MasterKey.read(options.master_key)
    with (
        closing(options.open()) as store,
        ConsoleProgress(console)("exporting", store.get(options.gallery).subjects) as advance,
    ):
        count = export(store, options.gallery, options.file, master, advance)
    state = f"encrypted under master key {master.id}" if master else "readable by anyone who has the file"
    console.print(f"wrote {count:,} subjects to {options.file}, {state}", markup=False, soft_wrap=True)
    return {"gallery": options.gallery, "subjects": count, "file": str(options.file), "encrypted": not options.plain}


def _import(options: ImportOptions, console: Console) -> Result:
    from pkd.serving.galleries.crypto import MasterKey
    from pkd.serving.galleries.file_export import count_subjects, import_

    exported_under = MasterKey.read(options.sealed_with or options.master_key)
    with (
        ConsoleProgress(console)("importing", count_subjects(options.file)) as advance,
        closing(options.open(create=True)) as store,
    ):
        gallery, done = import_(store, options.file, exported_under, advance, "pkd-gallery", options.gallery)
    console.print(
        f"{gallery}: {done.subjects:,} subjects, {done.templates:,} templates enrolled, "
        f"{done.there_already:,} were there already, {done.expired:,} had expired",
        markup=False,
    )
    return {"gallery": gallery, **vars(done)}


def _rekey(options: RekeyOptions, console: Console) -> Result:
    from pkd.serving.galleries.crypto import MasterKey

    after = MasterKey.read(options.new_key)
    with closing(options.open()) as store:
        count = store.rekey(after)
    console.print(f"{count:,} gallery keys are wrapped by master key {after.id} now. Start the server with it.")
    return {"galleries": count, "master": after.id}


COMMANDS: dict[str, tuple[str, type[Options], Callable[[Any, Console], Result]]] = {
    "new-key": ("write a new master key, mode 600", NewKeyOptions, _new_key),
    "verify": (
        "check the audit log, that every row decrypts, and that the index equals the rows",
        VerifyOptions,
        _verify,
    ),
    "export": ("write a gallery's subjects with vectors to a file, one JSON object a line", ExportOptions, _export),
    "import": (
        "enrol what an export holds; what is there already is passed over, so run it again freely",
        ImportOptions,
        _import,
    ),
    "migrate": (
        "map a gallery's templates into a new teacher's space, without photographs; run it again if it was interrupted",
        MigrateOptions,
        migrate,
    ),
    "mapped": ("list whom only mapped templates stand for, worst first", MappedOptions, list_mapped),
    "review": (
        "list subjects who may be one person, and templates that do not match their subject's others",
        ReviewOptions,
        review_gallery,
    ),
    "move": ("move templates to another subject: merge two, or take one apart", MoveOptions, move),
    "rekey": ("wrap every gallery's key with another master key; servers must be stopped", RekeyOptions, _rekey),
}
"""Command → what it does, its options, and the function that does it."""


def _noted(text: str | None) -> Head | None:
    from pkd.serving.galleries.audit import Head

    if text is None:
        return None
    found = _NOTED.fullmatch(text)
    if not found:
        raise InputError(f"--noted {text}: give SEQUENCE:HASH as pkd-gallery verify prints it.")
    return Head(int(found[1]), found[2])


if __name__ == "__main__":
    sys.exit(main())
