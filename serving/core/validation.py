"""Validate what clients send, and say which field is at fault without repeating what was in it."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, RootModel, Tag, ValidationError

from pkd.serving.core.errors import InvalidRequest
from pkd.serving.core.schemas import MAX_VALUES

Sent = TypeVar("Sent", bound=BaseModel)
MAX_LISTED = 100
"""Most faults of one request that are looked at one by one."""
NO_SUBJECT = "an image (image_b64) or an embedding (embedding, encoder) is taken here, not an enrolled subject"


def parse(model: type[Sent], body: bytes, most: int = MAX_VALUES) -> Sent:
    """Read JSON as ``model``. Raises InvalidRequest that names the fields at fault."""
    # 8 MB of base64 parse in milliseconds, 8 MB of tiny values in seconds that stall every other request.
    if sum(map(body.count, (b",", b"[", b"{"))) > most:
        raise InvalidRequest(f"the JSON holds more than {most:,} values.", details={"limit": most})
    try:
        return model.model_validate_json(body.removeprefix(BOM_UTF8))  # RFC 8259, section 8.1, lets readers ignore it
    except ValidationError as error:
        raise _invalid(error, model) from None


def validated(model: type[Sent], fields: Mapping[str, Any]) -> Sent:
    """Read query parameters or form fields as ``model``. Raises InvalidRequest that names the fields at fault."""
    try:
        return model.model_validate(fields, strict=False)
    except ValidationError as error:
        raise _invalid(error, model) from None


def _invalid(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """Make the error of what pydantic refused.

    Its list of many faults takes seconds to write: then they are counted.
    """
    if (count := error.error_count()) > MAX_LISTED:
        return InvalidRequest(f"{count:,} fields are at fault. Compare the request with docs/openapi.json.")
    return invalid(error.errors(include_url=False, include_context=False, include_input=False), model)


def invalid(errors: Sequence[Any], model: type[BaseModel] | None = None) -> InvalidRequest:
    """Make the error of fields at fault: what was sent there may be an image or an embedding, and is not sent back.

    ``errors``: as pydantic lists them. ``model``: that was validated.
    """
    found = [
        {
            "field": ".".join(_place(model, item["loc"])),
            # Of the kinds of input, a subject alone is not taken everywhere.
            "message": NO_SUBJECT if item.get("type") == "union_tag_invalid" else item["msg"],
        }
        for item in errors[:20]
    ]
    first = f"{found[0]['field']}: {found[0]['message']}".removeprefix(": ")
    return InvalidRequest(f"{first}.", details={"errors": found})


def _place(kind: Any, place: Sequence[str | int]) -> list[str]:
    """Name where in the JSON a value of ``kind`` is at fault: ``place`` without pydantic's names of union members."""
    if not place:
        return []
    first, rest = str(place[0]), place[1:]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _place(inner[0], place)
    if origin in (Union, UnionType):
        members = [one for one in inner if one is not NoneType]
        if len(members) == 1:
            return _place(members[0], place)
        return _place(next((one for one in members if Tag(first) in get_args(one)), None), rest)
    if origin is list:
        return [first, *_place(inner[0], rest)]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if issubclass(kind, RootModel):
            return _place(kind.model_fields["root"].annotation, place)
        field = kind.model_fields.get(first)
        return [first, *_place(field and field.annotation, rest)]
    return [*map(str, place)]
