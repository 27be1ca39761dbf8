"""Draw synthetic photographs whose face and five points are known, in the file forms that phones and browsers meet."""

from __future__ import annotations

import io
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
    """RGB, L (grey) or RGBA, as Pillow names them."""


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


def _file(picture: Rgb, scene: _Scene) -> bytes:
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
        image = image.convert(scene.mode)
    form = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[scene.name.rpartition(".")[2]]
    buffer = io.BytesIO()
    image.save(buffer, form, exif=exif, **({} if form == "PNG" else {"quality": 92}))
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
)
