"""Export a gallery and import it into another server: a header, a line per subject, and a last line that proves that
nothing is missing.

Vectors leave here as plain numbers: an export is biometric data, and whoever may make one may read everyone.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Annotated

import numpy as np
from pydantic import Discriminator, RootModel, Tag

from pkd.serving.core.embedding_codec import decode
from pkd.serving.core.errors import InvalidRequest
from pkd.serving.core.schemas import MANY_VALUES
from pkd.serving.core.transfer_schemas import ExportedSubject, ExportedTemplate, ExportEnd, ExportHeader
from pkd.serving.core.validation import parse
from pkd.serving.galleries.description import Json, of_gallery, of_subject
from pkd.serving.galleries.store import Enrolment, Gallery, NewTemplate, Subject
from pkd.serving.galleries.templates import fingerprint, fingerprints
from pkd.serving.matching.admission import check_encoder_allowed
from pkd.serving.matching.bulk import BulkLine, ReadLine
from pkd.serving.matching.enrolment import consent_of
from pkd.serving.matching.service import Service
from pkd.toolkit.core.errors import PkdError

PIECE = 64
"""Subjects that are read and sent together."""


def _kind(sent: object) -> str:
    keys = sent if isinstance(sent, dict) else {}
    return "header" if "format" in keys else "end" if "end" in keys else "subject"


class ExportLine(
    RootModel[
        Annotated[
            Annotated[ExportHeader, Tag("header")]
            | Annotated[ExportedSubject, Tag("subject")]
            | Annotated[ExportEnd, Tag("end")],
            Discriminator(_kind),
        ]
    ]
):
    """Hold any line of an export, told apart by its fields."""


async def export(service: Service, gallery: Gallery) -> AsyncGenerator[list[Json], None]:
    """Give the lines of an export, some at a time. The store is read in one thread, for its cursor may belong to it.

    Raises ServingError where the store fails, before the last line: without it the export was cut off.
    """
    loop = asyncio.get_running_loop()
    reader = ThreadPoolExecutor(1, thread_name_prefix="pkd-export")
    subjects: Iterator[Subject] = iter(())
    count = 0
    try:
        yield [of_gallery(gallery)]
        subjects = await loop.run_in_executor(reader, lambda: iter(service.store.export(gallery.name)))
        while piece := await loop.run_in_executor(reader, lambda: [of_subject(one) for one in islice(subjects, PIECE)]):
            count += len(piece)
            yield piece
        yield [{"end": True, "subjects": count}]
    finally:
        close = getattr(subjects, "close", None)
        if close:
            reader.submit(close)
        reader.shutdown(wait=False)


class Import:
    """Turn the lines of one export into enrolments of what is not there, under keys made of their content.

    So an export can be sent again, and twice at the same time.
    """

    def __init__(self, service: Service) -> None:
        self._service, self._encoders = service, service.encoders
        self._subjects = 0
        self._ended = False

    async def read(self, gallery: Gallery, lines: Sequence[BulkLine]) -> Sequence[ReadLine]:
        """Read lines; only subjects and faults have results. Nothing is stored of what a subject has already."""
        read = [one for line in lines if (one := self._read(gallery, line))]
        return await self._service.stored(self._lacking, gallery.name, read)

    def _lacking(self, gallery: str, lines: Sequence[ReadLine]) -> Sequence[ReadLine]:
        lacking = []
        for line in lines:
            there = fingerprints(self._service.store, gallery, line.subject) if line.subject and line.enrolments else ()
            enrolments = [
                replace(one, templates=templates)
                for one in line.enrolments
                if (templates := [template for template in one.templates if fingerprint(template) not in there])
            ]
            lacking.append(replace(line, enrolments=enrolments))
        return lacking

    def _read(self, gallery: Gallery, line: BulkLine) -> ReadLine | None:
        read = ReadLine(line.number)
        try:
            if isinstance(line.content, PkdError):
                return read.refused(line.content)
            self._subjects += 1  # until it turns out to be none; what cannot be read most likely is one
            sent = parse(ExportLine, line.content, MANY_VALUES).root
            if not isinstance(sent, ExportedSubject):
                self._subjects -= 1
            if isinstance(sent, ExportHeader):
                return None
            if isinstance(sent, ExportEnd):
                self._ended = True
                return read.refused(self._fault(sent.subjects)) if sent.subjects != self._subjects else None
            read = ReadLine(line.number, sent.subject)
            digest = hashlib.sha256(line.content.strip()).hexdigest()
            asked = self._enrolments(gallery, sent, digest)
            return ReadLine(line.number, sent.subject, None, asked, accept_doubts=True)  # they were examined before
        except PkdError as error:
            return read.refused(error)

    def end(self) -> InvalidRequest | None:
        """Say what is wrong with the end of the body; None if it ended as an export does."""
        return None if self._ended else self._fault(None)

    def _fault(self, stated: int | None) -> InvalidRequest:
        said = "has no last line" if stated is None else f"states {stated:,} subjects"
        return InvalidRequest(
            f"the import {said} and {self._subjects:,} subjects were read: it was cut off. Send the whole export "
            "again; what was imported is not imported twice."
        )

    def _enrolments(self, gallery: Gallery, sent: ExportedSubject, digest: str) -> list[Enrolment]:
        """Make one enrolment for each time at which templates expire; none of what is past it."""
        groups: dict[float | None, list[NewTemplate]] = defaultdict(list)
        now = time.time()
        for one in sent.templates:
            expires = one.expires.timestamp() if one.expires else None
            if expires is None or expires > now:
                groups[expires].append(self._template(gallery, one))
        return [
            Enrolment(
                subject=sent.subject,
                templates=templates,
                attributes=sent.attributes,
                consent=consent_of(sent.consent),
                expires=expires,
                key=f"import:{digest}:{expires}",
                digest=digest,
            )
            for expires, templates in groups.items()
        ]

    def _template(self, gallery: Gallery, one: ExportedTemplate) -> NewTemplate:
        space = check_encoder_allowed(self._encoders, gallery, one.encoder, one.space)
        dim = next(known.dim for known in gallery.spaces if known.id == space)
        return NewTemplate(one.encoder, space, decode(one.embedding, one.encoding, dim).astype(np.float32))
