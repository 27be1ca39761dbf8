"""Images of strangers: a small file does not order hours of work, and ordinary files pass."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from pkd.serving.inference.decoding import MAX_PARTS, check_work, decode, png_size
from pkd.toolkit.core.errors import BadImage

PICTURE = np.random.default_rng(1).integers(0, 256, (256, 320, 3), np.uint8)


def saved(form: str, image: np.ndarray = PICTURE, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_scans(count: int, side: int) -> bytes:
    """Make a grey progressive JPEG with that many further scans of AC coefficients, all empty: 17 bytes each."""
    whole = saved("JPEG", np.full((side, side), 128, np.uint8), progressive=True)
    header = b"\xff\xc4\x00\x14\x10" + bytes([1]) + bytes(15) + b"\x00"  # a table with the one code 0: end of block
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" + b"\x00" * 2
    return whole[:-2] + header + scan * count + b"\xff\xd9"


def test_a_jpeg_of_a_thousand_scans_is_refused_before_it_is_decoded() -> None:
    begun = time.thread_time()
    with pytest.raises(BadImage, match="too much work"):
        decode(with_scans(1000, 2000))
    assert time.thread_time() - begun < 2


BOMBS = {
    "JPEG segments": b"\xff\xd8" + b"\xff\xe1\x00\x02" * (MAX_PARTS + 1) + saved("JPEG")[2:],
    "JPEG comments": b"\xff\xd8" + b"\xff\xfe\x00\x02" * (MAX_PARTS + 1) + saved("JPEG")[2:],
    "JPEG tables": b"\xff\xd8" + (b"\xff\xdb\x00\x43" + bytes(65)) * (MAX_PARTS + 1) + saved("JPEG")[2:],
    "PNG chunks": saved("PNG")[:33] + chunk(b"tEXt", b"a\0b") * (MAX_PARTS + 1) + saved("PNG")[33:],
    "PNG data in chunks": saved("PNG")[:33] + chunk(b"IDAT") * (MAX_PARTS + 1) + saved("PNG")[33:],
    "WebP chunks": saved("WEBP")[:12] + b"EXIF\0\0\0\0" * (MAX_PARTS + 1) + saved("WEBP")[12:],
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_of_too_many_parts_is_refused(name: str) -> None:
    begun = time.thread_time()
    with pytest.raises(BadImage, match=r"too much work|more than 20,000 chunks"):
        decode(BOMBS[name])
    assert time.thread_time() - begun < 2


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "quality": 100}),
        ("JPEG", {"exif": b"Exif\0\0" + saved("JPEG")}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
    ],
)
def test_an_ordinary_file_passes(form: str, options: dict[str, object]) -> None:
    assert decode(saved(form, **options)).shape == PICTURE.shape  # type: ignore[arg-type]


def test_a_large_progressive_photograph_passes_with_a_film_behind_it() -> None:
    film = np.random.default_rng(2).bytes(8_000_000)
    check_work(saved("JPEG", np.zeros((5000, 8000, 3), np.uint8), progressive=True) + film)


@pytest.mark.parametrize("data", [b"\xff\xd8", b"\xff\xd8\xff\xc2", b"\x89PNG\r\n\x1a\n\xff\xff", b"RIFF", b""])
def test_what_is_cut_off_is_for_the_reader_to_refuse(data: bytes) -> None:
    check_work(data)


def png_of(
    raw: bytes, *, side: int = 16, depth: int = 8, colour: int = 2, interlaced: bool = False, **more: bytes
) -> bytes:
    """Make a PNG whose rows, filters included, are ``raw``; ``before`` and ``after``: chunks around its data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, interlaced))
    data = chunk(b"IDAT", more.get("data", zlib.compress(raw, 9)))
    return b"\x89PNG\r\n\x1a\n" + header + more.get("before", b"") + data + more.get("after", b"") + chunk(b"IEND")


def deflated(megabytes: int) -> bytes:
    """Make a zlib stream of that many megabytes of zeros."""
    deflate = zlib.compressobj(9)
    return b"".join(deflate.compress(bytes(1 << 20)) for _ in range(megabytes)) + deflate.flush()


ROWS = bytes(16 * (1 + 3 * 16))
TEXT = zlib.compress(bytes(7_000_000), 9)
SWELLING = {
    "texts": png_of(ROWS, after=chunk(b"zTXt", b"a\0\0" + TEXT) * 900),
    "texts first": png_of(ROWS, before=chunk(b"zTXt", b"a\0\0" + TEXT) * 900),
    "texts of the world": png_of(ROWS, after=chunk(b"iTXt", b"a\0\1\0\0\0" + TEXT) * 900),
    "a profile": png_of(ROWS, before=chunk(b"iCCP", b"a\0\0" + TEXT * 20)),
    "frames": png_of(
        ROWS, before=chunk(b"acTL", struct.pack(">II", 900, 0)), after=chunk(b"fdAT", b"\0\0\0\1" + TEXT) * 900
    ),
}


@pytest.mark.parametrize("name", SWELLING)
def test_what_a_png_holds_besides_its_pixels_costs_nothing(name: str) -> None:
    begun = time.thread_time()
    assert decode(SWELLING[name]).shape == (16, 16, 3)
    assert time.thread_time() - begun < 2  # 26 s before, for 6 MB of texts


def test_data_that_goes_on_behind_the_last_row_is_refused() -> None:
    image = png_of(b"", data=deflated(70))
    begun = time.thread_time()
    with pytest.raises(BadImage, match="goes on after its 784 bytes of pixels"):
        decode(image)
    assert time.thread_time() - begun < 2


DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("colour", "depth"), [(colour, depth) for colour in DEPTHS for depth in DEPTHS[colour]])
def test_the_size_of_a_pngs_rows(colour: int, depth: int, interlaced: bool) -> None:
    side = 37
    size = png_size(struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, interlaced))
    palette = chunk(b"PLTE", bytes(6)) if colour == 3 else b""
    whole = {"side": side, "depth": depth, "colour": colour, "interlaced": interlaced, "before": palette}
    assert decode(png_of(bytes(size), **whole)).shape == (side, side, 3)  # type: ignore[arg-type]
    with pytest.raises(BadImage):  # libpng misses the last byte, so the size is exact
        decode(png_of(bytes(size - 1), **whole))  # type: ignore[arg-type]


def test_every_kind_of_frame_counts() -> None:
    """Arithmetic coding has markers of its own."""
    for marker in (b"\xff\xc9", b"\xff\xca"):
        with pytest.raises(BadImage, match="too much work"):
            check_work(with_scans(1000, 2000).replace(b"\xff\xc2", marker, 1))
