"""Make the conformance kit of an encoder, and read kits and what devices made of them.

The kit is a folder, on its own or within a bundle, of JSON and raw bytes that need no Python to be read
(docs/device.md). Each step takes the *given* output of the step before it, so that a wrong result names its own step::

    photograph ─decode→ RGB ─(landmarks given)→ matrix ─→ crop ─→ embedding ─→ encodings ─→ request body

A device writes one JSON file with what it computed (``DeviceReport``); ``grading.grade`` says for every picture which
step deviates first, and by how much. The detector is the device's own choice: where it reports landmarks, its
embedding of the whole way is compared with pkd's own from those landmarks; they themselves are compared with pkd's
YuNet only if the kit was written with a detector.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.models import Record
from pkd.toolkit.core.text import read_text
from pkd.toolkit.device.photographs import photographs
from pkd.toolkit.encoders.base import Encoder
from pkd.toolkit.encoders.detector import Detector, choose
from pkd.toolkit.images.alignment import SIZE, TEMPLATE, similarity, warp
from pkd.toolkit.images.codec import Rgb, decode_rgb

KIT = "kit.json"
IN_BUNDLE = "device-kit/"
"""Folder of the kit within a bundle."""
SCHEMA = 1
Step = Literal["decode", "landmarks", "matrix", "crop", "embedding", "encoding", "request", "whole"]
STEPS: tuple[Step, ...] = ("decode", "matrix", "crop", "embedding", "encoding", "request", "landmarks", "whole")
"""Steps in the order of the pipeline; the last two depend on the device's detector and are not asked of all."""


class Tolerances(Record):
    """Say how far a device may be from the kit."""

    decode_mean: float = 1.0
    """Mean absolute difference of decoded pixels, grey levels; decoders of JPEG and WebP round differently."""
    matrix: float = 1e-4
    """Largest difference of a matrix element, relative to the matrix's scale; of the shifts, in crop pixels."""
    crop: int = 2
    """Largest difference of a crop's pixel, grey levels, from the given picture and matrix."""
    embedding: float = 1e-5
    """1 − cosine, from the given crop."""
    norm: float = 1e-3
    """Largest distance of an embedding's length from 1."""
    landmarks: float = 0.05
    """Largest distance of a detected point from that of pkd's detector, pixels of the photograph."""
    whole: float = 1e-4
    """1 − cosine from photograph to embedding, against pkd's own from the landmarks that the device reports."""


class Case(Record):
    """Hold one photograph and what each step makes of it. Files lie in the kit's folder."""

    name: str
    shows: str
    photograph: str
    sha256: str
    width: int
    height: int
    rgb: str
    """Decoded and upright: height × width × 3 bytes RGB, gzip."""
    rgb_sha256: str
    """SHA-256 of the decoded bytes."""
    landmarks: tuple[tuple[float, float], ...]
    """Five points x, y in pixels, a pixel's centre at whole numbers: image-left eye, other eye, nose, mouth corners."""
    detected: tuple[tuple[float, float], ...] | None = None
    """The same five points as pkd's detector finds them in the decoded picture, where the kit has a detector."""
    matrix: tuple[tuple[float, float, float], tuple[float, float, float]]
    """Two rows, made from ``landmarks``, that take (x, y, 1) of the photograph to x and y of the crop."""
    crop: str
    """size × size × 3 bytes RGB."""
    embedding: str
    """D little-endian float32."""
    encodings: dict[str, str]
    """Encoding → the base64 text of the embedding."""
    request: dict[str, object]
    """Body of POST /v1/verify that compares the embedding with a subject."""


class Kit(Record):
    """Hold what ``kit.json`` says."""

    schema_version: Literal[1] = 1
    encoder: str
    space: str
    dim: int
    size: int
    """Height and width of a crop, pixels."""
    template: tuple[tuple[float, float], ...]
    tolerances: Tolerances
    cases: tuple[Case, ...]


class DeviceCase(Record):
    """Hold what a device computed for one photograph. Everything may be left out; what is left out is not checked."""

    rgb_sha256: str | None = None
    rgb_base64: str | None = None
    """Decoded pixels; only needed where their hash differs."""
    landmarks: tuple[tuple[float, float], ...] | None = None
    """Five points as the device's own detector found them."""
    matrix: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None
    """Matrix made of the kit's landmarks."""
    crop_base64: str | None = None
    """Crop made of the kit's pixels and matrix."""
    embedding: tuple[float, ...] | None = None
    """Embedding made of the kit's crop."""
    encodings: dict[str, str] = Field(default_factory=dict)
    """Encodings made of the kit's embedding."""
    request: dict[str, object] | None = None
    """Request made of the kit's embedding."""
    whole: tuple[float, ...] | None = None
    """Embedding from the photograph by the device's own detector and steps."""


class DeviceReport(Record):
    """Hold the one JSON file that a device writes."""

    device: str
    """Make, model or program, for people to read."""
    encoder: str
    """Id of the encoder that ran."""
    cases: dict[str, DeviceCase]
    """Name of the kit's case → what was computed."""


@dataclass(frozen=True)
class OpenKit:
    """Hold a kit and the way to its files."""

    kit: Kit
    read: Callable[[str], bytes]
    """Name of a file that the kit states → its bytes."""


def make_kit(
    encoder: Encoder, detector: Detector | None = None, *, tolerance: float = Tolerances().embedding
) -> dict[str, bytes]:
    """Compute the kit of ``encoder`` → file name to content, ``kit.json`` among them.

    ``detector``: its landmarks are added, for devices that run the same one. ``tolerance``: 1 − cosine that a device's
    embedding of a given crop may be away; end to end ten times as much, where that is little.
    """
    info = encoder.info
    size = info.preprocess.size
    files: dict[str, bytes] = {}
    cases = []
    for photograph in photographs():
        name = photograph.name
        rgb = decode_rgb(photograph.data)
        matrix = similarity(photograph.landmarks, template(size))
        crop = warp(rgb, photograph.landmarks, size)
        embedding = encoder.embed(crop[None])[0]
        files |= {
            name: photograph.data,
            f"{name}.rgb.gz": gzip.compress(rgb.tobytes(), 9, mtime=0),
            f"{name}.crop.rgb": crop.tobytes(),
            f"{name}.embedding.f32": embedding.astype("<f4").tobytes(),
        }
        cases.append(
            Case(
                name=name,
                shows=photograph.shows,
                photograph=name,
                sha256=hashlib.sha256(photograph.data).hexdigest(),
                width=rgb.shape[1],
                height=rgb.shape[0],
                rgb=f"{name}.rgb.gz",
                rgb_sha256=hashlib.sha256(rgb.tobytes()).hexdigest(),
                landmarks=_points(photograph.landmarks),
                detected=_detected(detector, rgb),
                matrix=_rows(matrix),
                crop=f"{name}.crop.rgb",
                embedding=f"{name}.embedding.f32",
                encodings=encodings(embedding),
                request=request_body(embedding, info.id),
            )
        )
    usual = Tolerances()
    kit = Kit(
        encoder=info.id,
        space=info.space.id,
        dim=info.space.dim,
        size=size,
        template=_points(template(size)),
        tolerances=Tolerances(embedding=max(usual.embedding, tolerance), whole=max(usual.whole, tolerance)),
        cases=tuple(cases),
    )
    return {KIT: (kit.model_dump_json(indent=1) + "\n").encode(), **files}


def write_kit(
    encoder: Encoder,
    folder: Path,
    detector: Detector | None = None,
    *,
    tolerance: float = Tolerances().embedding,
) -> Kit:
    """Write the kit of ``encoder`` into ``folder``, which must not exist or be empty. Raises InputError.

    The other arguments are those of ``make_kit``.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is not empty. Give a new folder for the device kit.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in make_kit(encoder, detector, tolerance=tolerance).items():
        (folder / name).write_bytes(data)
    return read_kit(folder).kit


def template(size: int) -> NDArray[np.float64]:
    """Give the five points of an aligned crop of ``size`` pixels → float64 5×2."""
    return TEMPLATE * (size / SIZE)


def encodings(embedding: NDArray[np.float32]) -> dict[str, str]:
    """Write a unit vector in every form that the REST API takes as text (docs/api.md)."""
    scaled = np.rint(embedding * (127.0 / np.abs(embedding).max()))
    forms = {"b64_f32": embedding.astype("<f4"), "b64_f16": embedding.astype("<f2"), "b64_i8": scaled.astype("i1")}
    return {name: base64.b64encode(values.tobytes()).decode() for name, values in forms.items()}


def request_body(embedding: NDArray[np.float32], encoder: str) -> dict[str, object]:
    """Make the body of POST /v1/verify that asks whether an embedding is of an enrolled subject."""
    text = encodings(embedding)["b64_f16"]
    return {
        "a": {"embedding": text, "encoding": "b64_f16", "encoder": encoder},
        "b": {"gallery": "GALLERY", "subject": "SUBJECT"},
    }


def read_kit(folder: Path) -> OpenKit:
    """Read the kit in a folder. Raises InputError where it is missing, broken or of another schema."""

    def read(name: str) -> bytes:
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise InputError(f"{folder / name}: {error.strerror or error}. Write the device kit anew.") from None

    return OpenKit(_parse(read(KIT), folder / KIT), read)


def kit_of(bundle: Bundle) -> OpenKit:
    """Read the kit within a bundle. Raises InputError for a bundle without one, or as ``read_kit``."""
    if IN_BUNDLE + KIT not in bundle.manifest.files:
        raise InputError(
            f"{bundle.path}: holds no device kit. Pass --device-kit DIR, or put one in: pkd-export … --device-kit."
        )

    def read(name: str) -> bytes:
        return bundle.read(IN_BUNDLE + name)

    return OpenKit(_parse(read(KIT), bundle.path / IN_BUNDLE / KIT), read)


def _parse(data: bytes, path: Path) -> Kit:
    try:
        stated = json.loads(data)
        if stated.get("schema_version") != SCHEMA:
            raise InputError(f"{path}: schema {stated.get('schema_version')}, not {SCHEMA}. Write the kit anew.")
        return Kit.model_validate(stated)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read as a device kit ({_first(error)}). Write it anew.") from None


def read_report(path: Path) -> DeviceReport:
    """Read what a device computed. Raises InputError naming the field that is wrong."""
    try:
        return DeviceReport.model_validate_json(read_text(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is no device report, for it is no text. docs/device.md shows one.") from None
    except ValidationError as error:
        raise InputError(f"{path}: is no device report ({_first(error)}). docs/device.md shows one.") from None


def _points(points: NDArray[np.floating]) -> tuple[tuple[float, float], ...]:
    return tuple((float(x), float(y)) for x, y in points)


def _detected(detector: Detector | None, rgb: Rgb) -> tuple[tuple[float, float], ...] | None:
    found = detector.detect(rgb) if detector else []
    return _points(choose(found, rgb).landmarks) if found else None


def _rows(matrix: NDArray[np.float64]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    (a, b, c), (d, e, f) = matrix.tolist()
    return (a, b, c), (d, e, f)


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        one = error.errors()[0]
        return f"{'.'.join(map(str, one['loc']))}: {one['msg']}"
    return str(error).splitlines()[0]
