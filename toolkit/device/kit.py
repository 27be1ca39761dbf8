"""Write the conformance kit of a bundle, and grade what a device made of it.

The kit is a folder of JSON and raw bytes that needs no Python to read (docs/device.md). Each step takes the *given*
output of the step before it, so that a wrong result names its own step::

    photograph ─decode→ RGB ─(landmarks given)→ matrix ─→ crop ─→ embedding ─→ encodings ─→ request body

A device writes one JSON file with what it computed (``DeviceReport``); ``grade`` says for every picture which step
deviates first, and by how much. The detector is the device's own choice: where it reports landmarks, its embedding of
the whole way is compared with pkd's own from those landmarks; they themselves are compared with pkd's YuNet only if
the kit was written with a detector.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.models import Record
from pkd.toolkit.device.photographs import photographs
from pkd.toolkit.encoders.base import Encoder, open_bundle
from pkd.toolkit.encoders.detector import Detector, choose
from pkd.toolkit.images.alignment import SIZE, TEMPLATE, similarity, warp
from pkd.toolkit.images.codec import Rgb, decode_rgb

KIT = "kit.json"
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


class Grade(Record):
    """Grade one step of one photograph. ``deviation`` and ``allowed`` are in the unit of the step's tolerance."""

    case: str
    step: Step
    result: Literal["ok", "deviates", "not reported"]
    deviation: float | None = None
    allowed: float | None = None
    detail: str = ""


def write_kit(bundle: Bundle, folder: Path, detector: Detector | None = None) -> Kit:
    """Write the kit of a bundle's encoder into ``folder``, which must not exist or be empty. Raises InputError.

    ``detector``: its landmarks are added, for devices that run the same one.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is not empty. Give a new folder for the device kit.")
    encoder = open_bundle(bundle)
    info = encoder.info
    size = info.preprocess.size
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for photograph in photographs():
        name = photograph.name
        rgb = decode_rgb(photograph.data)
        matrix = similarity(photograph.landmarks, template(size))
        crop = warp(rgb, photograph.landmarks, size)
        embedding = encoder.embed(crop[None])[0]
        files = {
            name: photograph.data,
            f"{name}.rgb.gz": gzip.compress(rgb.tobytes(), 9, mtime=0),
            f"{name}.crop.rgb": crop.tobytes(),
            f"{name}.embedding.f32": embedding.astype("<f4").tobytes(),
        }
        for file, data in files.items():
            (folder / file).write_bytes(data)
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
    kit = Kit(
        encoder=info.id,
        space=info.space.id,
        dim=info.space.dim,
        size=size,
        template=_points(template(size)),
        tolerances=Tolerances(),
        cases=tuple(cases),
    )
    (folder / KIT).write_text(kit.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return kit


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


def read_kit(folder: Path) -> Kit:
    """Read ``kit.json``. Raises InputError where it is missing, broken or of another schema."""
    path = folder / KIT
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema_version") != SCHEMA:
            raise InputError(f"{path}: schema {data.get('schema_version')}, not {SCHEMA}. Write the kit anew.")
        return Kit.model_validate(data)
    except (OSError, ValueError, AttributeError, ValidationError) as error:
        raise InputError(f"{path}: cannot be read as a device kit ({_first(error)}). Write it anew.") from None


def read_report(path: Path) -> DeviceReport:
    """Read what a device computed. Raises InputError naming the field that is wrong."""
    try:
        return DeviceReport.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from None
    except ValidationError as error:
        raise InputError(f"{path}: is no device report ({_first(error)}). docs/device.md shows one.") from None


def grade(folder: Path, kit: Kit, report: DeviceReport, encoder: Encoder) -> list[Grade]:
    """Compare a device's report with the kit, step by step, in the order of the pipeline.

    ``encoder``: the bundle's own, which embeds from the landmarks that the device found. Raises InputError where the
    report is of another encoder or names a photograph that the kit has not.
    """
    if report.encoder != kit.encoder:
        raise InputError(
            f"the device ran {report.encoder}, the kit is of {kit.encoder}. Update the student, or use its own kit."
        )
    unknown = sorted(set(report.cases) - {case.name for case in kit.cases})
    if unknown:
        raise InputError(f"the report names {unknown[0]}, which is not in the kit. Its first is {kit.cases[0].name}.")
    grades: list[Grade] = []
    for case in kit.cases:
        made = report.cases.get(case.name, DeviceCase())
        found = {g.step: g for g in _grades(folder, kit, case, made, encoder)}
        grades += [found.get(step, Grade(case=case.name, step=step, result="not reported")) for step in STEPS]
    return grades


def _grades(folder: Path, kit: Kit, case: Case, made: DeviceCase, encoder: Encoder) -> Iterator[Grade]:
    allowed = kit.tolerances
    if made.rgb_sha256 is not None or made.rgb_base64 is not None:
        yield _decoded(folder, case, made, allowed.decode_mean)
    if made.matrix is not None:
        wanted, got = np.array(case.matrix), np.array(made.matrix)
        scale = float(np.hypot(wanted[0, 0], wanted[1, 0]))
        off = np.abs(got - wanted) / np.array([scale, scale, kit.size])
        yield _judge(case, "matrix", float(off.max()), allowed.matrix)
    if made.crop_base64 is not None:
        crop = _bytes(made.crop_base64, "crop_base64", case.name)
        yield _pixels(case, "crop", crop, (folder / case.crop).read_bytes(), float(allowed.crop), worst=True)
    vector = np.frombuffer((folder / case.embedding).read_bytes(), "<f4").astype(np.float64)
    if made.embedding is not None:
        yield _vector(case, "embedding", np.array(made.embedding), vector, allowed.embedding, allowed.norm)
    if made.encodings:
        wrong = sorted(name for name, text in made.encodings.items() if case.encodings.get(name) != text)
        yield _judge(case, "encoding", float(len(wrong)), 0.0, f"differ: {', '.join(wrong)}" if wrong else "")
    if made.request is not None:
        different = [
            key for key in sorted({*case.request, *made.request}) if case.request.get(key) != made.request.get(key)
        ]
        yield _judge(
            case, "request", float(len(different)), 0.0, f"differ: {', '.join(different)}" if different else ""
        )
    if made.landmarks is None:
        return
    points = np.array(made.landmarks, np.float64)
    if points.shape != (len(case.landmarks), 2):
        yield _refuse(case, "landmarks", f"{len(points)} points, not {len(case.landmarks)}")
        return
    if case.detected is not None:
        far = float(np.linalg.norm(points - np.array(case.detected), axis=1).max())
        yield _judge(case, "landmarks", far, allowed.landmarks)
    if made.whole is not None:
        rgb = np.frombuffer(gzip.decompress((folder / case.rgb).read_bytes()), np.uint8)
        crop = warp(rgb.reshape(case.height, case.width, 3), points, kit.size)
        wanted = encoder.embed(crop[None])[0].astype(np.float64)
        yield _vector(case, "whole", np.array(made.whole), wanted, allowed.whole, allowed.norm)


def _judge(case: Case, step: Step, deviation: float, allowed: float, detail: str = "") -> Grade:
    result: Literal["ok", "deviates"] = "ok" if deviation <= allowed else "deviates"  # NaN deviates
    return Grade(case=case.name, step=step, result=result, deviation=deviation, allowed=allowed, detail=detail)


def _refuse(case: Case, step: Step, detail: str) -> Grade:
    return Grade(case=case.name, step=step, result="deviates", detail=detail)


def _decoded(folder: Path, case: Case, made: DeviceCase, allowed: float) -> Grade:
    if made.rgb_sha256 == case.rgb_sha256:
        return _judge(case, "decode", 0.0, allowed)
    if made.rgb_base64 is None:
        return _refuse(case, "decode", "other pixels; report rgb_base64, too, to learn by how much")
    pixels = _bytes(made.rgb_base64, "rgb_base64", case.name)
    return _pixels(case, "decode", pixels, gzip.decompress((folder / case.rgb).read_bytes()), allowed, worst=False)


def _pixels(case: Case, step: Step, got: Rgb, wanted: bytes, allowed: float, *, worst: bool) -> Grade:
    """Compare pixels by their largest difference, or by its mean."""
    if got.size != len(wanted):
        return _refuse(case, step, f"{got.size:,} bytes, not {len(wanted):,}")
    off = np.abs(got.astype(int) - np.frombuffer(wanted, np.uint8))
    return _judge(case, step, float(off.max() if worst else off.mean()), allowed)


def _vector(
    case: Case, step: Step, got: NDArray[np.float64], wanted: NDArray[np.float64], allowed: float, norm_allowed: float
) -> Grade:
    if got.shape != wanted.shape:
        return _refuse(case, step, f"{got.size:,} numbers, not {wanted.size:,}")
    norm = float(np.linalg.norm(got))
    if not abs(norm - 1) <= norm_allowed:
        return _judge(case, step, abs(norm - 1), norm_allowed, f"its length is {norm:.4g}, not 1")
    return _judge(case, step, max(0.0, 1 - float(got @ wanted) / (norm * float(np.linalg.norm(wanted)))), allowed)


def _bytes(text: str, field: str, case: str) -> Rgb:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    except (binascii.Error, ValueError):
        raise InputError(f"the report's {field} of {case} is not base64.") from None


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
