"""Match templates as IJB-B and IJB-C do: listed pairs (1:1) and searches (1:N), of every ordered pair of encoders."""

from __future__ import annotations

import hashlib

import numpy as np

from pkd.toolkit.core.encoder_info import combine
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.progress import Progress
from pkd.toolkit.encoders.base import Embeddings, Encoder, unit_rows
from pkd.toolkit.evaluation.datasets.ijb import Templates
from pkd.toolkit.evaluation.metrics.error_rates import require_resolved
from pkd.toolkit.evaluation.metrics.identification import joined, measure_searches, search
from pkd.toolkit.evaluation.metrics.listed_pairs import ListedPairs, listed, score_listed
from pkd.toolkit.evaluation.metrics.operating_points import measure, worst
from pkd.toolkit.evaluation.metrics.pairing import Doubles
from pkd.toolkit.evaluation.metrics.resamples import ResampleValues, resampled_from
from pkd.toolkit.evaluation.protocols.common import (
    EncoderPair,
    EncoderSet,
    EvaluationOptions,
    ProtocolResult,
    common,
    describe_data,
    embed,
    measure_agreement,
    notes_on,
)
from pkd.toolkit.evaluation.results.schema import Comparison, Evaluation, Identification, TemplateData

FMRS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""False match rates that are reported where the list resolves them."""
FACES = 1 << 16
"""Faces that are embedded before they are pooled: 128 MB of 512-d vectors."""


def template_matching(
    templates: Templates, name: str, encoder_set: EncoderSet, options: EvaluationOptions, progress: Progress
) -> ProtocolResult:
    """Run both protocols, where the meta folder has them. The second template of a pair is the probe.

    Raises InputError for a list without pairs of either kind, SpaceMismatch, UnsupportedFmr.
    """
    encoder_pairs = encoder_set.pairs(with_probe=True, any_space=options.any_space)
    pairing = _pairing(templates, name)
    for fmr in options.fmrs or ():
        if pairing is None:
            raise InputError(
                f"--fmr {fmr:g}: {name} has no template_pair_label.txt, so no pairs are compared. Drop it."
            )
        require_resolved(pairing, fmr)
    digest = _digest(templates, options)
    vectors = {letter: pool(encoder, templates, options, progress) for letter, encoder in encoder_set.encoders.items()}
    comparisons: list[Comparison] = []
    identifications: list[Identification] = []
    values: dict[str, Doubles] = {}
    for q, g in encoder_pairs:
        if pairing:
            comparison, drawn = _verify(pairing, templates, (q, g), vectors, encoder_set, options, progress)
            comparisons.append(comparison)
            values |= drawn
        if len(templates.probes):
            identification, drawn = _identify(templates, (q, g), vectors, encoder_set, options, progress)
            identifications.append(identification)
            values |= drawn
    evaluation = Evaluation(
        protocol="templates of several images",
        data=describe_data(name, digest, templates.subject[templates.faces.labels]),
        templates=TemplateData(
            templates=len(templates.ids),
            media=templates.media,
            aligned=templates.aligned,
            scored=templates.scored,
            subjects_rebuilt=templates.rebuilt,
        ),
        comparisons=tuple(comparisons),
        identifications=tuple(identifications),
        agreement=measure_agreement(vectors["T"], vectors["S"]) if ("S", "T") in encoder_pairs else None,
        notes=(
            *(
                [
                    f"{templates.rebuilt:,} templates have no SUBJECT_ID: their people are rebuilt from the pairs that "
                    "are declared the same. One person in several such groups makes intervals slightly too narrow."
                ]
                if templates.rebuilt
                else []
            ),
            "Thresholds are of templates of several images. They hold for no single image, so nothing is certified.",
            *notes_on(encoder_set, options, comparisons),
        ),
        **common(encoder_set, options),
    )
    return ProtocolResult(evaluation, ResampleValues(resampled_from(evaluation), values))


def pool(encoder: Encoder, templates: Templates, options: EvaluationOptions, progress: Progress) -> Embeddings:
    """Embed every face and pool → float32 T×D unit rows.

    Faces of one medium are averaged, media of one template are summed, and the sum is divided by its length: a sum over
    faces with ``Templates.weight``. As InsightFace's ``eval_ijbc.py``, but every face's embedding has length 1 before.
    """
    sums = np.zeros((len(templates.ids), encoder.info.space.dim))
    for start in range(0, len(templates.faces), FACES):
        here = np.arange(start, min(start + FACES, len(templates.faces)))
        rows = templates.faces.labels[here]
        faces = embed(encoder, templates.faces.select(here), options, progress) * templates.weight[here, None]
        order = np.argsort(rows, kind="stable")
        present, begins = np.unique(rows[order], return_index=True)
        sums[present] += np.add.reduceat(faces[order], begins, axis=0)
    return unit_rows(sums.astype(np.float32), f"templates of {encoder.info.name}")


def _pairing(templates: Templates, name: str) -> ListedPairs | None:
    if templates.pairs is None:
        return None
    enrolled, probe, same = templates.pairs
    for kind, there in (("genuine", same.any()), ("impostor", not same.all())):
        if not there:
            raise InputError(f"{name}: its pair list has no {kind} pair. Use the list as published.")
    return listed(probe, enrolled, same, templates.subject)


def _verify(
    pairing: ListedPairs,
    templates: Templates,
    encoder_pair: EncoderPair,
    vectors: dict[str, Embeddings],
    encoder_set: EncoderSet,
    options: EvaluationOptions,
    progress: Progress,
) -> tuple[Comparison, dict[str, Doubles]]:
    q, g = encoder_pair
    label = f"{q}–{g}"
    with progress(f"scoring {label}", len(pairing.first)) as advance:
        scores = score_listed(pairing, vectors[q], vectors[g], seed=options.seed, advance=advance)
    with progress(f"intervals {label}", options.resamples) as advance:
        comparison, drawn = measure(
            scores,
            label,
            encoder_set.encoders[q].info,
            encoder_set.encoders[g].info,
            fmrs=options.fmrs or FMRS,
            resamples=options.resamples,
            seed=options.seed,
            advance=advance,
        )

    def named(row: int) -> str:
        return templates.faces.identities[row]

    return comparison.model_copy(update={"worst": worst(scores, named, named)}), drawn


def _identify(
    templates: Templates,
    encoder_pair: EncoderPair,
    vectors: dict[str, Embeddings],
    encoder_set: EncoderSet,
    options: EvaluationOptions,
    progress: Progress,
) -> tuple[Identification, dict[str, Doubles]]:
    q, g = encoder_pair
    label = f"{q}–{g}"
    probes = templates.probes
    with progress(f"searching {label}", len(probes) * len(templates.galleries)) as advance:
        searches = joined(
            [
                search(
                    vectors[q][probes],
                    templates.subject[probes],
                    vectors[g][gallery],
                    templates.subject[gallery],
                    advance=advance,
                )
                for gallery in templates.galleries
            ]
        )
    if not searches.mated.any():
        raise InputError("no probe template is of a subject in a gallery. Use the CSV files of one data set.")
    with progress(f"intervals {label}", options.resamples) as advance:
        return measure_searches(
            searches,
            label,
            encoder_set.encoders[q].info,
            encoder_set.encoders[g].info,
            galleries="one gallery after the other, every probe searched in each",
            enrolled=[len(set(templates.subject[gallery].tolist())) for gallery in templates.galleries],
            identities=int(templates.subject.max()) + 1,
            resamples=options.resamples,
            seed=options.seed,
            advance=advance,
        )


def _digest(templates: Templates, options: EvaluationOptions) -> str:
    """Digest contents, templates, subjects and protocols; the cache remembers the digests of the crops."""
    templates.faces.digests(options.cache)
    arrays = (templates.weight, templates.subject, *(templates.pairs or ()), *templates.galleries, templates.probes)
    return combine([templates.faces.digest(), *(hashlib.sha256(array.tobytes()).hexdigest() for array in arrays)])
