"""One-to-many identification of face sets, for every ordered pair of encoders."""

from __future__ import annotations

from collections.abc import Mapping

from pkd.toolkit.encoders.base import Embeddings
from pkd.toolkit.evaluation.metrics.error_rates import EXPECTED
from pkd.toolkit.evaluation.metrics.identification import measure_searches
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Pairing
from pkd.toolkit.evaluation.metrics.search import joined, one_gallery, search, two_galleries
from pkd.toolkit.evaluation.protocols.common import Bar, Options
from pkd.toolkit.evaluation.protocols.encoder_set import Lineup
from pkd.toolkit.evaluation.results.schema import Identification

Found = tuple[tuple[Identification, ...], dict[str, Doubles], tuple[str, ...]]


def identify(
    lineup: Lineup,
    vectors: Mapping[tuple[str, bool], Embeddings],
    pairing: Pairing,
    one_set: bool,
    options: Options,
    bar: Bar,
) -> Found:
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
    for q, g in lineup.cells(with_probe=True, any_space=options.any_space):
        label = f"{q}–{g}"
        with bar(f"searching {label}", sum(len(plan.searched) for plan in plans)) as advance:
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
        with bar(f"intervals {label}", options.resamples) as advance:
            result, drawn = measure_searches(
                searches,
                label,
                lineup.encoders[q].info,
                lineup.encoders[g].info,
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
