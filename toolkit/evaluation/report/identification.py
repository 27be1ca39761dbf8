"""The report's one-to-many searches: rank-k, and misses at every false positive identification rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pkd.toolkit.certificates.certificate import Interval
from pkd.toolkit.evaluation.metrics.error_rates import EXPECTED
from pkd.toolkit.evaluation.report.html import figure, percent, section, span, table
from pkd.toolkit.evaluation.report.plots import LINES
from pkd.toolkit.evaluation.results.schema import Evaluation, Identification


def identification(e: Evaluation, drawn: Mapping[str, str]) -> str:
    """Closed-set and open-set rates of every ordered pair; nothing where no one was searched."""
    if not e.identifications:
        return ""
    first = e.identifications[0]
    people = " and ".join(f"{count:,}" for count in first.enrolled)
    parts = [
        f"<p>Enrolled: {first.galleries} ({people} people). {first.mated_searches:,} searches by "
        f"{first.mated_identities:,} people who are enrolled (mated), {first.non_mated_searches:,} by "
        f"{first.non_mated_identities:,} who are not. The query side is named first. Below each rate its 95 % interval "
        "over the people searched for, the gallery held; every person weighs the same. Raw: every search "
        "weighs the same.</p>"
    ]
    if first.ranks:
        parts.append(_ranks(e.identifications))
    if first.points:
        parts.append(_open_set(e.identifications, first.within))
    if "identification" in drawn:
        parts.append(
            figure(
                drawn["identification"],
                "Every identity weighs the same. Lower is better. A curve ends where the people who are not enrolled "
                "stop resolving the rate.",
                "wide",
            )
        )
    if first.unresolved:
        rates = ", ".join(percent(fpir) for fpir in first.unresolved)
        parts.append(
            f'<p class="small">Not resolved: FPIR {rates}. Of the {first.non_mated_identities:,} people who are not '
            f"enrolled fewer than {EXPECTED} would be found by chance.</p>"
        )
    return section("Finding a person in a gallery", *parts)


def how_searched(e: Evaluation) -> list[str]:
    """What the words of this section mean."""
    if not e.identifications:
        return []
    return [
        "Rank-k: the fraction of mated searches whose mate is among the k people with the highest scores. A person’s "
        "score is the highest of that person’s entries, and a tie never counts in favour.",
        "FPIR (false positive identification rate): the fraction of searches by people who are not enrolled in which "
        "someone scores at or above the threshold. FNIR (false negative identification rate): the fraction of mated "
        f"searches whose mate is not among the {e.identifications[0].within} best, or scores below the threshold. As "
        "in ISO/IEC 19795-1 and NIST’s FRVT 1:N. A larger gallery has other rates.",
    ]


def _ranks(found: Sequence[Identification]) -> str:
    rows = [
        [
            f"rank {point.rank}",
            *(_both(i.ranks[k].rate_balanced, i.ranks[k].rate_balanced_ci95, i.ranks[k].rate) for i in found),
        ]
        for k, point in enumerate(found[0].ranks)
    ]
    return table(["", *_heads(found)], rows, caption="Closed set: mates found", kind="long")


def _open_set(found: Sequence[Identification], within: int) -> str:
    rows = [
        [
            percent(point.fpir),
            *(
                _both(i.points[k].fnir_balanced, i.points[k].fnir_balanced_ci95, i.points[k].fnir)
                + f"<small>at {i.points[k].threshold:.4f}</small>"
                for i in found
            ),
        ]
        for k, point in enumerate(found[0].points)
    ]
    return table(["FPIR", *_heads(found)], rows, caption=f"Open set: mates missed (FNIR, R = {within})", kind="long")


def _heads(found: Sequence[Identification]) -> list[str]:
    return [f'<th scope="col" style="color:{LINES[i.name][0]}">{i.name}</th>' for i in found]


def _both(balanced: float, interval: Interval, raw: float) -> str:
    return f"<b>{percent(balanced, 1)}</b><small>{span(interval)}</small><small>raw {percent(raw, 1)}</small>"
