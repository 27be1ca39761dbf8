"""Check a student against its teacher on held-out people: one accuracy, with its interval."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.encoders.base import Embeddings, Encoder
from pkd.toolkit.encoders.embed import embed_stored
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing

if TYPE_CHECKING:
    from pkd.toolkit.distill.training.setup import Start

REPORT = "report.json"
"""File of the run folder with the map's curve and the check on held-out people."""
FAR = 0.9
"""Share of the teacher's own accuracy below which a student counts as far from it."""
STILL_HELPS = 0.01
"""Gain of the mean cosine over the last step of the curve from which on more images are worth having."""
RISING = 0.005
"""Gain of the mean cosine over the last tenth of the steps from which on a training was still rising."""
FMRS = (1e-3, 1e-2, 1e-1)
"""False match rates tried; the first that the people resolve is reported."""
RESAMPLES = 200


def check_student(
    student: Embeddings, teacher: Embeddings, labels: NDArray[np.int64], info: EncoderInfo
) -> Mapping[str, Any]:
    """Measure S–T and T–T of images N×D (unit rows) by identity ``labels``; −1 is left out.

    Returns ``fmr``, ``tar`` and ``interval`` (S–T, every identity weighing the same, 95 %) and ``teacher`` (T–T); or
    ``unresolved``, the reason, where the people are too few for any rate.
    """
    known = np.flatnonzero(labels >= 0)
    names, owners = np.unique(labels[known], return_inverse=True)
    files = np.arange(len(known))
    pairing = Pairing(owners, owners, files, files, len(names), unordered=False)
    if len(names) < 2 or not pairing.genuine_pairs or not pairing.impostor_pairs:
        return {"unresolved": "no two held-out people with two images each"}
    found: dict[str, Any] = {}
    for name, query in (("S–T", student), ("T–T", teacher)):
        scores = score_pairs(pairing, query[known], teacher[known], seed=0)
        comparison, _ = measure(scores, name, info, info, fmrs=FMRS, resamples=RESAMPLES, seed=0)
        points = sorted(comparison.points, key=lambda point: point.fmr)
        if not points:
            return {"unresolved": comparison.refused[-1].reason}
        if name == "S–T":
            best = points[0]
            found = {"fmr": best.fmr, "tar": best.tar_balanced, "interval": best.tar_balanced_ci95}
        else:
            found["teacher"] = points[0].tar_balanced
    return found


@dataclass(frozen=True)
class StudentReport:
    """Hold what is said after a training: ``content`` for machines and the run folder, ``lines`` for people."""

    content: dict[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


def student_report(
    run: Path, start: Start | None, held_out: FaceSet | None, teacher: Encoder, cache: Path
) -> StudentReport:
    """Check a finished run on held-out people, beside the map that it began with, and write ``report.json``."""
    content: dict[str, Any] = {"map": start.report} if start else {}
    lines: list[str] = []
    if held_out is not None:
        from pkd.toolkit.distill.models.student import load_student

        expected = embed_stored(teacher, held_out, cache=cache)[:]
        kept = load_student(run)
        student = embed_stored(kept, held_out, cache=cache)[:]
        check: dict[str, Any] = {"images": len(held_out), "people": len(held_out.identities)}
        check |= check_student(student, expected, held_out.labels, teacher.info)
        check["cosine"] = float(np.einsum("nd,nd->n", student, expected).mean())
        content["check"] = check
        lines.append(f"student, {_describe(check)}")
        if start:
            content["map_check"] = check_student(start.mapped(held_out), expected, held_out.labels, teacher.info)
            lines.append(f"the map that it began with, {_describe({**check, 'cosine': None, **content['map_check']})}")
        if lost := kept.training.get("lost"):
            content["lost"] = lost
            lines.append(f"The map is kept: the training lost against it. {lost}. Give more images, or less time.")
        gain = None if lost else _gain(run / "log.csv")
        content["advice"] = advice(check, content.get("map_check"), gain)
        lines += [content["advice"]] if content["advice"] else []
    if content:
        (run / REPORT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return StudentReport(content, tuple(lines))


def map_lines(report: Mapping[str, Any]) -> list[str]:
    """Say how the map did on held-out people or images, and whether more images would help."""
    held, curve = report["held_out"], report["curve"]
    lines = [f"map from the {report['layer']} ({report['kind']}), {report['images']:,} images: {_describe(held)}"]
    if len(curve) > 1:
        (before, last) = curve[-2:]
        gain = last["cosine"] - before["cosine"]
        helps = "more images would still help" if gain > STILL_HELPS else "more images would help little"
        lines.append(
            f"cosine {before['cosine']:.3f} with {before['images']:,} images, {last['cosine']:.3f} now: {helps}"
        )
    return lines


def advice(check: Mapping[str, Any], mapped: Mapping[str, Any] | None, gain: float | None) -> str | None:
    """Give one line of advice where the student is weaker than the map, far from the teacher, or still rising."""
    if "tar" not in check:
        return None
    if mapped and "tar" in mapped and mapped["fmr"] == check["fmr"] and check["tar"] < mapped["tar"]:
        return (
            "advice: the training lost against the map alone. Use --method map, or train longer with a smaller --lr "
            "or --trunk-lr."
        )
    if gain is not None and gain > RISING:
        return "advice: the agreement with the teacher was still rising at the end. Give more time or more --epochs."
    if check["tar"] < FAR * check["teacher"]:
        begin = "Give" if mapped else "Start from a mobile face model that exists (--student FILE.onnx), and give"
        return f"advice: far from the teacher. {begin} more faces, also without labels (--unlabelled)."
    return None


def _describe(check: Mapping[str, Any]) -> str:
    who = f"{check['people']:,} held-out people" if check.get("people") else f"{check['images']:,} held-out images"
    cosine = f", mean cosine {check['cosine']:.3f}" if check.get("cosine") is not None else ""
    if "tar" not in check:
        return f"{who}: no accuracy, {check.get('unresolved', 'not measured')}{cosine}"
    low, high = check["interval"]
    return (
        f"{who}: S–T TAR {check['tar']:.1%} ({low:.1%} to {high:.1%}) at FMR {check['fmr']:g}, the teacher alone "
        f"{check['teacher']:.1%}{cosine}"
    )


def _gain(log: Path) -> float | None:
    """Read the rise of the mean cosine from the tenth of the steps before the last one to the last one."""
    try:
        with log.open(encoding="utf-8") as file:
            cosines = [float(row["cosine"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError):
        return None
    tenth = len(cosines) // 10
    if tenth < 10 or not all(map(math.isfinite, cosines[-2 * tenth :])):
        return None
    return float(np.mean(cosines[-tenth:]) - np.mean(cosines[-2 * tenth : -tenth]))
