"""Grade what a device computed for a conformance kit, step by step, each from the kit's output of the step before."""

from __future__ import annotations

import base64
import binascii
import gzip
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.models import Record
from pkd.toolkit.device.kit import STEPS, Case, DeviceCase, DeviceReport, OpenKit, Step
from pkd.toolkit.encoders.base import Encoder
from pkd.toolkit.images.alignment import warp
from pkd.toolkit.images.codec import Rgb


class Grade(Record):
    """Grade one step of one photograph. ``deviation`` and ``allowed`` are in the unit of the step's tolerance."""

    case: str
    step: Step
    result: Literal["ok", "deviates", "not reported"]
    deviation: float | None = None
    allowed: float | None = None
    detail: str = ""


def grade(opened: OpenKit, report: DeviceReport, encoder: Encoder) -> list[Grade]:
    """Compare a device's report with the kit, step by step, in the order of the pipeline.

    ``encoder``: the kit's own, which embeds from the landmarks that the device found. Raises InputError where the
    report is of another encoder or names a photograph that the kit has not.
    """
    kit = opened.kit
    if report.encoder != kit.encoder:
        raise InputError(
            f"the device ran {report.encoder}, the kit is of {kit.encoder}. Update the student, or write the kit of "
            "what ran: pkd-verify BUNDLE/targets/NAME --device-kit DIR."
        )
    if encoder.info.id != kit.encoder:
        raise InputError(f"the kit is of {kit.encoder}, the bundle holds {encoder.info.id}. Give the kit's own bundle.")
    unknown = sorted(set(report.cases) - {case.name for case in kit.cases})
    if unknown:
        raise InputError(f"the report names {unknown[0]}, which is not in the kit. Its first is {kit.cases[0].name}.")
    grades: list[Grade] = []
    for case in kit.cases:
        made = report.cases.get(case.name, DeviceCase())
        found = {g.step: g for g in _grades(opened, case, made, encoder)}
        grades += [found.get(step, Grade(case=case.name, step=step, result="not reported")) for step in STEPS]
    return grades


def _grades(opened: OpenKit, case: Case, made: DeviceCase, encoder: Encoder) -> Iterator[Grade]:
    kit, read = opened.kit, opened.read
    allowed = kit.tolerances
    if made.rgb_sha256 is not None or made.rgb_base64 is not None:
        yield _decoded(read(case.rgb), case, made, allowed.decode_mean)
    if made.matrix is not None:
        wanted, got = np.array(case.matrix), np.array(made.matrix)
        scale = float(np.hypot(wanted[0, 0], wanted[1, 0]))
        off = np.abs(got - wanted) / np.array([scale, scale, kit.size])
        yield _judge(case, "matrix", float(off.max()), allowed.matrix)
    if made.crop_base64 is not None:
        crop = _bytes(made.crop_base64, "crop_base64", case.name)
        yield _pixels(case, "crop", crop, read(case.crop), float(allowed.crop), worst=True)
    vector = np.frombuffer(read(case.embedding), "<f4").astype(np.float64)
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
        rgb = np.frombuffer(gzip.decompress(read(case.rgb)), np.uint8)
        crop = warp(rgb.reshape(case.height, case.width, 3), points, kit.size)
        wanted = encoder.embed(crop[None])[0].astype(np.float64)
        yield _vector(case, "whole", np.array(made.whole), wanted, allowed.whole, allowed.norm)


def _judge(case: Case, step: Step, deviation: float, allowed: float, detail: str = "") -> Grade:
    result: Literal["ok", "deviates"] = "ok" if deviation <= allowed else "deviates"  # NaN deviates
    return Grade(case=case.name, step=step, result=result, deviation=deviation, allowed=allowed, detail=detail)


def _refuse(case: Case, step: Step, detail: str) -> Grade:
    return Grade(case=case.name, step=step, result="deviates", detail=detail)


def _decoded(packed: bytes, case: Case, made: DeviceCase, allowed: float) -> Grade:
    if made.rgb_sha256 == case.rgb_sha256:
        return _judge(case, "decode", 0.0, allowed)
    if made.rgb_base64 is None:
        return _refuse(case, "decode", "other pixels; report rgb_base64, too, to learn by how much")
    pixels = _bytes(made.rgb_base64, "rgb_base64", case.name)
    return _pixels(case, "decode", pixels, gzip.decompress(packed), allowed, worst=False)


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
