"""Define the parameters that several routes take, and refuse those that a route does not have."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header, Path, Query, Request
from fastapi.routing import APIRoute

from pkd.serving.core.gallery_schemas import Key
from pkd.serving.core.schemas import Name
from pkd.serving.core.validation import invalid

GalleryName = Annotated[Name, Path(description="Name of the gallery")]
SubjectId = Annotated[Name, Path(description="Id of the subject")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Length of the page")]
After = Annotated[str, Query(max_length=128, description="The `next` of the page before")]
IdempotencyKey = Annotated[Key | None, Header(description="Sent again with the same content, nothing is done twice")]


def queries_of(route: APIRoute) -> list[str]:
    """Name a route's query parameters.

    Those that FastAPI reads for it, and those that it documents and reads itself.
    """
    shown = (route.openapi_extra or {}).get("parameters", ())
    read = {field.alias for field in route.dependant.query_params}
    return sorted(read | {one["name"] for one in shown if one["in"] == "query"})


async def known_query(request: Request) -> None:
    """Raise InvalidRequest for query parameters that the route does not have; a dependency of routers.

    A misspelt option would have no effect, and nobody would know.
    """
    if not request.scope["query_string"]:
        return
    taken = queries_of(request.scope["route"])
    message = f"no such query parameter; this route takes {', '.join(taken) or 'none'}"
    unknown = [{"loc": (name,), "msg": message} for name in request.query_params if name not in taken]
    if unknown:
        raise invalid(unknown)
