"""Images are decoded upright, or refused with a reason."""

from __future__ import annotations

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pkd.toolkit.core.errors import BadImage, ImageTooLarge
from pkd.toolkit.images.codec import decode_rgb, read_rgb, write_rgb

FORMATS = ["JPEG", "PNG", "WEBP", "BMP"]


def scene() -> np.ndarray:
    """Each corner another colour, so that turning or mixing channels shows."""
    image = np.zeros((40, 64, 3), np.uint8)
    image[:20, :32], image[:20, 32:], image[20:, :32], image[20:, 32:] = (
        (250, 0, 0),
        (0, 250, 0),
        (0, 0, 250),
        (250, 250, 250),
    )
    return image


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_decodes_rgb(kind: str) -> None:
    decoded = decode_rgb(encode(Image.fromarray(scene()), kind))
    assert decoded.dtype == np.uint8
    assert np.abs(decoded[5:15, 5:25].astype(int) - (250, 0, 0)).max() < 20
    assert np.abs(decoded[25:35, 5:25].astype(int) - (0, 0, 250)).max() < 20


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    """All eight orientations come out as Pillow's own transposition of them."""
    image = Image.fromarray(scene())
    exif = image.getexif()
    exif[0x0112] = orientation
    data = encode(image, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        from PIL import ImageOps

        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB")).astype(int)
    decoded = decode_rgb(data)
    assert decoded.shape == expected.shape
    assert np.abs(decoded - expected).mean() < 3


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_other_pixel_kinds_become_rgb(mode: str) -> None:
    image = Image.fromarray(scene())
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    decoded = decode_rgb(encode(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert decoded.shape == (40, 64, 3)
    assert decoded.dtype == np.uint8
    assert decoded.max() > 200


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_decodes_or_is_refused_at_every_length(kind: str) -> None:
    """Never another exception, and a short file never passes for a whole one."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    whole = encode(Image.fromarray(noise), kind)
    for length in range(0, len(whole) - 1, max(1, len(whole) // 300)):
        try:
            decoded = decode_rgb(whole[:length])
        except BadImage:
            continue
        assert decoded.shape == (24, 24, 3)
        assert length > len(whole) * 0.9, f"{length} of {len(whole)} bytes passed for a whole {kind}"


@pytest.mark.parametrize("data", [b"", b"x", b"GIF89a" + bytes(100), b"\xff\xd8\xff" + bytes(100), bytes(5000)])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        decode_rgb(data)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"comment": "a" * 70, "dpi": (72, 72)})],
)
def test_size_limit_counts_before_decoding(kind: str, options: dict[str, object]) -> None:
    data = encode(Image.fromarray(scene()), kind, **options)
    assert decode_rgb(data, max_pixels=40 * 64).shape == (40, 64, 3)
    with pytest.raises(ImageTooLarge, match="64×40 pixels is over the limit of 2,559"):
        decode_rgb(data, max_pixels=40 * 64 - 1)


def test_huge_headers_are_refused_without_warning() -> None:
    """Sizes on both sides of Pillow's own warning and error; BMP states its size in the first 26 bytes."""
    for width, height in ((10_000, 10_000), (30_000, 30_000), (60_000, 60_000)):
        head = b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
        head += width.to_bytes(4, "little") + height.to_bytes(4, "little") + (1).to_bytes(2, "little")
        head += (24).to_bytes(2, "little") + bytes(24)
        with pytest.raises(ImageTooLarge):
            decode_rgb(head)


def test_threads_leave_the_warning_filters_alone() -> None:
    data = encode(Image.fromarray(scene()), "PNG")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode_rgb, [data] * 400))
    assert list(warnings.filters) == before


def test_messages_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"gone\.jpg: No such file"):
        read_rgb(tmp_path / "gone.jpg")
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(BadImage, match=r"text\.jpg: not a JPEG"):
        read_rgb(tmp_path / "text.jpg")
    with pytest.raises(BadImage, match="Is a directory"):
        read_rgb(tmp_path)


@pytest.mark.parametrize(("name", "limit"), [("a.png", 0), ("a.webp", 12), ("a.jpg", 12), ("a.JPEG", 12)])
def test_write_and_read_back(tmp_path: Path, name: str, limit: float) -> None:
    write_rgb(tmp_path / name, scene())
    assert np.abs(read_rgb(tmp_path / name).astype(int) - scene()).mean() <= limit
    assert [p.name for p in tmp_path.iterdir()] == [name]  # nothing half written stays


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"\.xyz"):
        write_rgb(tmp_path / "a.xyz", scene())
