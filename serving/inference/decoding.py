"""Decode the image files that clients send."""

from __future__ import annotations

import struct
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pkd.serving.core.base64_text import decode_base64
from pkd.serving.core.errors import UnsupportedMedia
from pkd.toolkit.core.errors import BadImage, ImageTooLarge, MissingDecoder
from pkd.toolkit.images.codec import READERS, Rgb, decode_rgb

Undecoded = bytes | str
"""A file's bytes, or the same as base64. Both are decoded by a worker thread, not by the event loop."""
FRAMES, SCAN, END = frozenset({0xC0, 0xC1, 0xC2}), 0xDA, 0xD9
"""Markers of a JPEG; within a scan, 0xFF is followed by 0 or by the number of a restart."""
NOT_READ = {b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
"""First four bytes → a format that is recognised and refused."""
MAX_PARTS = 20_000
"""Most segments or chunks of a file; an image of 40 megapixels has a few thousand at most."""
MAX_SCANNED = 1_000_000_000
"""Most pixels that the scans of a progressive JPEG go over together: ten scans of 40 megapixels are 400 million, and
empty scans take 0.7 s for a thousand million."""


def decode(image: Undecoded) -> Rgb:
    """Decode an image of a request: uint8 H×W×3 RGB, upright. Raises BadImage, ImageTooLarge or UnsupportedMedia."""
    if isinstance(image, str):
        try:
            image = decode_base64(image)
        except ValueError as error:
            raise BadImage(f"image_b64 {error}.") from None
    if foreign := NOT_READ.get(image[:4]):
        raise UnsupportedMedia(f"this is a {foreign} file. JPEG, PNG, WebP, BMP, AVIF and HEIC images are taken.")
    check_work(image)
    try:
        return decode_rgb(image)
    except ImageTooLarge:
        raise
    except MissingDecoder as error:
        raise UnsupportedMedia(str(error)) from None
    except BadImage as error:
        raise _damaged(image) or error from None


def check_work(image: bytes) -> None:
    """Raise BadImage for a file that orders far more work than its pixels: an empty scan of a JPEG is a few bytes.

    Only marks are counted here; what is wrong with a file otherwise is for its reader to say.
    """
    if image.startswith(b"\xff\xd8"):
        parts, scans, pixels = _jpeg_parts(image)
        if parts > MAX_PARTS or scans * pixels > MAX_SCANNED:
            raise BadImage(
                f"the JPEG orders too much work: {scans:,} scans over {pixels:,} pixels, {parts:,} segments. "
                "Save it anew, baseline or progressive as usual."
            )
    elif image.startswith(b"\x89PNG") and _chunks(image, 8, "big") > MAX_PARTS:
        raise BadImage(f"the PNG has more than {MAX_PARTS:,} chunks. Save it anew.")
    elif image.startswith(b"RIFF") and _chunks(image, 12, "little") > MAX_PARTS:
        raise BadImage(f"the WebP has more than {MAX_PARTS:,} chunks. Save it anew.")


def _jpeg_parts(image: bytes) -> tuple[int, int, int]:
    """Count the segments of a JPEG before its first scan, its scans, and the pixels of its frame."""
    parts = pixels = 0
    place = 2
    while parts <= MAX_PARTS and place + 9 <= len(image):
        if image[place] != 0xFF:
            place += 1  # what a reader skips, too
            continue
        marker = image[place + 1]
        if marker == 0xFF:
            place += 1
            continue
        if marker == SCAN:
            break
        parts += 1
        if marker in FRAMES:
            height, width = struct.unpack(">HH", image[place + 5 : place + 9])
            pixels = max(pixels, height * width)
        place += 2 + int.from_bytes(image[place + 2 : place + 4], "big")
    data = np.frombuffer(image, np.uint8)  # four times as fast as bytes.count, for 0xFF is common in a scan
    scans = int(np.count_nonzero((data[place:-1] == 0xFF) & (data[place + 1 :] == SCAN)))
    return parts, scans if scans * pixels <= MAX_SCANNED else _scans(data[place:]), pixels


def _scans(data: NDArray[np.uint8]) -> int:
    """Count the scans up to the end of a JPEG; anything may be appended to it, a film for example."""
    markers = data[np.flatnonzero(data[:-1] == 0xFF) + 1]
    ends = np.flatnonzero(markers == END)
    return int((markers[: ends[0] if len(ends) else None] == SCAN).sum())


def _chunks(image: bytes, place: int, order: Literal["big", "little"]) -> int:
    """Count the chunks of a PNG or a WebP, no further than ``MAX_PARTS`` and one."""
    count = 0
    while place + 8 <= len(image) and count <= MAX_PARTS:
        at = place if order == "big" else place + 4
        length = int.from_bytes(image[at : at + 4], order)
        place += length + 12 if order == "big" else length + length % 2 + 8
        count += 1
    return count


def _damaged(image: bytes) -> BadImage | None:
    """Make the error of a file that begins as one that is taken; None for any other."""
    reader = next((one for magic, one in READERS.items() if image.startswith(magic)), None)
    if reader is None or (image.startswith(b"RIFF") and image[8:12] != b"WEBP"):
        return None
    kind = str(reader.format).replace("WEBP", "WebP")
    return BadImage(f"the {kind} image is cut off or damaged ({len(image):,} bytes). Send the whole file.")
