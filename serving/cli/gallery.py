"""pkd-gallery: make keys, check, copy and rekey galleries.

Run as: pkd-gallery verify galleries --master-key FILE
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from pkd.toolkit.core.cli_support import Result, make_parser, run
from pkd.toolkit.core.errors import InputError, MissingExtra, NotTrusted
from pkd.toolkit.core.progress import ConsoleProgress

if TYPE_CHECKING:
    from pkd.serving.galleries.audit import Head
    from pkd.serving.galleries.crypto import MasterKey
    from pkd.serving.galleries.open import StoreUrl

EXAMPLES = """
  pkd-gallery new-key master.key
  pkd-gallery verify galleries --master-key master.key          # prints the head of the audit log: note it elsewhere
  pkd-gallery verify galleries --master-key master.key --noted 1200:5f0c…
  pkd-gallery export galleries staff staff.jsonl --master-key master.key
  pkd-gallery import galleries staff.jsonl --master-key new.key --sealed-with master.key
  pkd-gallery rekey galleries --master-key master.key --new-key new.key
  pkd-gallery verify milvus+tls://milvus.example:19530 --milvus-token token --audit audit.db --master-key master.key
"""
_NOTED = re.compile(r"(\d{1,18}):([0-9a-f]{64})", re.ASCII)


def main(argv: Sequence[str] | None = None) -> int:
    """Run pkd-gallery and return its exit code."""
    parser = make_parser("pkd-gallery", "Look after galleries that pkd-serve --gallery keeps.", EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        made.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if name != "new-key":
            made.add_argument(
                "store", metavar="DIR|milvus[+tls]://HOST:PORT", help="what pkd-serve --gallery was given"
            )
            made.add_argument("--master-key", type=Path, required=True, metavar="FILE", help="its master key")
            made.add_argument("--audit", metavar="FILE", help="audit log of this machine, beside Milvus")
            made.add_argument("--milvus-token", metavar="FILE", help="file that holds USER:PASSWORD of Milvus")
        return made

    made = command("new-key", "write a new master key, mode 600")
    made.add_argument("file", type=Path, metavar="FILE")
    made = command("verify", "check the audit log, that every row decrypts, and that the index equals the rows")
    made.add_argument("--noted", metavar="SEQUENCE:HASH", help="a head of the audit log, noted outside earlier")
    made = command("export", "write a gallery's subjects with vectors to a file, one JSON object a line")
    made.add_argument("gallery", metavar="GALLERY")
    made.add_argument("file", type=Path, metavar="FILE")
    made.add_argument("--plain", action="store_true", help="do not encrypt: the file then holds readable embeddings")
    made = command("import", "enrol what an export holds; what is there already is passed over, so run it again freely")
    made.add_argument("file", type=Path, metavar="FILE")
    made.add_argument("--gallery", metavar="NAME", help="import into this gallery (default: the exported one's name)")
    made.add_argument(
        "--sealed-with", type=Path, metavar="FILE", help="master key of the export (default: the store's)"
    )
    made = command("rekey", "wrap every gallery's key with another master key; servers must be stopped")
    made.add_argument("--new-key", type=Path, required=True, metavar="FILE", help="master key from now on")
    return run(parser, _run, argv)


def _run(args: argparse.Namespace, console: Console) -> Result:
    try:
        from pkd.serving.galleries.crypto import MasterKey
    except ModuleNotFoundError as missing:
        if missing.name in ("fastapi", "starlette", "orjson", "threadpoolctl"):
            raise MissingExtra(missing.name, "serve") from None
        raise
    if args.command == "new-key":
        made = MasterKey.create(args.file)
        console.print(f"wrote {args.file}, master key {made.id}. Keep a copy where the database's backups are not.")
        return {"file": str(args.file), "master": made.id}
    return COMMANDS[args.command](args, _store_url(args), MasterKey.read(args.master_key), console)


def _verify(args: argparse.Namespace, url: StoreUrl, master: MasterKey, console: Console) -> Result:
    noted = _noted(args.noted)
    with closing(url.open(master, create=False, load=False)) as store:
        found = store.verify(noted, ConsoleProgress(console))
    for line in found.wrong:
        console.print(line, style="red", markup=False, soft_wrap=True)
    if found.wrong:
        many = "1 thing is wrong" if len(found.wrong) == 1 else f"{len(found.wrong)} things are wrong, first"
        raise NotTrusted(f"{url.url}: {many}: {found.wrong[0]}")
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


def _export(args: argparse.Namespace, url: StoreUrl, master: MasterKey, console: Console) -> Result:
    from pkd.serving.galleries.file_export import export

    with (
        closing(url.open(master, create=False, load=False)) as store,
        ConsoleProgress(console)("exporting", store.get(args.gallery).subjects) as advance,
    ):
        count = export(store, args.gallery, args.file, None if args.plain else master, advance)
    state = "readable by anyone who has the file" if args.plain else f"encrypted under master key {master.id}"
    console.print(f"wrote {count:,} subjects to {args.file}, {state}", markup=False, soft_wrap=True)
    return {"gallery": args.gallery, "subjects": count, "file": str(args.file), "encrypted": not args.plain}


def _import(args: argparse.Namespace, url: StoreUrl, master: MasterKey, console: Console) -> Result:
    from pkd.serving.galleries.crypto import MasterKey
    from pkd.serving.galleries.file_export import count_subjects, import_

    exported_under = MasterKey.read(args.sealed_with) if args.sealed_with else master
    with (
        ConsoleProgress(console)("importing", count_subjects(args.file)) as advance,
        closing(url.open(master, load=False)) as store,
    ):
        gallery, done = import_(store, args.file, exported_under, advance, "pkd-gallery", args.gallery)
    console.print(
        f"{gallery}: {done.subjects:,} subjects, {done.templates:,} templates enrolled, "
        f"{done.there_already:,} were there already, {done.expired:,} had expired",
        markup=False,
    )
    return {"gallery": gallery, **vars(done)}


def _rekey(args: argparse.Namespace, url: StoreUrl, master: MasterKey, console: Console) -> Result:
    from pkd.serving.galleries.crypto import MasterKey

    after = MasterKey.read(args.new_key)
    with closing(url.open(master, create=False, load=False)) as store:
        count = store.rekey(after)
    console.print(f"{count:,} gallery keys are wrapped by master key {after.id} now. Start the server with it.")
    return {"galleries": count, "master": after.id}


COMMANDS = {"verify": _verify, "export": _export, "import": _import, "rekey": _rekey}


def _store_url(args: argparse.Namespace) -> StoreUrl:
    from pkd.serving.galleries.open import StoreUrl

    try:
        url = StoreUrl(args.store, args.audit, args.milvus_token)
    except InputError as error:
        raise InputError(f"{args.store}: {error}") from None
    for option, value in (("--audit", args.audit), ("--milvus-token", args.milvus_token)):
        if value and not url.milvus:
            raise InputError(f"{option} {value}: it is for a store milvus://HOST:PORT alone. Leave it out.")
    return url


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
