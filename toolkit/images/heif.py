"""Read HEIC and AVIF pictures, after counting what the file orders to be decoded.

Both are boxes (ISO/IEC 14496-12 and 23008-12) around frames of HEVC or AV1. What a reader says of the size is what the
boxes state; the frames may be of any other size, be many, or be named a thousand times by a grid. All of that is
counted here from the frames' own headers before a decoder sees them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module

import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps
from PIL.ImageFile import ImageFile

from pkd.toolkit.core.errors import BadImage, ImageTooLarge, MissingDecoder
from pkd.toolkit.images.bitstreams import Bits, av1_frames, hevc_frames, hevc_size

MAX_ITEMS = 1000
"""Most items of a file, most boxes of one kind of list and most parts of all items; references may be four times as
many. Readers look for an item among all others again and again."""
MAX_WORK = 200_000_000
"""Most pixels that all frames and slices order together: colour, transparency and borders of 40 megapixels, twice."""
CODED = {"av01": "AVIF", "hvc1": "HEIC"}
"""Kinds of items that hold frames → what their files are called."""
HIDDEN = frozenset({"Exif", "mime"})
"""Items that no reader is shown. A turn lies in a property (irot, imir), and the standard has EXIF's ignored; these may
be compressed, or a list of thousands of entries that all show the same megabytes."""


@dataclass
class _Item:
    kind: str = ""
    place: int = 0
    """Place in the file where its kind stands."""
    data: bytes = b""
    properties: list[int] = field(default_factory=list)


@dataclass
class HeifFile:
    """Hold what a file consists of."""

    primary: int = 0
    items: dict[int, _Item] = field(default_factory=dict)
    tiles: dict[int, list[int]] = field(default_factory=dict)
    """Item → what it is put together of."""
    beside: dict[int, list[int]] = field(default_factory=dict)
    """Item → what says more of its pixels, such as how transparent they are."""
    properties: list[tuple[str, bytes]] = field(default_factory=list)


def is_heif(data: bytes) -> bool:
    """Tell whether a file begins as HEIC and AVIF do."""
    return data[4:8] == b"ftyp"


def decode_heif(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """Decode the primary picture of a HEIC or AVIF file, turned as its properties say → uint8 H×W×3 RGB.

    Raises BadImage, ImageTooLarge for more than ``max_pixels`` stated or coded, MissingDecoder.
    """
    kind, shown = checked(data, max_pixels)
    reader = _heic_reader() if kind == "HEIC" else _avif_reader()
    try:
        with reader(io.BytesIO(shown)) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise ImageTooLarge(
                    f"image of {width}×{height} pixels is over the limit of {max_pixels:,}. Downscale it first."
                )
            picture.load()
            # libheif has turned the pixels; Pillow's AVIF reader tells the turn as an EXIF orientation.
            if kind == "AVIF":
                ImageOps.exif_transpose(picture, in_place=True)
            # No copy where none is needed: 40 megapixels are 160 MB here.
            return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except ImageTooLarge:
        raise
    except Exception:  # both readers raise many kinds for hostile files
        raise _damaged(kind, data) from None


def checked(data: bytes, max_pixels: int) -> tuple[str, bytes]:
    """Return HEIC or AVIF, and the file without what no reader is to be shown.

    Raises BadImage for a file that is damaged, cut off, a film, or orders too much work.
    """
    try:
        file = read_structure(data)
        kinds = set[str]()
        work = _work(file, file.primary, kinds, max_pixels, ())
        extra = [
            item for seen in (file.primary, *file.tiles.get(file.primary, ())) for item in file.beside.get(seen, ())
        ]
        work += sum(_work(file, one, kinds, max_pixels, ()) for one in extra)
    except (IndexError, ValueError, KeyError):
        raise BadImage(
            f"the HEIC or AVIF image is cut off or damaged ({len(data):,} bytes). Send the whole file."
        ) from None
    if len(kinds) != 1:
        raise BadImage(f"the picture mixes {' and '.join(sorted(kinds)) or 'no'} frames. Save it as JPEG.")
    kind = CODED[kinds.pop()]
    if work > MAX_WORK:
        raise BadImage(f"the {kind} orders too much work: frames and slices of {work:,} pixels together. Save it anew.")
    shown = bytearray(data)
    for item in file.items.values():
        if item.kind in HIDDEN:
            shown[item.place : item.place + 4] = b"free"
    return kind, bytes(shown)


def _work(file: HeifFile, number: int, kinds: set[str], max_pixels: int, above: tuple[int, ...]) -> int:
    """Count the pixels that decoding one item orders; a tile counts as often as it is named."""
    item = file.items[number]
    if item.kind == "grid":
        if number in above or len(above) > 2:
            raise ValueError
        counted: dict[int, int] = {}
        tiles = file.tiles[number]
        for tile in tiles:
            if tile not in counted:
                counted[tile] = _work(file, tile, kinds, max_pixels, (*above, number))
        return sum(counted[tile] for tile in tiles)
    if item.kind not in CODED:
        raise BadImage(f"the picture is made of {item.kind!r}, which is not read here. Save it as JPEG.")
    kinds.add(item.kind)
    if item.kind == "av01":
        frames, width, height = av1_frames(item.data)
    else:
        setups = [body for kind, body in (file.properties[at] for at in item.properties) if kind == "hvcC"]
        sizes, prefix = _hevc_setup(setups[0])
        frames, more = hevc_frames(item.data, prefix)
        width, height = max(sizes + more, key=lambda size: size[0] * size[1])
    if width * height > max_pixels * 1.1:  # what is coded may have a border that is not shown
        raise ImageTooLarge(
            f"image whose frames have {width}×{height} pixels is over the limit of {max_pixels:,}. Downscale it first."
        )
    return frames * width * height


def _hevc_setup(body: bytes) -> tuple[list[tuple[int, int]], int]:
    """Read the sizes that an hvcC box sets up, and how many bytes state the length of a unit."""
    sizes, at = [], 23
    for _ in range(body[22]):
        kind, count = body[at] & 63, int.from_bytes(body[at + 1 : at + 3], "big")
        at += 3
        for _ in range(count):
            length = int.from_bytes(body[at : at + 2], "big")
            if kind == 33:
                sizes.append(hevc_size(body[at + 2 : at + 2 + length]))
            at += 2 + length
            if at > len(body):
                raise ValueError
    return sizes, (body[21] & 3) + 1


def read_structure(data: bytes) -> HeifFile:
    """Read the boxes that say what a file consists of."""
    top = {kind: (begin, end) for kind, begin, end in _boxes(data, 0, len(data), once=("ftyp", "meta", "moov"))}
    if "moov" in top:
        raise BadImage("the file holds a film. Send a single picture.")
    begin, end = top["meta"]
    once = ("pitm", "iinf", "iloc", "iprp", "iref", "idat")
    inner = {kind: (a, b) for kind, a, b in _boxes(data, begin + 4, end, once=once)}
    file = HeifFile()
    bits = Bits(data[slice(*inner["pitm"])])
    file.primary = bits.take(16 if bits.take(32) >> 24 == 0 else 32)
    _read_items(file, data, *inner["iinf"])
    _read_places(file, data, inner)
    if "iref" in inner:
        _read_references(file, data, *inner["iref"])
    for kind, a, b in _boxes(data, *inner["iprp"], once=("ipco", "ipma")):
        if kind == "ipco":
            file.properties = [(name, data[c:d]) for name, c, d in _boxes(data, a, b)]
        elif kind == "ipma":
            _read_associations(file, Bits(data[a:b]))
    return file


def _boxes(data: bytes, begin: int, end: int, once: tuple[str, ...] = ()) -> Iterator[tuple[str, int, int]]:
    """Yield kind, begin and end of the body of each box. A kind in ``once`` that comes again is a fault."""
    seen: list[str] = []
    while begin < end:
        if begin + 8 > end or len(seen) > MAX_ITEMS:
            raise ValueError
        size, kind, head = (
            int.from_bytes(data[begin : begin + 4], "big"),
            data[begin + 4 : begin + 8].decode("latin-1"),
            8,
        )
        if size == 1:
            size, head = int.from_bytes(data[begin + 8 : begin + 16], "big"), 16
        size = size or end - begin
        if size < head or begin + size > end or (kind in once and kind in seen):
            raise ValueError
        seen.append(kind)
        yield kind, begin + head, begin + size
        begin += size


def _read_items(file: HeifFile, data: bytes, begin: int, end: int) -> None:
    counted = 4 + (2 if data[begin] == 0 else 4)
    for kind, a, b in _boxes(data, begin + counted, end):
        version = data[a]
        wide = 4 if version == 3 else 2
        at = a + 4 + wide + 2
        number = int.from_bytes(data[a + 4 : a + 4 + wide], "big")
        if kind != "infe" or version not in (2, 3) or at + 4 > b or number in file.items:
            raise ValueError
        file.items[number] = _Item(data[at : at + 4].decode("latin-1"), at)


def _read_places(file: HeifFile, data: bytes, inner: dict[str, tuple[int, int]]) -> None:
    """Read where the bytes of each item lie, and the bytes of those that hold frames."""
    bits = Bits(data[slice(*inner["iloc"])])
    version = bits.take(32) >> 24
    wide = [8 * bits.take(4) for _ in range(4)]  # offset, length, base and index
    parts = 0
    for _ in range(_few(bits.take(16 if version < 2 else 32))):
        number = bits.take(16 if version < 2 else 32)
        method = bits.take(16) & 15 if version else 0
        elsewhere, base = bits.take(16), bits.take(wide[2])
        item, pieces = file.items.get(number), []
        count = bits.take(16)
        parts = _few(parts + count)
        for _ in range(count):
            bits.take(wide[3] if version else 0)
            offset, length = base + bits.take(wide[0]), bits.take(wide[1])
            whole = (0, len(data)) if method == 0 else inner["idat"]
            begin, finish = whole[0] + offset, whole[0] + offset + length if length else whole[1]
            if finish > whole[1] or method > 1 or elsewhere:
                raise ValueError
            pieces.append(data[begin:finish] if item and item.kind in CODED else b"")
        if item:
            if item.data or sum(map(len, pieces)) > len(data):
                raise ValueError
            item.data = b"".join(pieces)


def _read_references(file: HeifFile, data: bytes, begin: int, end: int) -> None:
    wide = 16 if data[begin] == 0 else 32
    total = 0
    for kind, a, b in _boxes(data, begin + 4, end):
        bits = Bits(data[a:b])
        source, count = bits.take(wide), bits.take(16)
        total += count
        if total > 4 * MAX_ITEMS:
            raise ValueError
        targets = [bits.take(wide) for _ in range(count)]
        if kind == "dimg":
            file.tiles.setdefault(source, []).extend(targets)
        elif kind == "auxl":
            for one in targets:
                file.beside.setdefault(one, []).append(source)


def _read_associations(file: HeifFile, bits: Bits) -> None:
    head = bits.take(32)
    wide = 15 if head & 1 else 7
    for _ in range(_few(bits.take(32))):
        item = file.items.get(bits.take(16 if head >> 24 == 0 else 32))
        for _ in range(bits.take(8)):
            bits.take(1)
            at = bits.take(wide)
            if item and at:
                item.properties.append(at - 1)


def _damaged(kind: str, data: bytes) -> BadImage:
    return BadImage(f"the {kind} image is cut off or damaged ({len(data):,} bytes). Send the whole file.")


def _few(count: int) -> int:
    if count > MAX_ITEMS:
        raise ValueError
    return count


def _avif_reader() -> type[ImageFile]:
    try:
        from PIL import AvifImagePlugin
    except ImportError:
        raise MissingDecoder("an AVIF image needs Pillow 11.3 or newer. pip install --upgrade pillow") from None
    if not AvifImagePlugin.SUPPORTED:
        raise MissingDecoder("this build of Pillow reads no AVIF. Install Pillow's own wheel: pip install pillow")
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # whoever decodes many pictures has a thread for each already
    return AvifImagePlugin.AvifImageFile


def _heic_reader() -> type[ImageFile]:
    """Import pillow-heif, or its twin pi-heif, whose wheel holds no encoder and so none under x265's licence."""
    for name in ("pillow_heif", "pi_heif"):
        try:
            package = import_module(name)
        except ImportError:
            continue
        package.options.DECODE_THREADS = 1  # as above
        reader: type[ImageFile] = package.HeifImageFile
        return reader
    raise MissingDecoder(
        "a HEIC image needs pillow-heif, which is not installed. Use pip install 'pkd[heif]', or send JPEG."
    )
