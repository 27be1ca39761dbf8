"""Read and write images as uint8 H×W×3 RGB, with the limits and messages that strangers' files need."""

from __future__ import annotations

import io
import os
import struct
import threading
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pkd.toolkit.core.errors import BadImage, ImageTooLarge
from pkd.toolkit.images.heif import decode_heif, is_heif

SUFFIXES = frozenset({".avif", ".bmp", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".webp"})
READERS: dict[bytes, type[ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
    b"BM": BmpImageFile,
}
"""First bytes of a file → what reads its header."""
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG's frame: every kind of coding, arithmetic and lossless ones, too."""
SEGMENTS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
"""Markers of what usually stands before it: tables, profiles and comments."""
MAX_PIXELS = 40_000_000
"""Larger images are refused from their header, before anything is decoded (40 megapixels = 120 MB of RGB)."""

Rgb = NDArray[np.uint8]


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Rgb:
    """Decode a JPEG, PNG, WebP, BMP, AVIF or HEIC, upright → uint8 H×W×3 RGB.

    Raises BadImage, of which MissingDecoder names the package that a HEIC needs.
    """
    if not data:
        raise BadImage("empty image: 0 bytes.")
    if is_heif(data):
        return decode_heif(data, max_pixels=max_pixels)
    # Not through Image.open: it warns about large images, by filters that belong to all threads of the process.
    reader = next((one for magic, one in READERS.items() if data.startswith(magic)), None)
    try:
        if reader is None:
            raise ValueError
        if reader is not JpegImageFile or (size := _jpeg_size(data)) is None:
            with reader(io.BytesIO(data)) as header:
                size = header.size
    except Exception:  # Pillow raises many kinds for hostile headers
        raise BadImage(f"not a JPEG, PNG, WebP, BMP, AVIF or HEIC image ({len(data):,} bytes).") from None
    width, height = size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"image of {width}×{height} pixels is over the limit of {max_pixels:,}. Downscale it first."
        )
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)  # applies EXIF orientation
    except cv2.error:
        image = None
    if image is None:
        raise BadImage(f"image of {width}×{height} pixels is truncated or corrupt ({len(data):,} bytes).")
    return image.astype(np.uint8, copy=False)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Read width and height of a JPEG whose header is as usual; None: Pillow is to read it, which reads every table."""
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        length, bits, height, width, planes = struct.unpack_from(">HBHHB", data, place + 2)
        if marker in FRAMES:
            return (width, height) if bits == 8 and planes in (1, 3, 4) and width and height else None
        if marker not in SEGMENTS:
            return None
        place += 2 + length
    return None


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
    part = path.with_name(f".{os.getpid()}-{threading.get_ident()}.part")  # short: the name itself may fill the limit
    part.write_bytes(encoded.tobytes())
    part.replace(path)
