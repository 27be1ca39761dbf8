"""Enrol folders of photographs into a gallery of a running server (pkd-enroll).

Run as: pkd-enroll people --server URL --gallery staff

No state is kept here: every photograph is sent under an idempotency key made of the gallery, its space, path, content
and the options, so that running it again enrols what is missing and neither embeds nor enrols the rest twice.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from rich.console import Console

from pkd.serving.core.schemas import Name
from pkd.toolkit.core.cli_options import Argument, Options, run_command
from pkd.toolkit.core.cli_support import Result
from pkd.toolkit.core.errors import InputError, PkdError
from pkd.toolkit.core.progress import ConsoleProgress
from pkd.toolkit.core.text import read_text, text_encoding
from pkd.toolkit.data.tree import LeftOut, person_of, printable, walk_images
from pkd.toolkit.images.codec import SUFFIXES

if TYPE_CHECKING:
    from pkd.serving.client import Client

EXAMPLES = """
  pkd-enroll people --server http://127.0.0.1:8000 --gallery staff --create
  PKD_API_KEY=… pkd-enroll crops --server https://faces.example --gallery staff --aligned --jobs 8
  pkd-enroll people --server http://127.0.0.1:8000 --gallery staff --options '{"attributes": {"site": "north"}}'
"""
GROUP = 16
"""Photographs that one thread sends at a time."""


STRAY = "lies in no subject's folder"


@dataclass(frozen=True)
class Photo:
    """Name one file: ``<subject>/…``, relative, with forward slashes."""

    name: str

    @property
    def folder(self) -> str:
        """Return the folder it lies in, directly below DIR."""
        return self.name.partition("/")[0]

    @property
    def subject(self) -> str:
        """Return the id of whom that folder is called after."""
        return subject_id(self.folder)


@dataclass(frozen=True)
class Target:
    """Say what everything is enrolled into, and how."""

    gallery: str
    space: str
    options: Mapping[str, Any]

    def key(self, photo: Photo, data: bytes) -> str:
        """Make the idempotency key of a photograph; in another space it is another one: a migration takes all again."""
        parts = [self.gallery, self.space, photo.name, hashlib.sha256(data).hexdigest(), self.options]
        return "enroll-" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """Hold what became of one photograph; ``reason`` None: it is enrolled."""

    photo: Photo
    reason: str | None = None
    type: str = ""
    replayed: bool = False


class EnrollOptions(Options):
    """Hold what pkd-enroll was asked for."""

    dir: Annotated[Path, Argument("DIR", positional=True)]
    """Folder with one folder of photographs per subject."""
    server: Annotated[str, Argument("URL")]
    """Address of pkd-serve."""
    gallery: Annotated[str, Argument("NAME")]
    """Gallery to enrol into."""
    create: bool = False
    """Create the gallery if it is not there."""
    space: Annotated[str | None, Argument("ID")] = None
    """Space of a created gallery; the server's default one where left out."""
    retention_days: Annotated[float | None, Argument("N")] = None
    """Days after which the templates of a created gallery are deleted."""
    encoder: Annotated[str | None, Argument("ID")] = None
    """Loaded encoder; one of the gallery's space where left out."""
    aligned: bool = False
    """The photographs are aligned crops of pkd-align."""
    faces: Literal["exactly_one", "largest"] = "exactly_one"
    """Faces that are taken where several are found."""
    options: Annotated[str, Argument("JSON")] = "{}"
    """Further fields of each enrolment: attributes, consent, quality."""
    api_key_file: Annotated[Path | None, Argument("FILE")] = None
    """File with the API key; the variable PKD_API_KEY where left out."""
    jobs: Annotated[int, Field(ge=1)] = 4
    """Requests at a time."""
    failed: Annotated[Path, Argument("CSV")] = Path("failed.csv")
    """Table of what was refused."""
    names: Annotated[Path, Argument("CSV")] = Path("names.csv")
    """Table of the ids that were made of folders' names, where a name is no id."""

    @model_validator(mode="after")
    def _of_a_created_gallery(self) -> EnrollOptions:
        for option, value in (("--space", self.space), ("--retention-days", self.retention_days)):
            if value is not None and not self.create:
                raise InputError(f"{option} {value}: it is for a gallery that is made. Pass --create, too.")
        return self

    def enrolment(self) -> dict[str, Any]:
        """Return the fields that each enrolment is sent with. Raises InputError for --options that are no object."""
        try:
            given = json.loads(self.options)
        except ValueError:
            given = None
        if not isinstance(given, dict):
            raise InputError(
                f'--options {self.options}: give a JSON object, for example {{"attributes": {{"site": "a"}}}}.'
            )
        chosen = {"encoder": self.encoder} if self.encoder else {}
        return {"faces": self.faces, "aligned": self.aligned, **chosen, **given}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pkd-enroll``; returns the exit code."""
    description = (
        "Enrol photographs into a gallery of a running server: one folder per subject, named as the subject. What was "
        "refused is listed with the reason in the file of --failed. Run again to continue: nobody is enrolled twice. "
        "Exits with 1 where a subject got no template at all."
    )
    return run_command("pkd-enroll", description, EXAMPLES, EnrollOptions, enroll, argv)


def enroll(options: EnrollOptions, console: Console) -> Result:
    """Enrol everything below ``options.dir``; returns the counts that the command prints."""
    from pkd.serving.client import Client

    enrolment = options.enrolment()
    photos, failed = _list(options.dir)
    outcomes = [*failed]
    made = {photo.subject: printable(photo.folder) for photo in photos if photo.subject != photo.folder}
    if made:
        keep_names(options.names, made)
        subject, name = next(iter(made.items()))
        said = f"{len(made):,} folders have names that are no ids; whose each is, is in {options.names}"
        console.print(f"{said} (first: {name} is {subject})", markup=False, soft_wrap=True)
    with Client(options.server, _key(options.api_key_file)) as client:
        if options.create:
            days = options.retention_days
            client.create_gallery(options.gallery, options.space, None if days is None else days * 86_400)
        target = Target(options.gallery, _space(client, options), enrolment)
        try:
            with ConsoleProgress(console)("enrolling", len(photos)) as advance:
                for some in _all(client, options.dir, target, photos, options.jobs):
                    outcomes += some
                    advance(len(some))
        finally:
            _write(options.failed, [one for one in outcomes if one.reason is not None])
    return _report(console, options, outcomes, made)


def _space(client: Client, options: EnrollOptions) -> str:
    """Return the space that templates go into now: in a gallery that is being migrated, the second one."""
    from pkd.serving.client import Refused

    try:
        now = client.gallery(options.gallery)
    except Refused as refused:
        if refused.type == "unknown-gallery":
            raise InputError(f"{options.server} has no gallery {options.gallery}. Pass --create to make it.") from None
        raise
    return (now.moving_to or now.space).id


def _all(client: Client, root: Path, target: Target, photos: Sequence[Photo], jobs: int) -> Iterator[list[Outcome]]:
    """Give outcomes of a group at a time, in any order. The first request that is refused as a whole ends it."""
    groups = [photos[start : start + GROUP] for start in range(0, len(photos), GROUP)]
    with ThreadPoolExecutor(jobs) as pool:
        sent = [pool.submit(_send, client, root, target, group) for group in groups]
        try:
            for one in as_completed(sent):
                yield one.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _send(client: Client, root: Path, target: Target, photos: Sequence[Photo]) -> list[Outcome]:
    from pkd.serving.client import Item

    outcomes: list[Outcome] = []
    sending: dict[str, Photo] = {}

    def items() -> Iterator[Item]:
        for photo in photos:
            try:
                data = (root / photo.name).read_bytes()
            except OSError as error:
                outcomes.append(Outcome(photo, error.strerror or str(error), "unreadable"))
                continue
            key = target.key(photo, data)
            sending[key] = photo
            yield Item(photo.subject, (data,), key, target.options)

    for item, answer in client.enrol_bulk(target.gallery, items()):
        problem = answer.problem or {}
        photo = sending[item.key]
        outcomes.append(Outcome(photo, problem.get("detail"), problem.get("type", ""), bool(answer.replayed)))
    return outcomes


def _list(root: Path) -> tuple[list[Photo], list[Outcome]]:
    """List photographs below ``root``, and files that are none. Hidden files are ignored."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder. Give the folder that holds a folder per subject.")
    left_out: list[LeftOut] = []
    images = list(walk_images(root, left_out.append, every_file=True))
    photos = [Photo(name) for name in images if person_of(name)]
    failed = [
        Outcome(Photo(name), reason, "no-image") if person_of(name) else Outcome(Photo(name), STRAY, "no-subject")
        for name, reason in [*left_out, *((name, STRAY) for name in images if not person_of(name))]
    ]
    if not photos:
        raise InputError(f"{root}: holds no folder with images ({', '.join(sorted(SUFFIXES))}).")
    return photos, failed


def _key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get("PKD_API_KEY") or None
    try:
        return read_text(file).strip()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"--api-key-file {file}: cannot be read. Give a file that holds the key alone.") from None


def _write(path: Path, failed: Sequence[Outcome]) -> None:
    """Write the list of failures.

    The header alone says that nothing failed: an old list must not be taken for this run's.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "subject", "type", "reason"])
        for one in sorted(failed, key=lambda one: one.photo.name):
            writer.writerow([printable(one.photo.name), printable(one.photo.subject), one.type, one.reason])


def _report(console: Console, options: EnrollOptions, outcomes: Sequence[Outcome], made: Mapping[str, str]) -> Result:
    failed = [one for one in outcomes if one.reason is not None]
    enrolled = [one for one in outcomes if one.reason is None]
    subjects = {one.photo.subject for one in outcomes if one.type != "no-subject"}
    without = sorted(subjects - {one.photo.subject for one in enrolled})
    before = sum(one.replayed for one in enrolled)
    said = f"{len(enrolled) - before:,} photographs enrolled, {before:,} were already, {len(failed):,} refused"
    if failed:
        types = ", ".join(f"{count:,} {type}" for type, count in Counter(one.type for one in failed).most_common())
        said += f" ({types}; see {options.failed})"
    console.print(f"{said}.", markup=False, soft_wrap=True)
    if without:
        raise PkdError(
            f"{len(without):,} of {len(subjects):,} subjects have no template (first: {without[0]}). "
            f"The reasons are in {options.failed}; run again once they are mended."
        )
    return {
        "gallery": options.gallery,
        "subjects": len(subjects),
        "renamed": made,
        "enrolled": len(enrolled) - before,
        "already_enrolled": before,
        "refused": len(failed),
        "failed": str(options.failed),
    }


# An id stands in addresses, logs of proxies and URLs, and folders are called "Zoë Müller": the server is not told that
# name, for galleries hold none.
COLUMNS = ["subject", "name"]
READABLE = 60
"""Most characters of a name that are kept in an id, before the digest."""
_NAME = TypeAdapter[str](Name)


def subject_id(folder: str) -> str:
    """Return the id of the person whose folder is called ``folder``: that name, where it can be an id.

    Any other becomes what of it is ASCII, and eight hex digits of the name's SHA-256, so that two names never share an
    id by losing their accents: ``Zoë Müller`` → ``Zoe-Muller-d6e575a6``. The same name in composed and decomposed
    characters, as Linux and macOS write it, has one id.
    """
    try:
        return _NAME.validate_python(folder)
    except ValidationError:
        name = unicodedata.normalize("NFC", printable(folder))
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    readable = re.sub(r"[^A-Za-z0-9]+", "-", plain)[:READABLE].strip("-") or "subject"
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def keep_names(path: Path, names: Mapping[str, str]) -> None:
    """Add ids and the names that they were made of to a table, readable by its owner alone. Replaced as a whole.

    Raises InputError for a file that is another table.
    """
    known: dict[str, str] = {}
    if path.is_file():
        try:
            with path.open(newline="", encoding=text_encoding(path)) as file:
                rows = list(csv.reader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"--names {path}: cannot be read ({error}). Choose another file.") from None
        if rows and rows[0] != COLUMNS:
            raise InputError(f"--names {path}: its columns are not {', '.join(COLUMNS)}. Choose another file.")
        known = {row[0]: row[1] for row in rows[1:] if len(row) == len(COLUMNS)}
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        with os.fdopen(
            os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", newline="", encoding="utf-8"
        ) as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(sorted({**known, **names}.items()))
        part.replace(path)
    except OSError as error:
        raise InputError(f"--names {path}: {error.strerror}. Choose a place you can write to.") from None


if __name__ == "__main__":
    sys.exit(main())
