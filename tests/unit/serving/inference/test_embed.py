"""POST /v1/embed against a running server: every form, option and refusal."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from PIL import Image

from pkd.serving.core.embedding_codec import decode
from pkd.serving.core.options import Settings
from pkd.serving.core.schemas import EmbedAnswer
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.service import Service
from pkd.toolkit.encoders.detector import Face
from pkd.toolkit.images.alignment import TEMPLATE
from pkd.toolkit.images.quality import measure_face, sharpness
from tests.support import serving_bundles as made

CROPS = made.crops(3, seed=3)
ALIGNED = {"aligned": "true"}


class Squares:
    """A detector without weights: every bright square is a face, its landmarks where the template has them."""

    digest = "0" * 64

    def detect(self, image: Any) -> Any:
        _, _, stats, _ = cv2.connectedComponentsWithStats((image.max(axis=2) > 32).astype(np.uint8))
        return [
            Face(np.array([x, y, x + w, y + h], np.float32), (TEMPLATE * (w / 112) + (x, y)).astype(np.float32), 0.9)
            for x, y, w, h, area in stats[1:]
            if area > 400
        ]


def photograph(*squares: Any) -> Any:
    """Black uint8 200×400×3 with crops pasted at (x, y, side)."""
    image = np.zeros((200, 400, 3), np.uint8)
    for crop, (x, y, side) in zip(np.maximum(CROPS, 64), squares, strict=False):
        image[y : y + side, x : x + side] = cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA)
    return image


@pytest.fixture(scope="module")
def client(family: made.Family) -> Iterator[Any]:
    service = Service(Encoders.open(family.folders), Settings(threads=2), Squares())
    with made.running(service) as client:
        yield client


@pytest.fixture(scope="module")
def bare(family: made.Family) -> Iterator[Any]:
    """Without a detector."""
    with made.running(Service(Encoders.open(family.folders), Settings(threads=1))) as client:
        yield client


def problem(answer: Any, status: int, type: str) -> Any:
    body = answer.json()
    assert (answer.status_code, body["type"], body["status"]) == (status, type, status), body
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["title"] and body["detail"] and "Traceback" not in answer.text
    return body


def send(client: httpx.Client, data: Any, params: Any = ALIGNED, kind: str = "image/png") -> Any:
    return client.post("/v1/embed", content=data, params=params, headers={"content-type": kind})


def test_the_three_forms_give_the_same_answer(client: httpx.Client, family: made.Family) -> None:
    files = [made.png(crop) for crop in CROPS]
    forms = [
        client.post("/v1/embed", params=ALIGNED, files=[("image", ("x", f, "image/png")) for f in files]),
        client.post("/embed", data=ALIGNED, files=[("image", f) for f in files]),
        client.post(
            "/v1/embed",
            json={"aligned": True, "inputs": [{"image_b64": base64.b64encode(f).decode()} for f in files]},
        ),
    ]
    expected = family.teacher.embed(CROPS)
    for form in forms:
        body = EmbedAnswer.model_validate_json(form.content)
        assert body.encoder.id == family.teacher.info.id
        assert body.space.id == family.teacher.info.space.id
        assert [one.index for one in body.data] == [0, 1, 2]
        assert np.allclose([one.embedding for one in body.data], expected, atol=1e-6)
    raw = send(client, files[1])
    assert np.allclose(raw.json()["data"][0]["embedding"], expected[1], atol=1e-6)


def test_each_encoding_carries_the_same_vector(client: httpx.Client, family: made.Family) -> None:
    expected = family.student.embed(CROPS[:1])[0]
    for encoding in ("float", "b64_f32", "b64_f16", "b64_i8"):
        answer = send(client, made.png(CROPS[0]), {**ALIGNED, "encoding": encoding, "encoder": "student"}).json()
        assert answer["encoder"]["role"] == "student"
        one = answer["data"][0]
        assert one["encoding"] == encoding
        assert decode(one["embedding"], encoding, made.DIM) @ expected > 0.9999


@pytest.mark.parametrize("size", [1, 2, 31, 112])
def test_sharpness_is_the_variance_of_the_laplacian(size: int) -> None:
    for seed in range(20):
        crop = np.random.default_rng(seed).integers(0, 1 + 13 * seed, (size, size, 3), dtype=np.uint8, endpoint=True)
        image = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY).astype(np.uint8)
        grey = image.astype(np.float64)
        edge = np.pad(grey, 1, mode="reflect") if size > 1 else np.pad(grey, 1, mode="edge")
        around = edge[:-2, 1:-1] + edge[2:, 1:-1] + edge[1:-1, :-2] + edge[1:-1, 2:]
        assert sharpness(image) == pytest.approx(np.var(around - 4 * grey), rel=1e-12, abs=1e-9)


def test_an_aligned_crop_has_no_box_but_a_sharpness(client: httpx.Client) -> None:
    one = send(client, made.png(CROPS[0])).json()["data"][0]
    assert (one["box"], one["landmarks"], one["detection_score"]) == (None, None, None)
    assert one["quality"]["sharpness"] == measure_face(CROPS[0]).sharpness
    blurred = cv2.GaussianBlur(CROPS[0], (0, 0), 3)
    assert send(client, made.png(blurred)).json()["data"][0]["quality"]["sharpness"] < one["quality"]["sharpness"]


def test_a_photograph_is_detected_aligned_and_embedded(client: httpx.Client, family: made.Family) -> None:
    image = photograph((30, 40, 112))
    body = send(client, made.png(image), {}).json()
    assert set(body["timing_ms"]) == {"decode", "detect", "queue", "infer"}
    (one,) = body["data"]
    assert one["box"] == [30, 40, 142, 152]
    assert np.allclose(one["landmarks"], TEMPLATE + np.array([30, 40]), atol=0.01)
    assert one["detection_score"] == 0.9
    expected = family.teacher.embed(np.maximum(CROPS[:1], 64))[0]
    assert np.dot(one["embedding"], expected) > 0.999


def test_which_faces(client: httpx.Client) -> None:
    both = made.png(photograph((10, 10, 60), (250, 40, 112)))
    largest = send(client, both, {}).json()["data"]
    assert [one["box"][0] for one in largest] == [250]
    everyone = send(client, both, {"faces": "all"}).json()["data"]
    assert [(one["face"], one["box"][0]) for one in everyone] == [(0, 250), (1, 10)]
    assert problem(send(client, both, {"faces": "exactly_one"}), 422, "multiple-faces")["found"] == 2
    one = made.png(photograph((10, 10, 60)))
    assert len(send(client, one, {"faces": "exactly_one"}).json()["data"]) == 1


def test_a_photograph_without_a_face(client: httpx.Client) -> None:
    empty = made.png(photograph())
    assert problem(send(client, empty, {}), 422, "no-face")["index"] == 0
    assert problem(send(client, empty, {"faces": "exactly_one"}), 422, "no-face")
    assert send(client, empty, {"faces": "all"}).json()["data"] == []


def test_exif_orientation_is_applied(client: httpx.Client) -> None:
    upright = photograph((30, 40, 112))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # turn 90° clockwise to view
    Image.fromarray(np.rot90(upright)).save(buffer, "JPEG", quality=98, exif=exif)
    (one,) = send(client, buffer.getvalue(), {}, "image/jpeg").json()["data"]
    assert np.allclose(one["box"], [30, 40, 142, 152], atol=4)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "BMP"])
def test_formats(client: httpx.Client, format: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(CROPS[0]).save(buffer, format)
    assert send(client, buffer.getvalue()).status_code == 200
    assert send(client, buffer.getvalue(), kind="application/octet-stream").status_code == 200


def test_the_bytes_count_and_not_the_label(client: httpx.Client) -> None:
    assert send(client, made.png(CROPS[0]), kind="image/heic").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        made.png(CROPS[0])[:300],
        b"\xff\xd8\xff\xe0" + bytes(500),
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"\0\0\0\x18ftypheic" + bytes(50),
    ],
    ids=["empty", "text", "truncated", "jpeg-of-zeros", "webp-header", "heic-header"],
)
def test_undecodable_images(client: httpx.Client, data: bytes) -> None:
    assert problem(send(client, data), 400, "bad-image")["index"] == 0


@pytest.mark.parametrize("data", [b"GIF89a" + bytes(50), b"II*\0" + bytes(50)])
def test_formats_that_are_not_taken(client: httpx.Client, data: bytes) -> None:
    problem(send(client, data), 415, "unsupported-media")


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "video/mp4"])
def test_media_types_that_are_not_taken(client: httpx.Client, kind: str) -> None:
    problem(send(client, made.png(CROPS[0]), kind=kind), 415, "unsupported-media")


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(6400, 6400), (12000, 10000), (40000, 40000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_from_the_header(client: httpx.Client, width: int, height: int) -> None:
    problem(send(client, png_header(width, height)), 413, "too-large")


def test_bodies_over_the_limit_are_refused_with_and_without_a_stated_length(client: httpx.Client) -> None:
    limit = Settings().max_body
    assert problem(send(client, bytes(limit + 1)), 413, "too-large")["limit"] == limit
    problem(send(client, (bytes(65536) for _ in range(limit // 65536 + 1))), 413, "too-large")
    problem(client.post("/embed", files={"image": bytes(limit)}), 413, "too-large")
    problem(send(client, bytes(limit)), 400, "bad-image")


def test_one_bad_image_is_named_and_none_is_answered(client: httpx.Client) -> None:
    files = [("image", made.png(CROPS[0])), ("image", b"junk"), ("image", made.png(CROPS[1]))]
    assert problem(client.post("/embed", params=ALIGNED, files=files), 400, "bad-image")["index"] == 1


def test_a_crop_of_another_size_is_not_aligned(client: httpx.Client) -> None:
    body = problem(send(client, made.png(photograph())), 422, "not-aligned")
    assert (body["expected"], body["got"]) == ([112, 112], [400, 200])


def test_without_a_detector_only_aligned_crops_are_taken(bare: Any) -> None:
    assert send(bare, made.png(CROPS[0])).status_code == 200
    detail = problem(send(bare, made.png(CROPS[0]), {}), 422, "no-detector")["detail"]
    assert "aligned=true" in detail and "--detector" in detail


def test_an_unknown_encoder_names_those_that_are_loaded(client: httpx.Client, family: made.Family) -> None:
    body = problem(send(client, made.png(CROPS[0]), {**ALIGNED, "encoder": "nobody"}), 404, "unknown-encoder")
    assert body["encoders"] == [f.info.id for f in (family.teacher, family.student, family.stranger)]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"faces": "some"}, "faces"),
        ({"aligned": "maybe"}, "aligned"),
        ({"encoding": "b64"}, "encoding"),
        ({"alinged": "true"}, "alinged"),
        ({"image_url": "http://localhost/x"}, "image_url"),
    ],
)
def test_options_that_are_wrong_or_misspelt_are_named(client: httpx.Client, params: Any, field: Any) -> None:
    body = problem(send(client, made.png(CROPS[0]), params), 422, "invalid-request")
    assert body["errors"][0]["field"] == field


def test_an_option_given_twice(client: httpx.Client) -> None:
    answer = client.post("/embed", params=ALIGNED, json={"aligned": False, "inputs": [{"image_b64": "AAAA"}]})
    assert "twice" in problem(answer, 422, "invalid-request")["detail"]
    problem(client.post("/embed?faces=all&faces=largest", content=b"x"), 415, "unsupported-media")
    answer = client.post("/embed?faces=all&faces=all", content=b"x", headers={"content-type": "image/png"})
    problem(answer, 422, "invalid-request")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"inputs": []}', b'{"inputs": [{}]}', b'{"inputs": [{"image_b64": 1}]}', b"[" * 9999],
)
def test_json_that_is_not_the_body(client: httpx.Client, body: Any) -> None:
    problem(client.post("/embed", content=body, headers={"content-type": "application/json"}), 422, "invalid-request")


def test_base64_that_is_none(client: httpx.Client) -> None:
    answer = client.post("/embed", json={"aligned": True, "inputs": [{"image_b64": "é!"}]})
    problem(answer, 400, "bad-image")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=x", b"garbage"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\ncontent-disposition: form-data; name="image"\r\n\r\ntext\r\n--x--\r\n',
        ),
        ("multipart/form-data; boundary=x", b"--x--\r\n"),
    ],
)
def test_multipart_that_is_none(client: httpx.Client, kind: str, body: Any) -> None:
    problem(client.post("/embed", content=body, headers={"content-type": kind}), 422, "invalid-request")


def test_file_fields_are_named_image_and_are_counted(client: httpx.Client) -> None:
    problem(client.post("/embed", files={"file": made.png(CROPS[0])}), 422, "invalid-request")
    many = [("image", made.png(CROPS[0]))] * 33
    problem(client.post("/embed", params=ALIGNED, files=many), 422, "invalid-request")
    inputs = [{"image_b64": base64.b64encode(file).decode()} for _, file in many]
    body = problem(client.post("/embed", json={"aligned": True, "inputs": inputs}), 422, "invalid-request")
    assert "at most 32" in body["detail"]


@pytest.mark.parametrize(
    "flood",
    [
        b'{"inputs": [' + b'{"image_b64": ""},' * 99999 + b"{}]}",
        b"{" + b",".join(b'"x%d": 1' % i for i in range(99999)) + b"}",
        b'{"inputs": ' + b"[" * 99999,
    ],
)
def test_a_flood_of_tiny_values_is_refused_before_it_is_parsed(client: httpx.Client, flood: Any) -> None:
    answer = client.post("/embed", content=flood, headers={"content-type": "application/json"})
    assert "limit" in problem(answer, 422, "invalid-request")


def test_a_large_form_leaves_no_temporary_file(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an image was written to disk")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", refuse)
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    file = made.png(noise)
    assert len(file) > 2**21
    problem(client.post("/embed", params=ALIGNED, files={"image": file}), 422, "not-aligned")
