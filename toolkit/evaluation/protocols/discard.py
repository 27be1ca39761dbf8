"""Show for each measure of quality what discarding the worst photographs buys (``pkd-evaluate --protocol reject``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pkd.toolkit.core.progress import Progress
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.files import ImageFiles
from pkd.toolkit.data.quality_file import QUALITY_FILE, read_quality
from pkd.toolkit.evaluation.metrics.discard import FRACTIONS, discard_curve, genuine_pairs
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Pairing
from pkd.toolkit.evaluation.protocols.all_pairs import cross_matrix, pair_up
from pkd.toolkit.evaluation.protocols.common import EncoderSet, EvaluationOptions, ProtocolResult, embed
from pkd.toolkit.evaluation.results.schema import Discard
from pkd.toolkit.images.quality import MEASURES, FaceQuality, Measure, measure_face

TARGET = 1e-3
"""False match rate whose threshold is held, or the smallest above it that is resolved."""
MIN_PAIRS = 100
"""Fewest genuine pairs with a value on both sides that a curve is drawn of."""
RESAMPLES = 200


def discard_curves(
    faces: FaceSet, name: str, encoder_set: EncoderSet, options: EvaluationOptions, progress: Progress
) -> ProtocolResult:
    """Compare all pairs of ``faces``, then discard genuine pairs by each measure of quality.

    Sharpness and exposure are measured on the crops. Inter-eye distance and pose come from the ``quality.csv`` that
    pkd-align writes beside its crops; without one their curves are left out, and the report says so.
    """
    done = cross_matrix(faces, name, encoder_set, options, progress)
    qualities = measure_set(faces, progress)
    _, plain = pair_up(faces, faces, name, options.cache)
    curves: list[Discard] = []
    for comparison in done.evaluation.comparisons:
        points = [p for p in comparison.points if p.fmr >= TARGET]
        q, g = comparison.name.split("–")
        if not points or not {q, g} <= {"T", "S"}:
            continue
        point = min(points, key=lambda p: p.fmr)
        vectors = [embed(encoder_set.encoders[letter], faces, options, progress) for letter in (q, g)]
        pairing = Pairing(
            plain.query, plain.gallery, plain.query_file, plain.gallery_file, plain.identities, unordered=q == g
        )
        pairs = genuine_pairs(pairing, *vectors)
        missed = pairs.score < point.threshold
        with progress(f"discarding {comparison.name}", len(MEASURES)) as advance:
            for measure in MEASURES:
                values = _values(measure, qualities)
                worse = np.minimum(values[pairs.query], values[pairs.gallery])
                known = np.isfinite(worse)
                advance(1)
                if known.sum() < MIN_PAIRS or len(np.unique(worse[known])) < 2:
                    continue
                found = discard_curve(
                    missed[known],
                    pairs.identity[known],
                    worse[known],
                    resamples=min(options.resamples, RESAMPLES),
                    seed=options.seed,
                )
                curves.append(
                    Discard(
                        name=comparison.name,
                        measure=measure.name,
                        unit=measure.unit,
                        says=measure.says,
                        standard=measure.standard,
                        better=measure.better,
                        fmr=point.fmr,
                        threshold=point.threshold,
                        images=int(np.isfinite(values).sum()),
                        pairs=int(known.sum()),
                        identities=len(np.unique(pairs.identity[known])),
                        fractions=FRACTIONS,
                        limits=tuple(np.abs(found.cut).tolist()),
                        fnmr=tuple(found.fnmr.tolist()),
                        ci95=tuple(zip(found.low.tolist(), found.high.tolist(), strict=True)),
                        change=tuple(found.change.tolist()),
                        change_ci95=tuple(zip(found.change_low.tolist(), found.change_high.tolist(), strict=True)),
                    )
                )
    evaluation = done.evaluation.model_copy(
        update={"discards": tuple(curves), "notes": (*done.evaluation.notes, *_notes(qualities, curves))}
    )
    return ProtocolResult(evaluation, done.resample_values, done.certificates)


def measure_set(faces: FaceSet, progress: Progress) -> list[FaceQuality]:
    """Measure every crop, and take what was measured of its photograph from ``quality.csv``."""
    known: dict[Path, dict[str, FaceQuality]] = {}
    found: list[FaceQuality] = []
    size = faces.crop_size()
    with progress("measuring quality", len(faces)) as advance:
        for index in range(len(faces)):
            source, row = faces.images.locate(int(faces.rows[index]))
            measured = None
            if isinstance(source, ImageFiles):
                if source.root not in known:
                    known[source.root] = read_quality(source.root)
                measured = known[source.root].get(source.name(row))
            own = measure_face(faces.load([index], size)[0])
            photograph = (
                {n: getattr(measured, n) for n in ("inter_eye", "yaw", "pitch", "roll", "occlusion")}
                if measured
                else {}
            )
            found.append(FaceQuality(own.sharpness, own.exposure, **photograph))
            advance(1)
    return found


def _values(measure: Measure, qualities: list[FaceQuality]) -> Doubles:
    """List the values so that the higher one is the better; NaN where there is none."""
    values = np.array([getattr(one, measure.name) for one in qualities], np.float64)
    return -np.abs(values) if measure.better == "low" else values


def _notes(qualities: list[FaceQuality], curves: list[Discard]) -> list[str]:
    drawn = {one.measure for one in curves}
    missing = [one.name for one in MEASURES if one.name not in drawn]
    if not missing:
        return []
    why = f"the photographs' measures are in {QUALITY_FILE}, which pkd-align writes beside its crops"
    return [f"No curve for {', '.join(missing)}: too few pairs with different values; {why}."]
