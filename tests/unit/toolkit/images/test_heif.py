"""HEIC and AVIF: upright, the primary picture, and no more work than their pixels are worth."""

from __future__ import annotations

import io
import struct
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pkd.serving.core.errors import UnsupportedMedia
from pkd.serving.inference.decoding import decode
from pkd.toolkit.core.errors import BadImage, ImageTooLarge, MissingDecoder
from pkd.toolkit.data.tree import walk_images
from pkd.toolkit.images.codec import SUFFIXES, decode_rgb
from pkd.toolkit.images.heif import MAX_ITEMS, checked, read_structure
from tests.support.heif_files import Property, box, frames_of, made, saved, turned

AVIF = pytest.importorskip("PIL.AvifImagePlugin")
if not AVIF.SUPPORTED:
    pytest.skip("this Pillow reads no AVIF", allow_module_level=True)
try:
    import pillow_heif  # noqa: F401
except ImportError:
    HEIC = [pytest.param("HEIF", marks=pytest.mark.skip(reason="pillow-heif is not installed (extra heif)"))]
else:
    HEIC = [pytest.param("HEIF")]
FORMS = ["AVIF", *HEIC]


def scene(width: int = 96, height: int = 64) -> Image.Image:
    """Each corner another colour, so that turning or mixing channels shows."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:] = (30, 30, 30)
    image[: height // 2, : width // 2] = (220, 20, 20)
    image[: height // 2, width // 2 :] = (20, 220, 20)
    image[height // 2 :, : width // 2] = (20, 20, 220)
    return Image.fromarray(image)


@lru_cache
def plain(form: str, width: int = 96, height: int = 64) -> bytes:
    return saved(scene(width, height), form, quality=80)


def with_size(properties: list[Property], width: int, height: int) -> list[Property]:
    return [(kind, struct.pack(">III", 0, width, height) if kind == "ispe" else body) for kind, body in properties]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turn_is_applied_once(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    scene().save(buffer, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(buffer)).convert("RGB")).astype(int)
    decoded = decode_rgb(turned(scene(), form, orientation))
    assert decoded.shape == expected.shape and decoded.dtype == np.uint8 and decoded.flags.writeable
    assert np.abs(decoded - expected).mean() < 8


@pytest.mark.parametrize("form", FORMS)
def test_exif_alone_turns_nothing_and_is_shown_to_no_reader(form: str) -> None:
    """ISO/IEC 23008-12 has readers ignore it; and an EXIF of thousands of entries names the same megabytes."""
    exif = Image.Exif()
    exif[0x010E if form == "AVIF" else 0x0112] = "a face" if form == "AVIF" else 6  # Pillow would write an irot
    data = saved(scene(), form, exif=exif)
    assert decode_rgb(data).shape == (64, 96, 3)
    _, shown = checked(data, 10**6)
    assert b"infe" in data and data.count(b"Exif") > shown.count(b"Exif")


@pytest.mark.parametrize("form", FORMS)
def test_transparency_is_dropped_and_grey_is_rgb(form: str) -> None:
    image = scene()
    image.putalpha(Image.new("L", image.size, 99))
    assert np.abs(decode_rgb(saved(image, form, quality=80)).astype(int) - np.asarray(scene())).mean() < 8
    grey = decode_rgb(saved(Image.new("L", (64, 64), 99), form))
    assert grey.shape == (64, 64, 3) and np.abs(grey.astype(int) - 99).max() < 4


@pytest.mark.parametrize("form", HEIC)
def test_of_several_pictures_the_primary_one_is_read(form: str) -> None:
    import pillow_heif

    both = pillow_heif.from_pillow(Image.new("RGB", (64, 64), (250, 0, 0)))
    both.add_from_pillow(scene())
    buffer = io.BytesIO()
    both.save(buffer, primary_index=1)
    assert decode_rgb(buffer.getvalue()).shape == (64, 96, 3)


@pytest.mark.parametrize("form", HEIC)
def test_a_picture_of_tiles_as_phones_make_it(form: str) -> None:
    data = saved(scene(640, 500), form, quality=80, tile_size=128)
    assert frames_of(plain(form))[0] == "hvc1" and len(read_structure(data).items) > 10
    assert np.abs(decode_rgb(data).astype(int) - np.asarray(scene(640, 500))).mean() < 8


@pytest.mark.parametrize("form", FORMS)
def test_frames_that_are_larger_than_the_file_says(form: str) -> None:
    kind, data, properties = frames_of(plain(form, 400, 300))
    small = made([(kind, data)], with_size(properties, 16, 16), brand="avif" if form == "AVIF" else "heic")
    with pytest.raises(ImageTooLarge, match=r"frames have 4\d\d×3\d\d pixels"):
        decode_rgb(small, max_pixels=10_000)
    with pytest.raises(ImageTooLarge):
        decode_rgb(plain(form, 400, 300), max_pixels=100_000)


BOMBS = ["frames", "tiles", "tiles of tiles"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_orders_no_great_work(form: str, bomb: str) -> None:
    kind, data, properties = frames_of(plain(form, 1000, 800))
    brand = "avif" if form == "AVIF" else "heic"
    grid = bytes([0, 0, 15, 15]) + struct.pack(">HH", 16000, 12800)
    if bomb == "frames":
        file = made([(kind, data * 400)], properties, brand=brand)
    elif bomb == "tiles":
        file = made([("grid", grid), (kind, data)], properties, [2] * 400, brand)
    else:
        file = made([("grid", grid), (kind, data)], properties, [1] * 400, brand)
    begun = time.thread_time()
    with pytest.raises(BadImage, match=r"too much work|damaged"):
        decode_rgb(file)
    assert time.thread_time() - begun < 2


def test_a_file_of_too_many_items_boxes_or_references_is_refused() -> None:
    kind, data, properties = frames_of(plain("AVIF"))
    for file in (
        made([(kind, data)] + [("free", b"")] * MAX_ITEMS, properties),
        made([("grid", bytes(8)), (kind, data)], properties, [2] * 5000),
        plain("AVIF") + box("free") * (MAX_ITEMS + 1),
    ):
        with pytest.raises(BadImage, match="damaged"):
            decode_rgb(file)


def test_a_film_another_codec_and_a_mix_are_told_apart() -> None:
    kind, data, properties = frames_of(plain("AVIF"))
    with pytest.raises(BadImage, match="film"):
        decode_rgb(plain("AVIF") + box("moov"))
    with pytest.raises(BadImage, match="'jpeg', which is not read"):
        decode_rgb(made([("jpeg", data)], properties))
    with pytest.raises(BadImage, match="damaged"):
        decode_rgb(made([("hvc1", data)], properties, brand="heic"))  # no hvcC
    assert decode_rgb(made([(kind, data)], properties)).shape == (64, 96, 3)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_cut_off_or_changed_is_a_picture_or_a_refusal(form: str) -> None:
    data = plain(form)
    for end in (*range(0, len(data), max(1, len(data) // 60)), len(data) - 1):
        with pytest.raises(BadImage):
            decode_rgb(data[:end])
    random = np.random.default_rng(3)
    for _ in range(150):
        broken = bytearray(data)
        for at in random.integers(0, len(data), 3):
            broken[at] = random.integers(256)
        try:
            assert decode_rgb(bytes(broken)).ndim == 3
        except BadImage as error:
            assert "\n" not in str(error)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    setup = bytes(21) + b"\xff\x01" + b"\x21\x00\x01" + struct.pack(">H", len(SPS)) + SPS
    heic = made([("hvc1", b"\0\0\0\2\x26\x01")], [("hvcC", setup)], brand="heic")
    with pytest.raises(MissingDecoder, match=r"pip install 'pkd\[heif\]'"):
        decode_rgb(heic)
    with pytest.raises(UnsupportedMedia, match=r"pkd\[heif\]"):
        decode(heic)


SPS = bytes.fromhex("420101016000000300900000030000030000a02020c10e5924ca")
"""Sequence parameters; what follows the size is not read."""


def test_commands_find_such_files(tmp_path: Path) -> None:
    for name in ("ann/1.heic", "ann/2.AVIF", "bob/3.heif", "bob/4.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(walk_images(tmp_path, lambda left: None)) == ["ann/1.heic", "ann/2.AVIF", "bob/3.heif"]
    assert {".heic", ".heif", ".avif"} <= SUFFIXES
