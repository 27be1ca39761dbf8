"""Decode the image files that clients send."""

from __future__ import annotations

import base64
import binascii

from pkd.serving.core.errors import UnsupportedMedia
from pkd.toolkit.core.errors import BadImage, ImageTooLarge
from pkd.toolkit.images.codec import READERS, Rgb, decode_rgb

Undecoded = bytes | str
"""A file's bytes, or the same as base64. Both are decoded by a worker thread, not by the event loop."""
NOT_READ = {b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
"""First four bytes → a format that is recognised and refused."""


def decode(image: Undecoded) -> Rgb:
    """Decode an image of a request: uint8 H×W×3 RGB, upright. Raises BadImage, ImageTooLarge or UnsupportedMedia."""
    if isinstance(image, str):
        try:
            image = base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            raise BadImage("image_b64 is not base64.") from None
    foreign = "HEIC or AVIF" if image[4:8] == b"ftyp" else NOT_READ.get(image[:4])
    if foreign:
        raise UnsupportedMedia(f"this is a {foreign} file. JPEG, PNG, WebP and BMP images are taken.")
    try:
        return decode_rgb(image)
    except ImageTooLarge:
        raise
    except BadImage as error:
        raise _damaged(image) or error from None


def _damaged(image: bytes) -> BadImage | None:
    """Make the error of a file that begins as one that is taken; None for any other."""
    reader = next((one for magic, one in READERS.items() if image.startswith(magic)), None)
    if reader is None or (image.startswith(b"RIFF") and image[8:12] != b"WEBP"):
        return None
    kind = str(reader.format).replace("WEBP", "WebP")
    return BadImage(f"the {kind} image is cut off or damaged ({len(image):,} bytes). Send the whole file.")
