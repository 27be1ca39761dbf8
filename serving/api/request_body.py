"""Read images and options from request bodies: multipart, a raw image or JSON. Never a path, never a URL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from pkd.serving.core.errors import InvalidRequest, UnsupportedMedia
from pkd.serving.core.schemas import MAX_IMAGES, EmbedBody, EmbedOptions
from pkd.serving.core.validation import Sent, parse, validated
from pkd.serving.inference.decoding import Undecoded

JSON, FORM = "application/json", "multipart/form-data"


async def read_embed(request: Request) -> tuple[Sequence[Undecoded], EmbedOptions]:
    """Read images and options from any of the three forms of /v1/embed. Raises ServingError."""
    kind = media_type(request)
    if kind == JSON:
        body = parse(EmbedBody, await request.body())
        fields = body.model_dump(exclude={"inputs"}, exclude_unset=True)
        return [item.image_b64 for item in body.inputs], with_query(request, EmbedOptions, fields)
    images, fields = await read_files(request, kind)
    if not fields:
        return images, _embed_options(request.scope["query_string"])
    return images, with_query(request, EmbedOptions, fields)


@lru_cache(64)
def _embed_options(query: bytes) -> EmbedOptions:
    """Read options of a query string: the same few come again and again."""
    return with_query(Request({"type": "http", "query_string": query}), EmbedOptions, {})


async def read_files(request: Request, kind: str) -> tuple[Sequence[bytes], dict[str, Any]]:
    """Read images of a multipart or a raw body, and the fields beside them. ``kind``: its media type.

    Raises InvalidRequest or UnsupportedMedia.
    """
    if kind == FORM:
        files, fields = await _read_form(request, ("image",))
        return [data for _, data in files], fields
    if kind.startswith("image/") or kind == "application/octet-stream":
        return [await request.body()], {}
    raise UnsupportedMedia(
        f"content type {kind or 'missing'!r}. Send multipart/form-data with a field `image`, a raw image/* body, "
        "or application/json with the image as base64 in `image_b64`."
    )


async def read_pair(request: Request) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Read the two photographs of a form, fields ``a`` and ``b``, and the fields beside them. Raises InvalidRequest."""
    files, fields = await _read_form(request, ("a", "b"))
    if [name for name, _ in files] not in (["a", "b"], ["b", "a"]):
        raise InvalidRequest("a form for two photographs has one file field `a`, the query, and one `b`.")
    return dict(files), fields


def with_query(request: Request, model: type[Sent], fields: dict[str, Any]) -> Sent:
    """Read options in ``fields`` and in the query string as ``model``. Raises InvalidRequest: one is given twice."""
    for name, value in request.query_params.multi_items():
        if name in fields:
            raise InvalidRequest(f"option {name!r} is given twice. Give it once.")
        fields[name] = value
    return validated(model, fields)


def media_type(request: Request) -> str:
    """Read the content type without its parameters, in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def require_json(request: Request) -> None:
    """Raise UnsupportedMedia for any other body."""
    if (kind := media_type(request)) != JSON:
        raise UnsupportedMedia(f"content type {kind or 'missing'!r}. Send {JSON}.")


class _InMemory(MultiPartParser):
    """Parse a form in memory.

    Starlette would write parts over 1 MB to temporary files, and no image touches a disk here.
    """

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


async def _read_form(request: Request, names: Sequence[str]) -> tuple[list[tuple[str, bytes]], dict[str, Any]]:
    parser = _InMemory(request.headers, request.stream(), max_files=MAX_IMAGES, max_fields=20, max_part_size=8000)
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError) as error:
        reason = getattr(error, "message", str(error))
        raise InvalidRequest(f"multipart body: {reason}") from None
    try:
        return await _sort(form, names)
    finally:
        await form.close()


async def _sort(form: FormData, names: Sequence[str]) -> tuple[list[tuple[str, bytes]], dict[str, Any]]:
    """Sort a form: file fields, which are called ``names``, are images, text fields are options."""
    images: list[tuple[str, bytes]] = []
    fields: dict[str, Any] = {}
    called = " or ".join(f"`{name}`" for name in names)
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name not in names:
                raise InvalidRequest(f"file field {name!r}. Name each file field {called}.")
            images.append((name, await value.read()))
        elif name in fields:
            raise InvalidRequest(f"option {name!r} is given twice. Give it once.")
        else:
            fields[name] = value
    if not images:
        raise InvalidRequest(f"no file field {called} in the multipart body.")
    return images, fields
