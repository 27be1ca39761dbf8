"""What is said of a body that is broken: which field, which image, and what to do."""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest
from PIL import Image

from pkd.serving.core.gallery_schemas import EnrolBody, IdentifyBody
from pkd.serving.core.schemas import EmbedBody, VerifyBody
from pkd.serving.core.transfer_schemas import BulkItem
from pkd.serving.core.validation import NO_SUBJECT, parse
from pkd.serving.inference.decoding import decode
from pkd.serving.matching.transfer import ExportLine
from pkd.toolkit.core.errors import BadImage, ImageTooLarge, PkdError
from tests.support import serving_bundles as made

CROP = made.crops(1, seed=3)[0]
IMAGE = '{"image_b64": "AAAA"}'


def written(format: str) -> Any:
    buffer = io.BytesIO()
    Image.fromarray(CROP).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WebP", "BMP"])
@pytest.mark.parametrize("kept", [12, 20, 30, 60, 600])
def test_a_file_that_was_cut_off_is_called_what_it_is(format: str, kept: Any) -> None:
    with pytest.raises(BadImage) as raised:
        decode(written(format.upper())[:kept])
    assert str(raised.value) == f"the {format} image is cut off or damaged ({kept} bytes). Send the whole file."


def test_an_image_of_too_many_pixels_is_not_called_damaged() -> None:
    header = bytearray(written("BMP")[:60])
    header[18:26] = struct.pack("<ii", 10_000, 10_000)
    with pytest.raises(ImageTooLarge):
        decode(bytes(header))


@pytest.mark.parametrize("data", [b"", b"text", b"RIFF\x10\0\0\0WAVEfmt ", b"RIFF", b"\x89PN"])
def test_what_is_no_image_is_not_called_one(data: Any) -> None:
    with pytest.raises(BadImage, match=r"^(empty image|not a JPEG)"):
        decode(data)


@pytest.mark.parametrize(
    ("model", "body", "fields"),
    [
        (VerifyBody, f'{{"a": {{"embedding": {{}}, "encoder": "x"}}, "b": {IMAGE}}}', ["a.embedding", "a.embedding"]),
        (VerifyBody, f'{{"a": {{"embedding": ["x"], "encoder": ""}}, "b": {IMAGE}}}', ["a.embedding.0", "a.embedding"]),
        (VerifyBody, f'{{"a": {{"embedding": "AA", "space": 1}}, "b": {IMAGE}}}', ["a.encoder", "a.space"]),
        (VerifyBody, f'{{"a": {{"image_b64": "AA", "faces": "all"}}, "b": {IMAGE}}}', ["a.faces"]),
        (VerifyBody, f'{{"a": {IMAGE}, "b": {{"subject": "s/t"}}}}', ["b.gallery", "b.subject"]),
        (VerifyBody, f'{{"a": 1, "b": {IMAGE}, "policy": {{"threshold": 2}}}}', ["a", "policy.threshold"]),
        (VerifyBody, "[]", [""]),
        (EmbedBody, '{"inputs": [{}, {"image_b64": 1}]}', ["inputs.0.image_b64", "inputs.1.image_b64"]),
        (EnrolBody, f'{{"inputs": [{IMAGE}, {{"embedding": "AA"}}]}}', ["inputs.1.encoder"]),
        (EnrolBody, f'{{"inputs": [{IMAGE}], "attributes": {{"image": 1}}}}', ["attributes.image"]),
        (EnrolBody, f'{{"inputs": [{IMAGE}], "consent": {{"image": 1}}}}', ["consent.basis", "consent.image"]),
        (BulkItem, f'{{"subject": 1, "inputs": [{IMAGE}, {{"image_b64": 1}}]}}', ["inputs.1.image_b64", "subject"]),
        (IdentifyBody, '{"query": {"embedding": "AA", "encoder": "x", "image": 1}}', ["query.image"]),
        (ExportLine, '{"subject": "s/t", "templates": [{"embedding": 1}]}', [
            "subject", "templates.0.encoder", "templates.0.space", "templates.0.embedding", "templates.0.encoding",
        ]),
        (ExportLine, '{"end": true, "subjects": "x"}', ["subjects"]),
    ],
)  # fmt: skip
def test_a_field_is_named_as_it_was_sent(model: Any, body: Any, fields: Any) -> None:
    """Without pydantic's names for the kinds of a side and of an embedding."""
    with pytest.raises(PkdError) as raised:
        parse(model, body.encode())
    assert sorted(one["field"] for one in raised.value.details["errors"]) == sorted(fields)


def test_a_subject_where_none_is_taken() -> None:
    for model, body, field in (
        (IdentifyBody, '{"query": {"gallery": "g", "subject": "ann"}}', "query"),
        (EnrolBody, f'{{"inputs": [{IMAGE}, {{"subject": "ann"}}]}}', "inputs.1"),
    ):
        with pytest.raises(PkdError) as raised:
            parse(model, body.encode())
        assert raised.value.details["errors"] == [{"field": field, "message": NO_SUBJECT}]
        assert str(raised.value) == f"{field}: {NO_SUBJECT}."
