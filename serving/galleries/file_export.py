"""Exports to files: a gallery becomes JSON lines, encrypted or plain, and enters a store again. See docs/galleries.md.

Import is idempotent by content: a template that its subject has already, bit for bit, is passed over. So an import that
was interrupted is simply run again.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson

from pkd.serving.galleries.crypto import MasterKey, SubjectKey
from pkd.serving.galleries.description import FORMAT, Json, of_gallery, of_subject
from pkd.serving.galleries.store import Consent, Enrolled, Enrolment, GalleryStore, NewTemplate, Space
from pkd.serving.galleries.templates import fingerprint, fingerprints
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.progress import Advance

BATCH = 256
"""Enrolments made in one durable step."""


@dataclass
class Imported:
    """Count what an import did."""

    subjects: int = 0
    templates: int = 0
    there_already: int = 0
    """Templates that were passed over."""
    expired: int = 0
    """Templates whose time is over, which are left out."""


def export(store: GalleryStore, gallery: str, path: Path, master: MasterKey | None, advance: Advance) -> int:
    """Write a gallery to a new file (mode 600), complete or not at all; returns how many subjects.

    ``master``: encrypt under a key of its own that this one wraps; None: plain.
    """
    subjects = store.export(gallery)
    now = store.get(gallery)
    if path.exists():
        raise InputError(f"{path} exists already. Choose another name.")
    part = path.with_name(f"{path.name}.part")
    count = 0
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            head = of_gallery(now)
            key = None
            if master:
                made, wrapped = master.new_gallery(f"export of {gallery}")
                head |= {"master": master.id, "key": base64.b64encode(wrapped).decode()}
                key = SubjectKey("export", gallery, made.key)
            file.write(_line(head, None, 0))
            for subject in subjects:
                count += 1
                file.write(_line(of_subject(subject), key, count))
                advance(1)
            file.write(_line({"end": True, "subjects": count}, key, count + 1))
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return count


def import_(
    store: GalleryStore, path: Path, master: MasterKey, advance: Advance, actor: str, name: str | None = None
) -> tuple[str, Imported]:
    """Enrol what a file holds into the gallery it names, or into ``name``, which is made where it is not there.

    ``master``: the key it was encrypted with. Raises InputError for a file that is not an export, or not whole;
    then some of what came before the damage is enrolled. Times of expiry are kept, times of creation are the import's.
    """
    lines = _lines(path, master)
    head = next(lines)
    gallery = name or str(head["gallery"])
    store.create(gallery, _read_space(head["space"]), head.get("retention_seconds"), actor)
    if head.get("moving_to"):
        store.begin_migration(gallery, _read_space(head["moving_to"]), actor)
    done = Imported()
    batch: list[Enrolment] = []
    for line in lines:
        done.subjects += 1
        try:
            batch += _missing(store, gallery, line, done)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: line {done.subjects + 1}: is not what pkd-gallery export writes.") from None
        advance(1)
        if len(batch) >= BATCH:
            _enrol(store, gallery, batch, actor, done)
            batch = []
    _enrol(store, gallery, batch, actor, done)
    return gallery, done


def count_subjects(path: Path) -> int:
    """Count the subjects that an export seems to hold."""
    with _opened(path) as file:
        return max(0, sum(1 for _ in file) - 2)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. Give a file that pkd-gallery export wrote.") from None


def _read_space(written: Json) -> Space:
    return Space(str(written["id"]), int(written["dim"]))


def _missing(store: GalleryStore, gallery: str, line: Json, done: Imported) -> list[Enrolment]:
    """Make enrolments of what is not there yet of a subject, one for each time of expiry."""
    subject = str(line["subject"])
    there = fingerprints(store, gallery, subject)
    by_expiry: dict[float | None, list[NewTemplate]] = defaultdict(list)
    for template in line["templates"]:
        if template["encoding"] != "b64_f16":
            raise ValueError
        vector = np.frombuffer(base64.b64decode(template["embedding"]), "<f2").astype(np.float32)
        coming = NewTemplate(template["encoder"], template["space"], vector)
        if fingerprint(coming) in there:
            done.there_already += 1
            continue
        expires = template["expires"] and datetime.fromisoformat(template["expires"].replace("Z", "+00:00")).timestamp()
        if expires and expires <= time.time():
            done.expired += 1
            continue
        by_expiry[expires].append(coming)
    consent = Consent(**line["consent"]) if line["consent"] else None
    return [
        Enrolment(subject, templates, line["attributes"], consent, expires) for expires, templates in by_expiry.items()
    ]


def _enrol(store: GalleryStore, gallery: str, batch: list[Enrolment], actor: str, done: Imported) -> None:
    if not batch:
        return
    for enrolment, answer in zip(batch, store.enrol(gallery, batch, actor), strict=True):
        if not isinstance(answer, Enrolled):
            raise InputError(f"subject {enrolment.subject}: {answer}")
        done.templates += len(answer.templates)


def _line(content: Json, key: SubjectKey | None, number: int) -> bytes:
    plain = orjson.dumps(content)
    return (base64.b64encode(key.encrypt(plain, str(number), FORMAT)) if key else plain) + b"\n"


def _lines(path: Path, master: MasterKey) -> Iterator[Json]:
    """Yield the head, then every subject. Raises InputError where the file is not whole."""
    with _opened(path) as file:
        number = 0
        try:
            head = json.loads(file.readline())
            if head["format"] != FORMAT:
                raise InputError(f"{path}: has format {head['format']}, this pkd knows {FORMAT}.")
            yield head
            key = None
            if "key" in head:
                if head["master"] != master.id:
                    raise InputError(
                        f"{path}: is encrypted under master key {head['master']}, given is {master.id}. "
                        "Pass the file of that one with --sealed-with."
                    )
                opened = master.gallery(f"export of {head['gallery']}", base64.b64decode(head["key"]))
                key = SubjectKey("export", head["gallery"], opened.key)
            for number, raw in enumerate(file, 1):
                line = json.loads(key.decrypt(base64.b64decode(raw), str(number), FORMAT) if key else raw)
                if "end" in line:
                    if line["subjects"] != number - 1 or file.readline():
                        raise InputError(f"{path}: line {number + 1}: the end is not where it should be.")
                    return
                yield line
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: line {number + 1}: is not what pkd-gallery export writes.") from None
        raise InputError(f"{path}: is cut off after {number:,} subjects. Export again and import that.")
