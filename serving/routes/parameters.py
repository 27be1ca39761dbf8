"""Parameters that several routes take."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header, Path, Query

from pkd.serving.galleries.schemas import Key
from pkd.serving.schemas import Name

GalleryName = Annotated[Name, Path(description="Name of the gallery")]
SubjectId = Annotated[Name, Path(description="Id of the subject")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Length of the page")]
After = Annotated[str, Query(max_length=128, description="The `next` of the page before")]
IdempotencyKey = Annotated[Key | None, Header(description="Sent again with the same content, nothing is done twice")]
