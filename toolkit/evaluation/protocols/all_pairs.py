"""The cross matrix: all pairs of a set, or of a gallery and a probe set, for every ordered pair of encoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pkd.toolkit.certificates.certificate import file_name
from pkd.toolkit.core.encoder_info import combine
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.encoders.base import Embeddings
from pkd.toolkit.evaluation.comparison.certify import certify
from pkd.toolkit.evaluation.comparison.outcome import Outcome
from pkd.toolkit.evaluation.metrics.demographics import divide, measure_groups
from pkd.toolkit.evaluation.metrics.error_rates import require_resolved
from pkd.toolkit.evaluation.metrics.labels import Labels
from pkd.toolkit.evaluation.metrics.operating_points import measure, worst
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Pairing
from pkd.toolkit.evaluation.metrics.resamples import Draws, drawn_from
from pkd.toolkit.evaluation.protocols.baselines import gains
from pkd.toolkit.evaluation.protocols.common import Bar, Options, agree, common, describe_data, embed, notes_on
from pkd.toolkit.evaluation.protocols.encoder_set import Lineup
from pkd.toolkit.evaluation.protocols.identification import identify
from pkd.toolkit.evaluation.results.schema import Comparison, Data, Evaluation

FMRS = (1e-2, 1e-3, 1e-4, 1e-5)
"""False match rates that are reported where the set resolves them."""


def cross_matrix(
    faces: FaceSet,
    name: str,
    lineup: Lineup,
    options: Options,
    bar: Bar,
    *,
    probe: FaceSet | None = None,
    labels: Labels | None = None,
) -> Outcome:
    """Every pair of ``faces``, or every image of ``probe`` against every image of the gallery ``faces``.

    ``labels``: also measure the groups they name. Raises InputError for a set without genuine pairs or identities and
    for labels of others, SpaceMismatch, UnsupportedFmr.
    """
    cells = lineup.cells(with_probe=probe is not None, any_space=options.any_space)
    encoders = lineup.encoders
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
        vectors[letter, False] = embed(encoder, faces, options, bar)
        vectors[letter, True] = vectors[letter, False] if probe is None else embed(encoder, probe, options, bar)

    comparisons: list[Comparison] = []
    values: dict[str, Doubles] = {}
    for q, g in cells:
        label = f"{q}–{g}"
        pairing = pairings[q == g]
        with bar(f"scoring {label}", len(query)) as advance:
            scores = score_pairs(pairing, vectors[q, True], vectors[g, False], seed=options.seed, advance=advance)
        with bar(f"intervals {label}", options.resamples) as advance:
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
        comparison = comparison.model_copy(update={"worst": worst(scores, query.name, faces.name)})
        if comparison.points and lineup.certifies(q, g) and not options.flip:
            certificate = file_name(comparison.query, comparison.gallery)
            comparison = comparison.model_copy(update={"certificate": certificate})
        if labels and {q, g} <= {"T", "S"}:
            with bar(f"groups {label}", len(groups[q == g].parts)) as advance:
                demographics = measure_groups(
                    groups[q == g],
                    vectors[q, True],
                    vectors[g, False],
                    scores,
                    comparison.points,
                    resamples=options.resamples,
                    seed=options.seed,
                    advance=advance,
                )
            comparison = comparison.model_copy(update={"demographics": demographics})
        comparisons.append(comparison)

    identifications, searched, said = identify(lineup, vectors, plain, probe is None, options, bar)
    evaluation = Evaluation(
        protocol="all pairs of one set" if probe is None else "probe images against gallery images",
        data=data,
        labels=groups[False].record if labels else None,
        comparisons=tuple(comparisons),
        identifications=identifications,
        gains=gains(comparisons, values),
        agreement=agree(vectors["T", False], vectors["S", False]) if ("S", "T") in cells else None,
        notes=(*notes_on(lineup, options, comparisons), *said),
        **common(lineup, options),
    )
    certificates = tuple(certify(c, evaluation) for c in comparisons if c.certificate)
    return Outcome(evaluation, Draws(drawn_from(evaluation), values | searched), certificates)


def pair_up(gallery: FaceSet, query: FaceSet, name: str, cache: Path | None) -> tuple[Data, Pairing]:
    """Number the identities and files of both sides alike. Raises InputError where nothing can be measured."""
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
        raise InputError(f"{name}: holds one identity ({names[0]}). Impostor pairs need at least two.")
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
