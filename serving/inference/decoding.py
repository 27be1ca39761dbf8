"""Decode the image files that clients send."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pkd.serving.core.embedding_codec import decode_base64
from pkd.serving.core.errors import UnsupportedMedia
from pkd.toolkit.core.errors import BadImage, ImageTooLarge, MissingDecoder
from pkd.toolkit.images.codec import FRAMES, READERS, Rgb, decode_rgb

Undecoded = bytes | str
"""A file's bytes, or the same as base64. Both are decoded by a worker thread, not by the event loop."""
SCAN, END = 0xDA, 0xD9
"""Further markers of a JPEG; within a scan, 0xFF is followed by 0 or by the number of a restart."""
PNG = b"\x89PNG\r\n\x1a\n"
ESSENTIAL = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND"})
"""Chunks of a PNG that its pixels come from; any other is a place for compressed text, profiles and frames."""
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Colour type of a PNG → samples per pixel."""
INFLATES = 1032
"""Most bytes that a byte of a zlib stream becomes."""
SPARE = 64 << 20
"""Bytes that a PNG's stream may inflate to unlooked at: 0.2 s of work."""
NOT_READ = {b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
"""First four bytes → a format that is recognised and refused."""
PIECE = 1 << 20
"""Bytes that are inflated at a time."""
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
    read = _pixels_only(image) if image.startswith(PNG) else image
    try:
        return decode_rgb(read)
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


def _pixels_only(image: bytes) -> bytes:
    """Drop what a PNG holds besides its pixels, and refuse a stream that goes on behind them. Raises BadImage.

    libpng inflates texts and profiles of 8 MB each, and what follows the last row, for nobody: 6 MB of such chunks cost
    26 s. What is wrong with the file otherwise is for its reader to say.
    """
    kept, streams, place, header = [PNG], [], len(PNG), b""
    while place + 12 <= len(image):
        length, kind = int.from_bytes(image[place : place + 4], "big"), image[place + 4 : place + 8]
        if kind in ESSENTIAL:
            kept.append(image[place : place + 12 + length])
            if kind == b"IHDR":
                header = image[place + 8 : place + 21]
            elif kind == b"IDAT":
                streams.append(image[place + 8 : place + 8 + length])
        if kind == b"IEND":
            break
        place += 12 + length
    if len(header) == 13 and INFLATES * sum(map(len, streams)) > SPARE:
        _require_end(streams, png_size(header))
    return b"".join(kept)


def png_size(header: bytes) -> int:
    """Count the bytes of a PNG's filtered rows, of each pass where it is interlaced, from its IHDR."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * SAMPLES.get(colour, 4)
    passes = ((8, 8, 0, 0), (8, 8, 4, 0), (4, 8, 0, 4), (4, 4, 2, 0), (2, 4, 0, 2), (2, 2, 1, 0), (1, 2, 0, 1))
    total = 0
    for across, down, left, top in passes if interlaced else ((1, 1, 0, 0),):
        columns, rows = max(0, -(-(width - left) // across)), max(0, -(-(height - top) // down))
        total += rows * (1 + -(-columns * bits // 8)) if columns else 0
    return total


def _require_end(streams: list[bytes], size: int) -> None:
    """Raise BadImage where a PNG's zlib stream gives more than ``size`` bytes and a MB; no more is inflated."""
    inflate, left = zlib.decompressobj(), size + (1 << 20)
    with suppress(zlib.error):  # for the reader to say
        for stream in streams:
            while stream and not inflate.eof:
                left -= len(inflate.decompress(stream, PIECE))
                stream = inflate.unconsumed_tail
                if left < 0:
                    raise BadImage(f"the PNG's data goes on after its {size:,} bytes of pixels. Save it anew.")


def _jpeg_parts(image: bytes) -> tuple[int, int, int]:
    """Count the segments of a JPEG before its first scan, its scans, and the pixels of its frame.

    Scans that cannot go over ``MAX_SCANNED`` pixels, however many the file holds, are not looked for: 0.
    """
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
    if (len(image) - place) // 2 * pixels <= MAX_SCANNED:  # two bytes each could not be too many
        return parts, 0, pixels
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
