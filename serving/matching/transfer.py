"""Transfer: a gallery as NDJSON, out of one server and into another. Header, a line per subject, and a last line that
proves that nothing is missing.

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
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Discriminator, RootModel, Tag

from pkd.serving.core.embedding_codec import decode
from pkd.serving.core.gallery_schemas import ExportedSubject, ExportedTemplate, ExportEnd, ExportHeader
from pkd.serving.core.problems import Problem, from_error
from pkd.serving.core.responses import line
from pkd.serving.core.schemas import MANY_VALUES
from pkd.serving.galleries.description import of_gallery, of_subject
from pkd.serving.galleries.merge import print_of, prints
from pkd.serving.galleries.store import Enrolment, Gallery, NewTemplate, Subject
from pkd.serving.inference.request_images import parse
from pkd.serving.matching.admission import admit
from pkd.serving.matching.bulk import Answer, Item
from pkd.serving.matching.enrolment import consent_of
from pkd.toolkit.core.errors import PkdError

if TYPE_CHECKING:
    from pkd.serving.matching.service import Service

PIECE = 64
"""Subjects that are read and sent together."""


def _kind(sent: object) -> str:
    keys = sent if isinstance(sent, dict) else {}
    return "header" if "format" in keys else "end" if "end" in keys else "subject"


class Line(
    RootModel[
        Annotated[
            Annotated[ExportHeader, Tag("header")]
            | Annotated[ExportedSubject, Tag("subject")]
            | Annotated[ExportEnd, Tag("end")],
            Discriminator(_kind),
        ]
    ]
):
    """Any line of an export, told apart by its fields."""


async def export(service: Service, gallery: Gallery) -> AsyncGenerator[bytes, None]:
    """The lines of an export. The store is read in one thread, for its cursor may belong to that thread."""
    loop = asyncio.get_running_loop()
    reader = ThreadPoolExecutor(1, thread_name_prefix="pkd-export")
    subjects: Iterator[Subject] = iter(())
    count = 0
    try:
        yield line(of_gallery(gallery))
        subjects = await loop.run_in_executor(reader, lambda: iter(service.store.export(gallery.name)))
        while piece := await loop.run_in_executor(
            reader, lambda: [line(of_subject(one)) for one in islice(subjects, PIECE)]
        ):
            count += len(piece)
            yield b"".join(piece)
        yield line({"end": True, "subjects": count})
    except Problem as problem:  # too late for a status: no last line, and the reason in its place
        yield line({"problem": problem.body()})
    finally:
        close = getattr(subjects, "close", None)
        if close:
            reader.submit(close)
        reader.shutdown(wait=False)


class Import:
    """One import: lines of an export → enrolments of what is not there, under keys made of their content.

    So it can be sent again, and twice at the same time.
    """

    def __init__(self, service: Service) -> None:
        self._service, self._encoders = service, service.encoders
        self._subjects = 0
        self._ended = False

    async def read(self, gallery: Gallery, items: Sequence[Item]) -> Sequence[Answer]:
        """Lines; only subjects and faults are answered. Nothing is stored of what a subject has already."""
        answers = [answer for item in items if (answer := self._read(gallery, item))]
        return await self._service.stored(self._lacking, gallery.name, answers)

    def _lacking(self, gallery: str, answers: Sequence[Answer]) -> Sequence[Answer]:
        lacking = []
        for answer in answers:
            there = prints(self._service.store, gallery, answer.subject) if answer.subject and answer.enrolments else ()
            enrolments = [
                replace(one, templates=templates)
                for one in answer.enrolments
                if (templates := [template for template in one.templates if print_of(template) not in there])
            ]
            lacking.append(replace(answer, enrolments=enrolments))
        return lacking

    def _read(self, gallery: Gallery, item: Item) -> Answer | None:
        answer = Answer(item.number)
        try:
            if isinstance(item.content, Problem):
                return answer.refused(item.content)
            self._subjects += 1  # until it turns out to be none; what cannot be read most likely is one
            sent = parse(Line, item.content, MANY_VALUES).root
            if not isinstance(sent, ExportedSubject):
                self._subjects -= 1
            if isinstance(sent, ExportHeader):
                return None
            if isinstance(sent, ExportEnd):
                self._ended = True
                return answer.refused(self._fault(sent.subjects)) if sent.subjects != self._subjects else None
            answer = Answer(item.number, sent.subject)
            digest = hashlib.sha256(item.content.strip()).hexdigest()
            return Answer(item.number, sent.subject, None, self._enrolments(gallery, sent, digest))
        except Problem as problem:
            return answer.refused(problem)
        except PkdError as error:
            return answer.refused(from_error(error))

    def end(self) -> bytes:
        """The last line of the answer: empty if the body ended as an export does."""
        return b"" if self._ended else line({"line": None, "problem": self._fault(None).body()})

    def _fault(self, stated: int | None) -> Problem:
        said = "has no last line" if stated is None else f"states {stated:,} subjects"
        return Problem(
            "invalid-request",
            f"the import {said} and {self._subjects:,} subjects were read: it was cut off. Send the whole export "
            "again; what was imported is not imported twice.",
        )

    def _enrolments(self, gallery: Gallery, sent: ExportedSubject, digest: str) -> list[Enrolment]:
        """One for each time at which templates expire; none of what is past it."""
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
        space = admit(self._encoders, gallery, one.encoder, one.space)
        dim = next(known.dim for known in gallery.spaces if known.id == space)
        return NewTemplate(one.encoder, space, decode(one.embedding, one.encoding, dim).astype(np.float32))
