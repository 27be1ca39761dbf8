"""Fit what a student is measured against: linear maps of an undistilled control into the teacher's space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.progress import Progress
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.files import ImageFiles
from pkd.toolkit.encoders.base import Embeddings, Encoder, unit_rows
from pkd.toolkit.encoders.linear_maps import (
    LinearMapEncoder,
    Moments,
    describe_mapped,
    fit_procrustes,
    fit_ridge,
    moments,
)
from pkd.toolkit.evaluation.metrics.paired import paired
from pkd.toolkit.evaluation.metrics.pairing import Doubles
from pkd.toolkit.evaluation.protocols.common import EncoderSet, EvaluationOptions, describe_data, embed
from pkd.toolkit.evaluation.results.schema import Comparison, Control, Gain, LinearMap, MappingCost

HELD_OUT = 0.2
"""Share of the identities that λ is chosen on."""
PENALTIES = tuple(float(p) for p in np.geomspace(1e-6, 1e-1, 16))
"""λ tried. Unit embeddings of d numbers have variances of about 1/d, so that these go from none to all of it."""


def with_maps(
    encoder_set: EncoderSet,
    fit: FaceSet,
    name: str,
    evaluated: Sequence[FaceSet],
    options: EvaluationOptions,
    progress: Progress,
) -> EncoderSet:
    """Add the maps P (orthogonal Procrustes) and R (affine ridge), fitted on ``fit``, to the encoder set.

    ``evaluated``: the sets that will be measured; none of their people may be in ``fit``. Raises InputError.
    """
    control, teacher = encoder_set.control, encoder_set.teacher
    if control is None:
        raise InputError("--fit-faces goes with --control SPEC, the encoder that is mapped into the teacher's space.")
    for faces in evaluated:
        require_others(fit, faces, name, options)
    if len(fit.identities) < 2 or (fit.labels < 0).any():
        raise InputError(f"{name}: a map needs a folder of images for each of two people or more. Give more faces.")
    x, y = (embed(encoder, fit, options, progress) for encoder in (control, teacher))
    random = np.random.default_rng(options.seed)
    people = random.permutation(len(fit.identities))
    held = np.isin(fit.labels, people[: max(1, round(HELD_OUT * len(people)))])
    seen, unseen = moments(x[~held], y[~held]), moments(x[held], y[held])

    penalty, _ = max(
        ((p, _agreement(x[held], y[held], *fit_ridge(seen, p))) for p in PENALTIES), key=lambda found: found[1]
    )
    maps: dict[str, Encoder] = {}
    described = []
    for letter, kind, word, rate in (
        ("P", "orthogonal Procrustes", "procrustes", None),
        ("R", "affine ridge", "ridge", penalty),
    ):
        weight, bias = _fit(seen + unseen, rate)
        info = describe_mapped(control.info, word, weight, bias, teacher.info.space)
        maps[letter] = LinearMapEncoder(control, weight, bias, info)
        described.append(
            LinearMap(
                letter=letter,
                kind=kind,
                encoder=info.id,
                penalty=rate,
                fit_cosine=_agreement(x, y, weight, bias),
                held_out_cosine=_agreement(x[held], y[held], *_fit(seen, rate)),
            )
        )
    baseline = Control(
        encoder=control.info,
        fit=describe_data(name, fit.digest(), fit.labels),
        held_out_identities=len(np.unique(fit.labels[held])),
        maps=tuple(described),
    )
    return replace(encoder_set, maps=maps, baseline=baseline)


def gains(comparisons: Sequence[Comparison], values: Mapping[str, Doubles]) -> tuple[Gain, ...]:
    """Compare S–T with each baseline of the same gallery, at every rate. ``values``: ``ResampleValues.values``."""
    tar_balanced = {c.name: {p.fmr: p.tar_balanced for p in c.points} for c in comparisons}
    return tuple(
        Gain(
            baseline=name,
            fmr=fmr,
            difference=paired(
                values,
                values,
                (f"S–T/tar_balanced/{fmr:g}", f"{name}/tar_balanced/{fmr:g}"),
                observed=rate - tar_balanced[name][fmr],
            ),
        )
        for name in ("R–T", "P–T", "C–T")
        if name in tar_balanced
        for fmr, rate in tar_balanced.get("S–T", {}).items()
    )


def mapping_costs(comparisons: Sequence[Comparison], values: Mapping[str, Doubles]) -> tuple[MappingCost, ...]:
    """Compare T–M with T–T and S–M with S–T, at every rate that both resolve. ``values``: ``ResampleValues.values``."""
    tar = {c.name: {p.fmr: p.tar_balanced for p in c.points} for c in comparisons}
    return tuple(
        MappingCost(
            pair=pair,
            native=native,
            fmr=fmr,
            native_tar_balanced=tar[native][fmr],
            mapped_tar_balanced=rate,
            difference=paired(
                values,
                values,
                (f"{pair}/tar_balanced/{fmr:g}", f"{native}/tar_balanced/{fmr:g}"),
                observed=rate - tar[native][fmr],
            ),
        )
        for pair, native in (("T–M", "T–T"), ("S–M", "S–T"))
        for fmr, rate in tar.get(pair, {}).items()
        if fmr in tar.get(native, {})
    )


def require_others(fit: FaceSet, evaluated: FaceSet, name: str, options: EvaluationOptions) -> None:
    """Raise InputError where a person or an image of ``evaluated`` is in ``fit``, too, naming the first.

    People are known by the name of their identity, unless both sets are numbered classes of containers, whose numbers
    mean nothing outside them; images by their bytes.
    """
    same = sorted(set(fit.identities) & set(evaluated.identities))
    if same and not _numbered(fit, evaluated):
        raise InputError(
            f"{name}: {len(same):,} of its {len(fit.identities):,} people are in the evaluated set, too (first: "
            f"{same[0]}). A map fitted on them would flatter the baseline: give --fit-faces other people."
        )
    known, own = (faces.digests(options.cache)[:].view("V32").ravel() for faces in (evaluated, fit))
    if len(copies := np.flatnonzero(np.isin(own, known))):
        raise InputError(
            f"{name}: {len(copies):,} of its images are in the evaluated set, too, byte for byte (first: "
            f"{fit.name(int(copies[0]))}). Give --fit-faces other people."
        )


def require_control(encoder_set: EncoderSet) -> None:
    """Raise InputError unless the control has a space of its own."""
    if encoder_set.control and encoder_set.control.info.space == encoder_set.teacher.info.space:
        raise InputError(
            f"--control {short(encoder_set.control.info.id)}: it was distilled from this very teacher, so it is no "
            "control. Give it as --student, and as control an encoder trained without the teacher "
            "(pkd-distill --method none)."
        )


def _fit(m: Moments, penalty: float | None) -> tuple[Doubles, Doubles]:
    return fit_procrustes(m) if penalty is None else fit_ridge(m, penalty)


def _agreement(x: Embeddings, y: Embeddings, weight: Doubles, bias: Doubles) -> float:
    """Compute the mean cosine of the mapped ``x`` to ``y``."""
    mapped = unit_rows(x @ weight.astype(np.float32) + bias.astype(np.float32), "the mapped control")
    return float(np.einsum("nd,nd->n", mapped, y).mean(dtype=np.float64))


def _numbered(a: FaceSet, b: FaceSet) -> bool:
    """Tell whether both hold numbered classes, of containers in different folders."""
    folders = [{source.root for source in faces.images.sources} for faces in (a, b)]
    return not folders[0] & folders[1] and all(
        not any(isinstance(source, ImageFiles) for source in faces.images.sources)
        and all(name.rpartition("/")[2].isdecimal() for name in faces.identities)
        for faces in (a, b)
    )
