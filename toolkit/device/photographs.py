"""Draw synthetic photographs whose face and five points are known, in the file forms that phones and browsers meet."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pkd.toolkit.images.alignment import TEMPLATE
from pkd.toolkit.images.codec import Rgb
from pkd.toolkit.synthetic.faces import Conditions, draw, random_identity

SEED = 4711
ORIENTATION = 0x0112
"""EXIF tag that says how a picture is to be turned."""


@dataclass(frozen=True)
class Photograph:
    """Hold a picture file and where its face is. ``landmarks``: float64 5×2 pixels of the upright, decoded picture."""

    name: str
    """Last part of the file's name is its form: ``plain.png``."""
    data: bytes
    landmarks: NDArray[np.float64]
    shows: str
    """The fault of devices that this picture catches."""


@dataclass(frozen=True)
class _Scene:
    name: str
    shows: str
    width: int
    height: int
    scale: float
    """Pixels of the picture per pixel of an aligned crop."""
    turn: float
    """Degrees, clockwise as seen."""
    centre: tuple[float, float]
    """Middle of the crop, as a share of width and height."""
    orientation: int = 1
    """EXIF orientation, 1–8: the file holds the picture turned, with the tag that turns it back."""
    mode: str = "RGB"
    """RGB, L (grey), RGBA or P (palette), as Pillow names them; or ``16``: RGB of 16 bits a channel."""
    profile: bytes = b""
    """ICC profile that the file says its numbers are in."""


def photographs() -> list[Photograph]:
    """Draw all pictures of the kit; the same bytes for the same numpy, OpenCV and Pillow."""
    return [_draw(number, scene) for number, scene in enumerate(SCENES)]


def _draw(number: int, scene: _Scene) -> Photograph:
    face = draw(random_identity(SEED, number), Conditions(scene=number))
    angle = np.deg2rad(scene.turn)
    linear = scene.scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = np.array([scene.centre[0] * scene.width, scene.centre[1] * scene.height]) + 0.3
    matrix = np.column_stack([linear, middle - linear @ np.array([55.5, 55.5])])
    picture = _background(number, scene)
    size = (scene.width, scene.height)
    cv2.warpAffine(face, matrix, size, picture, cv2.INTER_CUBIC, cv2.BORDER_TRANSPARENT)
    picture = cv2.GaussianBlur(picture, (0, 0), 0.5).astype(np.uint8, copy=False)
    return Photograph(scene.name, _file(picture, scene), TEMPLATE @ linear.T + matrix[:, 2], scene.shows)


def _background(number: int, scene: _Scene) -> Rgb:
    random = np.random.default_rng([SEED, number])
    coarse = random.uniform(60, 190, (5, 5, 3)).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (scene.width, scene.height), interpolation=cv2.INTER_CUBIC)).astype(np.uint8)


def display_p3() -> bytes:
    """Build an ICC profile (version 2, matrix and curves) of Display P3's primaries with a gamma of 2.2."""

    def xyz(x: float, y: float, z: float) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in (x, y, z)))

    name = b"Display P3\0"
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78 + 1),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": xyz(0.9642, 1, 0.8249),  # of D50, which the three columns below are adapted to
        b"rXYZ": xyz(0.5151, 0.2412, -0.0011),
        b"gXYZ": xyz(0.2919, 0.6922, 0.0419),
        b"bXYZ": xyz(0.1572, 0.0666, 0.7841),
        **{channel + b"TRC": curve for channel in (b"r", b"g", b"b")},
    }
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">II", offset + len(body), len(data))
        body += data
    content = struct.pack(">I", len(tags)) + table + body
    stamp = struct.pack(">6H", 2020, 1, 1, 0, 0, 0)
    head = struct.pack(">I4sI", 128 + len(content), bytes(4), 0x02400000) + b"mntrRGB XYZ " + stamp + b"acsp"
    return head.ljust(68, b"\0") + xyz(0.9642, 1, 0.8249)[8:] + bytes(48) + content


def _file(picture: Rgb, scene: _Scene) -> bytes:
    if scene.mode == "16":  # every low byte is 255: rounding to the nearest byte would be off by one
        deep = picture[:, :, ::-1].astype(np.uint16) * 256 + 255
        return bytes(cv2.imencode(".png", deep)[1])
    image = Image.fromarray(picture)
    turned = {
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    if scene.orientation != 1:
        image = image.transpose(turned[scene.orientation])
        exif[ORIENTATION] = scene.orientation
    if scene.mode == "RGBA":  # the colours go on below what is transparent
        alpha = np.linspace(0, 255, image.width).round().astype(np.uint8)
        image.putalpha(Image.fromarray(np.tile(alpha, (image.height, 1))))
    else:
        image = image.convert(scene.mode)  # colours of a palette are web-safe ones, dithered
    form = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[scene.name.rpartition(".")[2]]
    buffer = io.BytesIO()
    image.save(buffer, form, exif=exif, icc_profile=scene.profile or None, **({} if form == "PNG" else {"quality": 92}))
    return buffer.getvalue()


SCENES = (
    _Scene("plain.png", "channel order, template, sampling", 320, 400, 1.6, 0, (0.5, 0.5)),
    _Scene("turned.png", "the similarity's rotation", 320, 320, 1.4, 27, (0.48, 0.52)),
    _Scene("photo.jpg", "JPEG decoding", 400, 320, 1.3, -8, (0.4, 0.5)),
    _Scene("large.jpg", "averaging of faces larger than the crop", 900, 1000, 6.4, 5, (0.5, 0.5)),
    _Scene("rim.png", "black beyond the picture's border", 260, 240, 1.5, 0, (0.9, 0.55)),
    _Scene("tiny.png", "enlarging", 120, 110, 0.45, -12, (0.5, 0.5)),
    _Scene("odd.webp", "WebP, odd sides", 333, 251, 1.2, 14, (0.55, 0.5)),
    _Scene("exif3.jpg", "EXIF orientation 3", 300, 280, 1.3, 0, (0.45, 0.5), orientation=3),
    _Scene("exif6.jpg", "EXIF orientation 6", 240, 320, 1.3, 4, (0.5, 0.45), orientation=6),
    _Scene("exif8.png", "EXIF orientation 8 in PNG", 240, 300, 1.2, -5, (0.5, 0.5), orientation=8),
    _Scene("exif6.webp", "EXIF orientation 6 in WebP", 240, 300, 1.2, 9, (0.5, 0.5), orientation=6),
    _Scene("exif7.jpg", "EXIF orientation 7, mirrored", 260, 300, 1.2, 3, (0.5, 0.5), orientation=7),
    _Scene("grey.jpg", "one channel", 280, 300, 1.3, 0, (0.5, 0.5), mode="L"),
    _Scene("alpha.png", "alpha is dropped, not blended", 280, 300, 1.3, 0, (0.5, 0.5), mode="RGBA"),
    _Scene("palette.png", "a palette", 270, 290, 1.3, 6, (0.5, 0.5), mode="P"),
    _Scene("deep.png", "16 bits a channel", 250, 290, 1.2, -4, (0.5, 0.5), mode="16"),
    _Scene("distant.jpg", "a small face of a large photograph, looked at twice", 1100, 800, 0.9, -3, (0.35, 0.4)),
    _Scene("p3.jpg", "the profile of Display P3 is ignored", 290, 300, 1.3, 8, (0.5, 0.5), profile=display_p3()),
)
