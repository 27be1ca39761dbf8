"""HEIC and AVIF files made by hand around real frames, so that a test can have them say whatever it likes."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

from PIL import Image

from pkd.toolkit.images import heif

Property = tuple[str, bytes]


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    """``form``: AVIF or HEIF, the latter where pillow-heif is installed."""
    if form == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(image: Image.Image, form: str, orientation: int) -> bytes:
    """Write a file that states an orientation, 1 to 8, as irot and imir."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = image.copy()
    image.info["exif"] = exif.tobytes()
    return saved(image, form, **({"exif": exif} if form == "AVIF" else {}))


def frames_of(data: bytes) -> tuple[str, bytes, list[Property]]:
    """Kind, bytes and properties of the primary item."""
    file = heif.read_structure(data)
    item = file.items[file.primary]
    return item.kind, item.data, [file.properties[at] for at in item.properties]


def box(kind: str, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", len(body) + 8) + kind.encode() + body


def full(kind: str, *parts: bytes, version: int = 0) -> bytes:
    return box(kind, struct.pack(">I", version << 24), *parts)


def made(
    items: Sequence[tuple[str, bytes]], properties: Sequence[Property], tiles: Sequence[int] = (), brand: str = "avif"
) -> bytes:
    """Write a file whose first item is primary, all with all properties. ``tiles``: what the first is made of."""
    entries = [
        full("infe", struct.pack(">HH", n, 0), kind.encode(), b"\0", version=2) for n, (kind, _) in _numbered(items)
    ]
    associations = bytes([len(properties), *(n for n, _ in _numbered(properties))])
    references = [box("dimg", struct.pack(">HH", 1, len(tiles)), *(struct.pack(">H", one) for one in tiles))]
    ftyp = box("ftyp", brand.encode(), bytes(4), brand.encode(), b"mif1miaf")

    def meta(begin: int) -> bytes:
        places, at = [], begin
        for n, (_, data) in _numbered(items):
            places.append(struct.pack(">HHHII", n, 0, 1, at, len(data)))
            at += len(data)
        return full(
            "meta",
            full("hdlr", bytes(4), b"pict", bytes(13)),
            full("pitm", struct.pack(">H", 1)),
            full("iloc", b"\x44\x00", struct.pack(">H", len(items)), *places),
            full("iinf", struct.pack(">H", len(items)), *entries),
            *([full("iref", *references)] if tiles else []),
            box(
                "iprp",
                box("ipco", *(box(kind, body) for kind, body in properties)),
                full(
                    "ipma",
                    struct.pack(">I", len(items)),
                    *(struct.pack(">H", n) + associations for n, _ in _numbered(items)),
                ),
            ),
        )

    begin = len(ftyp) + len(meta(0)) + 8
    return ftyp + meta(begin) + box("mdat", *(data for _, data in items))


def _numbered(some: Sequence[tuple[str, bytes]]) -> list[tuple[int, tuple[str, bytes]]]:
    return list(enumerate(some, 1))
