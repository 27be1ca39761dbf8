"""Template matching as in IJB-B and IJB-C: listed pairs (1:1) and searches (1:N), of every ordered pair of encoders."""

from __future__ import annotations

import hashlib

import numpy as np

from pkd.toolkit.core.encoder_info import combine
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.encoders.base import Embeddings, Encoder, unit_rows
from pkd.toolkit.evaluation.comparison.outcome import Outcome
from pkd.toolkit.evaluation.datasets.ijb import Templates
from pkd.toolkit.evaluation.metrics.error_rates import require_resolved
from pkd.toolkit.evaluation.metrics.identification import measure_searches
from pkd.toolkit.evaluation.metrics.listed_pairs import ListedPairs, listed, score_listed
from pkd.toolkit.evaluation.metrics.operating_points import measure, worst
from pkd.toolkit.evaluation.metrics.pairing import Doubles
from pkd.toolkit.evaluation.metrics.resamples import Draws, drawn_from
from pkd.toolkit.evaluation.metrics.search import joined, search
from pkd.toolkit.evaluation.protocols.common import Bar, Options, agree, common, describe_data, embed, notes_on
from pkd.toolkit.evaluation.protocols.encoder_set import Lineup
from pkd.toolkit.evaluation.results.schema import Comparison, Evaluation, Identification, TemplateData

FMRS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""False match rates that are reported where the list resolves them."""
FACES = 1 << 16
"""Faces that are embedded before they are pooled: 128 MB of 512-d vectors."""


def template_matching(templates: Templates, name: str, lineup: Lineup, options: Options, bar: Bar) -> Outcome:
    """Both protocols, where the meta folder has them. The second template of a pair is the probe.

    Raises InputError for a list without pairs of either kind, SpaceMismatch, UnsupportedFmr.
    """
    cells = lineup.cells(with_probe=True, any_space=options.any_space)
    pairing = _pairing(templates, name)
    for fmr in options.fmrs or ():
        if pairing is None:
            raise InputError(
                f"--fmr {fmr:g}: {name} has no template_pair_label.txt, so no pairs are compared. Drop it."
            )
        require_resolved(pairing, fmr)
    digest = _digest(templates, options)
    vectors = {letter: pool(encoder, templates, options, bar) for letter, encoder in lineup.encoders.items()}
    comparisons: list[Comparison] = []
    identifications: list[Identification] = []
    values: dict[str, Doubles] = {}
    for q, g in cells:
        if pairing:
            comparison, drawn = _verify(pairing, templates, (q, g), vectors, lineup, options, bar)
            comparisons.append(comparison)
            values |= drawn
        if len(templates.probes):
            identification, drawn = _identify(templates, (q, g), vectors, lineup, options, bar)
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
        agreement=agree(vectors["T"], vectors["S"]) if ("S", "T") in cells else None,
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
            *notes_on(lineup, options, comparisons),
        ),
        **common(lineup, options),
    )
    return Outcome(evaluation, Draws(drawn_from(evaluation), values))


def pool(encoder: Encoder, templates: Templates, options: Options, bar: Bar) -> Embeddings:
    """Embed every face and pool → float32 T×D unit rows.

    Faces of one medium are averaged, media of one template are summed, and the sum is divided by its length: a sum over
    faces with ``Templates.weight``. As InsightFace's ``eval_ijbc.py``, but every face's embedding has length 1 before.
    """
    sums = np.zeros((len(templates.ids), encoder.info.space.dim))
    for start in range(0, len(templates.faces), FACES):
        here = np.arange(start, min(start + FACES, len(templates.faces)))
        rows = templates.faces.labels[here]
        faces = embed(encoder, templates.faces.select(here), options, bar) * templates.weight[here, None]
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
    cell: tuple[str, str],
    vectors: dict[str, Embeddings],
    lineup: Lineup,
    options: Options,
    bar: Bar,
) -> tuple[Comparison, dict[str, Doubles]]:
    q, g = cell
    label = f"{q}–{g}"
    with bar(f"scoring {label}", len(pairing.first)) as advance:
        scores = score_listed(pairing, vectors[q], vectors[g], seed=options.seed, advance=advance)
    with bar(f"intervals {label}", options.resamples) as advance:
        comparison, drawn = measure(
            scores,
            label,
            lineup.encoders[q].info,
            lineup.encoders[g].info,
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
    cell: tuple[str, str],
    vectors: dict[str, Embeddings],
    lineup: Lineup,
    options: Options,
    bar: Bar,
) -> tuple[Identification, dict[str, Doubles]]:
    q, g = cell
    label = f"{q}–{g}"
    probes = templates.probes
    with bar(f"searching {label}", len(probes) * len(templates.galleries)) as advance:
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
    with bar(f"intervals {label}", options.resamples) as advance:
        return measure_searches(
            searches,
            label,
            lineup.encoders[q].info,
            lineup.encoders[g].info,
            galleries="one gallery after the other, every probe searched in each",
            enrolled=[len(set(templates.subject[gallery].tolist())) for gallery in templates.galleries],
            identities=int(templates.subject.max()) + 1,
            resamples=options.resamples,
            seed=options.seed,
            advance=advance,
        )


def _digest(templates: Templates, options: Options) -> str:
    """Over contents, templates, subjects and protocols; remembers the digests of the crops in the cache."""
    templates.faces.digests(options.cache)
    arrays = (templates.weight, templates.subject, *(templates.pairs or ()), *templates.galleries, templates.probes)
    return combine([templates.faces.digest(), *(hashlib.sha256(array.tobytes()).hexdigest() for array in arrays)])
