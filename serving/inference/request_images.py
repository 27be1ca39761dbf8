"""Images out of requests: multipart, a raw body or JSON → undecoded images and options. Never a path, never a URL."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, RootModel, Tag, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from pkd.serving.core.problems import Problem
from pkd.serving.core.schemas import MAX_IMAGES, MAX_VALUES, EmbedBody, EmbedOptions
from pkd.toolkit.core.errors import BadImage, ImageTooLarge
from pkd.toolkit.images.codec import READERS, Rgb, decode_rgb

Undecoded = bytes | str
"""A file's bytes, or the same as base64. Both are decoded by a worker, not by the event loop."""
Sent = TypeVar("Sent", bound=BaseModel)

FOREIGN = {b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
JSON = "application/json"
TAKES = "JPEG, PNG, WebP and BMP images are taken."
NO_SUBJECT = "an image (image_b64) or an embedding (embedding, encoder) is taken here, not an enrolled subject"


@dataclass(frozen=True)
class EmbedRequest:
    """What /v1/embed was asked."""

    images: Sequence[Undecoded]
    options: EmbedOptions


async def read_embed(request: Request) -> EmbedRequest:
    """Read any of the three forms of /v1/embed. Raises Problem."""
    kind = media_type(request)
    if kind == JSON:
        body = parse(EmbedBody, await request.body())
        fields = body.model_dump(exclude={"inputs"}, exclude_unset=True)
        return EmbedRequest([item.image_b64 for item in body.inputs], with_query(request, EmbedOptions, fields))
    images, fields = await read_files(request, kind)
    if not fields:
        return EmbedRequest(images, _embed_options(request.scope["query_string"]))
    return EmbedRequest(images, with_query(request, EmbedOptions, fields))


@lru_cache(64)
def _embed_options(query: bytes) -> EmbedOptions:
    """The same few query strings come again and again."""
    return with_query(Request({"type": "http", "query_string": query}), EmbedOptions, {})


async def read_files(request: Request, kind: str) -> tuple[Sequence[bytes], dict[str, Any]]:
    """Images of a multipart or a raw body, and the fields beside them. ``kind``: its media type. Raises Problem."""
    if kind == "multipart/form-data":
        return await _read_form(request)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return [await request.body()], {}
    raise Problem(
        "unsupported-media",
        f"content type {kind or 'missing'!r}. Send multipart/form-data with a field `image`, a raw image/* body, "
        "or application/json with the image as base64 in `image_b64`.",
    )


def with_query(request: Request, model: type[Sent], fields: dict[str, Any]) -> Sent:
    """Options in ``fields`` and in the query string → ``model``. Raises Problem where one is given twice."""
    for name, value in request.query_params.multi_items():
        if name in fields:
            raise Problem("invalid-request", f"option {name!r} is given twice. Give it once.")
        fields[name] = value
    return validated(model, fields)


def decode(image: Undecoded) -> Rgb:
    """An image of a request → uint8 H×W×3 RGB, upright. Raises BadImage, ImageTooLarge or a 415 Problem."""
    if isinstance(image, str):
        try:
            image = base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            raise BadImage("image_b64 is not base64.") from None
    foreign = "HEIC or AVIF" if image[4:8] == b"ftyp" else FOREIGN.get(image[:4])
    if foreign:
        raise Problem("unsupported-media", f"this is a {foreign} file. {TAKES}")
    try:
        return decode_rgb(image)
    except ImageTooLarge:
        raise
    except BadImage as error:
        raise _damaged(image) or error from None


def media_type(request: Request) -> str:
    """The content type without its parameters, in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def require_json(request: Request) -> None:
    """Raise an unsupported-media Problem for any other body."""
    if (kind := media_type(request)) != JSON:
        raise Problem("unsupported-media", f"content type {kind or 'missing'!r}. Send {JSON}.")


def parse(model: type[Sent], body: bytes, most: int = MAX_VALUES) -> Sent:
    """JSON → ``model``. Raises an invalid-request Problem that names the fields at fault."""
    # 8 MB of base64 parse in milliseconds, 8 MB of tiny values in seconds that stall every other request.
    if sum(map(body.count, (b",", b"[", b"{"))) > most:
        raise Problem("invalid-request", f"the JSON holds more than {most:,} values.", limit=most)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_context=False, include_input=False), model) from None


def validated(model: type[Sent], fields: Mapping[str, Any]) -> Sent:
    """Query parameters or form fields → ``model``. Raises an invalid-request Problem."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_context=False, include_input=False), model) from None


def invalid(errors: Sequence[Any], model: type[BaseModel] | None = None) -> Problem:
    """Field and reason only: what was sent there may be an image or an embedding, and is not sent back.

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
    return Problem("invalid-request", f"{first}.", errors=found)


class _InMemory(MultiPartParser):
    """Starlette would write parts over 1 MB to temporary files; no image ever touches a disk here."""

    spool_max_size = 2**40

    _ended = False

    def on_end(self) -> None:
        self._ended = True

    async def parse(self) -> FormData:
        form = await super().parse()
        if not self._ended:  # a part that has no end would be left out, and nothing said
            for file in self._files_to_close_on_error:
                file.close()
            raise MultiPartException("it is cut off before its last boundary. Send the whole body.")
        return form


async def _read_form(request: Request) -> tuple[list[bytes], dict[str, Any]]:
    parser = _InMemory(request.headers, request.stream(), max_files=MAX_IMAGES, max_fields=20, max_part_size=8000)
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError) as error:
        reason = getattr(error, "message", str(error))
        raise Problem("invalid-request", f"multipart body: {reason}") from None
    try:
        return await _sort(form)
    finally:
        await form.close()


async def _sort(form: FormData) -> tuple[list[bytes], dict[str, Any]]:
    """File fields are images, text fields are options."""
    images: list[bytes] = []
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != "image":
                raise Problem("invalid-request", f"file field {name!r}. Name each file field `image`.")
            images.append(await value.read())
        elif name in fields:
            raise Problem("invalid-request", f"option {name!r} is given twice. Give it once.")
        else:
            fields[name] = value
    if not images:
        raise Problem("invalid-request", "no file field `image` in the multipart body.")
    return images, fields


def _damaged(image: bytes) -> BadImage | None:
    """Of a file that begins as one that is taken."""
    reader = next((one for magic, one in READERS.items() if image.startswith(magic)), None)
    if reader is None or (image.startswith(b"RIFF") and image[8:12] != b"WEBP"):
        return None
    kind = str(reader.format).replace("WEBP", "WebP")
    return BadImage(f"the {kind} image is cut off or damaged ({len(image):,} bytes). Send the whole file.")


def _place(kind: Any, place: Sequence[str | int]) -> list[str]:
    """Where in the JSON a value of ``kind`` is at fault: ``place`` without pydantic's names for members of unions."""
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
