"""Compare all pairs of a set, or of a gallery and a probe set, for every ordered pair of encoders; certify them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pkd.toolkit.certificates.certificate import Certificate, file_name
from pkd.toolkit.core.encoder_info import combine
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.progress import Progress
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.encoders.base import Embeddings
from pkd.toolkit.evaluation.metrics.demographics import divide, measure_groups
from pkd.toolkit.evaluation.metrics.error_rates import EXPECTED, require_resolved
from pkd.toolkit.evaluation.metrics.identification import joined, measure_searches, one_gallery, search, two_galleries
from pkd.toolkit.evaluation.metrics.influence import influential, suspects
from pkd.toolkit.evaluation.metrics.labels import Labels
from pkd.toolkit.evaluation.metrics.operating_points import measure, worst
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Pairing
from pkd.toolkit.evaluation.metrics.resamples import ResampleValues, resampled_from
from pkd.toolkit.evaluation.protocols.baselines import gains, mapping_costs
from pkd.toolkit.evaluation.protocols.common import (
    EncoderSet,
    EvaluationOptions,
    ProtocolResult,
    common,
    describe_data,
    embed,
    measure_agreement,
    notes_on,
)
from pkd.toolkit.evaluation.results.schema import Comparison, Data, Evaluation, Identification

FMRS = (1e-2, 1e-3, 1e-4, 1e-5)
"""False match rates that are reported where the set resolves them."""


def cross_matrix(
    faces: FaceSet,
    name: str,
    encoder_set: EncoderSet,
    options: EvaluationOptions,
    progress: Progress,
    *,
    probe: FaceSet | None = None,
    labels: Labels | None = None,
) -> ProtocolResult:
    """Compare every pair of ``faces``, or every image of ``probe`` with every image of the gallery ``faces``.

    ``labels``: also measure the groups they name. Raises InputError for a set without genuine pairs or identities and
    for labels of others, SpaceMismatch, UnsupportedFmr.
    """
    encoder_pairs = encoder_set.pairs(with_probe=probe is not None, any_space=options.any_space)
    encoders = encoder_set.encoders
    query = faces if probe is None else probe
    data, plain = pair_up(faces, query, name, options.cache)
    pairings = {True: plain, False: plain}
    if probe is None:
        pairings[True] = Pairing(
            plain.query, plain.gallery, plain.query_file, plain.gallery_file, plain.identities, unordered=True
        )
    for fmr in options.fmrs or ():
        require_resolved(plain, fmr)
    names = sorted({*faces.identities, *query.identities})
    groups = {
        same: divide(labels, names, pairing, one_set=probe is None) for same, pairing in pairings.items() if labels
    }

    vectors: dict[tuple[str, bool], Embeddings] = {}
    for letter, encoder in encoders.items():
        vectors[letter, False] = embed(encoder, faces, options, progress)
        vectors[letter, True] = vectors[letter, False] if probe is None else embed(encoder, probe, options, progress)

    comparisons: list[Comparison] = []
    values: dict[str, Doubles] = {}
    for q, g in encoder_pairs:
        label = f"{q}–{g}"
        pairing = pairings[q == g]
        with progress(f"scoring {label}", len(query)) as advance:
            scores = score_pairs(pairing, vectors[q, True], vectors[g, False], seed=options.seed, advance=advance)
        with progress(f"intervals {label}", options.resamples) as advance:
            comparison, drawn = measure(
                scores,
                label,
                encoders[q].info,
                encoders[g].info,
                fmrs=options.fmrs or FMRS,
                resamples=options.resamples,
                seed=options.seed,
                advance=advance,
            )
        values |= drawn
        comparison = comparison.model_copy(
            update={
                "worst": worst(scores, query.name, faces.name),
                "influential": influential(scores, comparison.points[-1], names) if comparison.points else (),
                "suspects": suspects(scores, comparison.points, names),
            }
        )
        if comparison.points and encoder_set.certifies(q, g) and not options.flip:
            certificate = file_name(comparison.query, comparison.gallery)
            comparison = comparison.model_copy(update={"certificate": certificate})
        if labels and {q, g} <= {"T", "S", "M"}:
            with progress(f"groups {label}", len(groups[q == g].parts)) as advance:
                demographics = measure_groups(
                    groups[q == g],
                    vectors[q, True],
                    vectors[g, False],
                    scores,
                    comparison.points,
                    seed=options.seed,
                    advance=advance,
                )
            comparison = comparison.model_copy(update={"demographics": demographics})
        comparisons.append(comparison)

    identifications, searched, said = identify(encoder_set, vectors, plain, probe is None, options, progress)
    evaluation = Evaluation(
        protocol="all pairs of one set" if probe is None else "probe images against gallery images",
        data=data,
        labels=groups[False].record if labels else None,
        comparisons=tuple(comparisons),
        identifications=identifications,
        gains=gains(comparisons, values),
        costs=mapping_costs(comparisons, values),
        agreement=measure_agreement(vectors["T", False], vectors["S", False]) if ("S", "T") in encoder_pairs else None,
        notes=(*notes_on(encoder_set, options, comparisons), *said),
        **common(encoder_set, options),
    )
    certificates = tuple(certify(c, evaluation) for c in comparisons if c.certificate)
    return ProtocolResult(evaluation, ResampleValues(resampled_from(evaluation), values | searched), certificates)


def pair_up(gallery: FaceSet, query: FaceSet, name: str, cache: Path | None) -> tuple[Data, Pairing]:
    """Assign one numbering of identities and files to both sides. Raises InputError where nothing can be measured."""
    for faces in (gallery, query):
        if len(faces.identities) == 0 or (faces.labels < 0).any():
            raise InputError(f"{name}: holds images without identity. Give a folder per identity, or a list of such.")
    names = sorted({*gallery.identities, *query.identities})
    place = {identity: i for i, identity in enumerate(names)}
    owners = [np.array([place[x] for x in faces.identities], np.int64)[faces.labels] for faces in (query, gallery)]
    one_set = query is gallery
    digests = np.concatenate([query.digests(cache)[:], gallery.digests(cache)[:]])
    codes = np.unique(digests.view("V32").ravel(), return_inverse=True)[1].astype(np.int64)
    files = codes[: len(query)], codes[len(query) :]
    pairing = Pairing(owners[0], owners[1], files[0], files[1], len(names), unordered=False)
    if len(names) < 2:
        raise InputError(
            f"{name}: holds one identity ({names[0]}), impostor pairs need two. Give the folder of people's folders."
        )
    if pairing.genuine_pairs == 0:
        why = (
            "every identity has one image"
            if one_set
            else f"no identity has different images on both sides (gallery: {gallery.identities[0]} …, probe: "
            f"{query.identities[0]} …)"
        )
        raise InputError(f"{name}: no genuine pair: {why}. Add images of the same people.")
    if pairing.impostor_pairs == 0:
        raise InputError(f"{name}: no impostor pair. Add images of other people.")
    digest = gallery.digest() if one_set else combine([gallery.digest(), query.digest()])
    labels = owners[1] if one_set else np.concatenate(owners)
    return describe_data(name, digest, labels), pairing


Identified = tuple[tuple[Identification, ...], dict[str, Doubles], tuple[str, ...]]


def identify(
    encoder_set: EncoderSet,
    vectors: Mapping[tuple[str, bool], Embeddings],
    pairing: Pairing,
    one_set: bool,
    options: EvaluationOptions,
    progress: Progress,
) -> Identified:
    """Search a gallery set with a probe set, or one set split by ``two_galleries``.

    ``vectors``: by letter and whether of the probe side. Returns results, values of every resample, and notes.
    """
    if one_set:
        plans = two_galleries(pairing, options.seed)
        galleries = f"one image each of one half of the people, then of the other (drawn with seed {options.seed})"
    else:
        plans, galleries = one_gallery(pairing), "all images of the gallery set"
    notes = []
    if left_out := sum(plan.left_out for plan in plans):
        notes.append(f"{left_out:,} searches with an image that is itself enrolled were left out.")
    found: list[Identification] = []
    values: dict[str, Doubles] = {}
    for q, g in encoder_set.pairs(with_probe=True, any_space=options.any_space):
        label = f"{q}–{g}"
        with progress(f"searching {label}", sum(len(plan.searched) for plan in plans)) as advance:
            searches = joined(
                [
                    search(
                        vectors[q, True][plan.searched],
                        pairing.query[plan.searched],
                        vectors[g, False][plan.enrolled],
                        pairing.gallery[plan.enrolled],
                        advance=advance,
                    )
                    for plan in plans
                ]
            )
        if not searches.mated.any():
            return (), {}, (*notes, "No identification rates: no search has a mate among other images.")
        with progress(f"intervals {label}", options.resamples) as advance:
            result, drawn = measure_searches(
                searches,
                label,
                encoder_set.encoders[q].info,
                encoder_set.encoders[g].info,
                galleries=galleries,
                enrolled=[len(set(pairing.gallery[plan.enrolled].tolist())) for plan in plans],
                identities=pairing.identities,
                resamples=options.resamples,
                seed=options.seed,
                advance=advance,
            )
        if not result.ranks and not result.points:
            return (), {}, (*notes, "No identification rates: too few people to search among and to search for.")
        found.append(result)
        values |= drawn
    if found[0].mated_identities < EXPECTED:
        notes.append(
            f"People with mated searches: {found[0].mated_identities}. They are too few for the intervals of what "
            "is found and missed to mean much."
        )
    return tuple(found), values, tuple(notes)


INTERVALS = (
    "identities resampled, pairs between copies of one identity left out: exact binomial for as many trials as vary as "
    "much for true accept rates (Korn and Graubard 1998), log-normal with the noise of pairs counted once and one more "
    "influential person at the upper end for false match rates (Fay and Feuer 1997)"
)
"""Method of bootstrap.py in words."""


def certify(comparison: Comparison, evaluation: Evaluation) -> Certificate:
    """Build the certificate of a comparison that has operating points, of teacher and student in one space.

    A certificate is what report.json says of one ordered pair of encoders, and nothing else. So it can be made again
    from report.json, and a number that was changed in either shows.
    """
    encoders = {e.id: e for e in (evaluation.teacher, evaluation.student, evaluation.mapped) if e}
    query, gallery = encoders[comparison.query], encoders[comparison.gallery]
    data = evaluation.data
    return Certificate(
        query=query.id,
        query_role=query.role,
        gallery=gallery.id,
        gallery_role=gallery.role,
        space=gallery.space.id,
        protocol=evaluation.protocol,
        points=comparison.points,
        calibration=comparison.calibration,
        resolved_scores=comparison.calibration.resolved_scores,
        min_fmr=comparison.min_fmr,
        identities=data.identities,
        genuine_identities=comparison.genuine_identities,
        identity_pairs=comparison.identity_pairs,
        images=data.images,
        genuine_pairs=comparison.genuine_pairs,
        impostor_pairs=comparison.impostor_pairs,
        demographics=comparison.demographics,
        labels_digest=evaluation.labels.sha256 if evaluation.labels else None,
        data_name=data.name,
        data_digest=data.content_digest,
        synthetic=evaluation.synthetic,
        intervals=INTERVALS,
        resamples=evaluation.resamples,
        seed=evaluation.seed,
        tool=evaluation.tool,
        created=evaluation.created,
    )
