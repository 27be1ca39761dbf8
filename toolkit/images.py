"""Bytes and files → uint8 H×W×3 RGB images, with the limits and messages that strangers' files need."""

from __future__ import annotations

import io
import struct
import threading
import warnings
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pkd.toolkit.errors import BadImage, ImageTooLarge

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 40_000_000
"""Larger images are refused from their header, before anything is decoded (40 megapixels = 120 MB of RGB)."""

Rgb = NDArray[np.uint8]
_HEADER = threading.Lock()


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS, size: int | None = None) -> Rgb:
    """Decode a JPEG, PNG, WebP or BMP with its EXIF orientation applied → uint8 H×W×3 RGB. Raises BadImage.

    ``size``: side of the square crop that this should be. Where the header plainly says so, Pillow need not be asked,
    which takes a fifth of the time of a small crop; any other image is decoded all the same.
    """
    if not data:
        raise BadImage("empty image: 0 bytes.")
    width, height = (size, size) if size and stated_size(data) == (size, size) else _checked_size(data, max_pixels)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)  # applies EXIF orientation
    except cv2.error:
        image = None
    if image is None:
        raise BadImage(f"image of {width}×{height} pixels is truncated or corrupt ({len(data):,} bytes).")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)


def stated_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from the header of a PNG, JPEG or simple WebP; None for all else, which Pillow has to judge."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        return _pair(">II", data, 16)
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8 " and data[23:26] == b"\x9d\x01\x2a":
        found = _pair("<HH", data, 26)
        return (found[0] & 0x3FFF, found[1] & 0x3FFF) if found else None
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame header
            found = _pair(">HH", data, at + 5)
            return (found[1], found[0]) if found else None
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA:  # has no length, or the image begins without a frame header
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _pair(layout: str, data: bytes, at: int) -> tuple[int, int] | None:
    if len(data) < at + struct.calcsize(layout):
        return None
    first, second = struct.unpack_from(layout, data, at)
    return int(first), int(second)


def _checked_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Width and height as Pillow reads them. Raises BadImage, or ImageTooLarge above ``max_pixels``."""
    try:
        with _HEADER, warnings.catch_warnings():  # the filters belong to the process, not to the thread
            warnings.simplefilter("ignore")  # Pillow warns about large images; the size is checked below
            with Image.open(io.BytesIO(data), formats=FORMATS) as header:
                width, height = header.size
    except Image.DecompressionBombError:
        raise ImageTooLarge(f"the image's header claims far over the limit of {max_pixels:,} pixels.") from None
    except Exception:  # Pillow raises many kinds for hostile headers
        raise BadImage(f"not a JPEG, PNG, WebP or BMP image ({len(data):,} bytes).") from None
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"image of {width}×{height} pixels is over the limit of {max_pixels:,}. Downscale it first."
        )
    return width, height


def read_rgb(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Rgb:
    """Read one image file as ``decode_rgb`` does; a BadImage names the file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror or error}.") from None
    try:
        return decode_rgb(data, max_pixels=max_pixels)
    except BadImage as error:
        raise type(error)(f"{path}: {error}") from None


def write_rgb(path: str | Path, image: Rgb, *, quality: int = 95) -> None:
    """Write uint8 H×W×3 RGB; the suffix chooses the format (``quality`` counts for JPEG and WebP). Atomic."""
    path = Path(path)
    flag = {".webp": cv2.IMWRITE_WEBP_QUALITY}.get(path.suffix.lower(), cv2.IMWRITE_JPEG_QUALITY)
    parameters = [] if path.suffix.lower() == ".png" else [flag, quality]
    try:
        _, encoded = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), parameters)
    except cv2.error:
        raise BadImage(f"{path}: cannot be written as {path.suffix!r}. Use .webp, .png or .jpg.") from None
    part = path.with_name(path.name + ".part")
    part.write_bytes(encoded.tobytes())
    part.replace(path)
