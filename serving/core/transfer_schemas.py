"""Define the JSON of bulk enrolment, export and import: lines of them, in requests and answers."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pkd.serving.core.embedding_codec import Encoding
from pkd.serving.core.gallery_schemas import Attributes, ConsentBody, DoubtAnswer, EncoderId, EnrolBody, Key, Moment
from pkd.serving.core.schemas import Answer, Name, Sent, SpaceAnswer


def _no_number(sent: Any) -> Any:
    if not isinstance(sent, bool):
        raise ValueError("must be true")
    return sent


class BulkItem(EnrolBody):
    """Hold one line of a bulk enrolment."""

    subject: Name
    key: Key | None = Field(None, description="Idempotency key of this item; sent again, it is answered as before")


class BulkAnswer(Answer):
    """Answer one line of a bulk enrolment: durable by the time it is sent, or refused."""

    line: int | None = Field(description="Number of the line of the request, from 1; null: about the body as a whole")
    subject: str | None = None
    key: str | None = None
    templates: list[str] | None = Field(default=None, description="Ids")
    sequence: int | None = None
    replayed: bool | None = None
    doubts: list[DoubtAnswer] | None = Field(
        default=None, description="Reasons why it is flagged, by the gallery's policy"
    )
    problem: dict[str, Any] | None = Field(
        default=None, description="Reason why this item was refused; the others go on"
    )


class ExportHeader(Sent):
    """Hold the first line of an export."""

    format: Literal["pkd-gallery-1"]
    gallery: str
    space: SpaceAnswer
    moving_to: SpaceAnswer | None = None
    retention_seconds: float | None = Field(None, description="Retention of the gallery; absent where it keeps them")
    subjects: int


class ExportedTemplate(Sent):
    """Hold a template of an export."""

    id: str = ""
    encoder: EncoderId
    space: EncoderId
    created: datetime | None = None
    expires: Moment | None = None
    embedding: str
    encoding: Encoding


class ExportedSubject(Sent):
    """Hold one subject of an export, a line."""

    subject: Name
    attributes: Attributes = Field(default={})
    consent: ConsentBody | None = None
    templates: list[ExportedTemplate] = Field(min_length=1, max_length=10_000)


class ExportEnd(Sent):
    """Hold the last line of an export: without it the file was cut off."""

    end: Annotated[Literal[True], BeforeValidator(_no_number)]
    subjects: int
