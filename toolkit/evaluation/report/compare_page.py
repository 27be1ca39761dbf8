"""The page of a comparison: one HTML file, every number from compare.json."""

from __future__ import annotations

from html import escape
from pathlib import Path

from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.evaluation.comparison.compare import Ranked, Ranking
from pkd.toolkit.evaluation.report.compare_plots import LEVEL, pictures, probability, what
from pkd.toolkit.evaluation.report.drawing import as_svg, write_png
from pkd.toolkit.evaluation.report.html import bullets, facts, figure, page, percent, points, section, span, table
from pkd.toolkit.evaluation.report.method import told_training


def render_ranking(r: Ranking) -> str:
    """The whole page. Raises MissingExtra without matplotlib."""
    drawn = {name: as_svg(picture) for name, picture in pictures(r).items()}
    return page(
        f"{len(r.runs)} runs by {what(r)}",
        (_opening(r), _table(r, drawn), _pairwise(r, drawn), _curves(r, drawn), _provenance(r), _method(r)),
    )


def write_ranking_figures(r: Ranking, folder: Path) -> None:
    """Write the page's pictures as ``folder/<name>.png``; those of an earlier run are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    for picture in pictures(r).values():
        write_png(picture, folder)


def verdict(r: Ranking) -> str:
    """The outcome in a sentence, plain text."""
    best, second = r.runs[0], r.runs[1]
    assert second.behind_best is not None and second.p_adjusted is not None
    lead = f"{abs(100 * second.behind_best.difference):.1f} points, p {probability(second.p_adjusted)}"
    if second.p_adjusted < LEVEL:
        return f"{best.name} beats {second.name} by {lead}."
    if r.smallest_p >= LEVEL:
        return f"{best.name} leads {second.name} by {lead}. {_too_few(r)}"
    return f"{best.name} leads, but its lead over {second.name} ({lead}) may be chance."


def _too_few(r: Ranking) -> str:
    return (
        f"With {r.resamples:,} resamples and {len(r.pairs):,} comparisons no adjusted p-value can be below "
        f"{probability(r.smallest_p)}: evaluate with a larger --bootstrap, or compare fewer runs."
    )


def _opening(r: Ranking) -> str:
    banner = (
        '<p class="banner" role="note">Synthetic faces. These rates say nothing about people.</p>'
        if r.synthetic
        else ""
    )
    return (
        f"<header>{banner}<h1>{len(r.runs)} runs by {escape(what(r))}</h1>"
        f'<p class="lead">{escape(verdict(r))} {escape(r.protocol[:1].upper() + r.protocol[1:])}: {r.data.images:,} '
        f"images of {r.data.identities:,} people ({escape(r.data.name)}). {escape(r.created[:10])}, "
        f"{escape(r.tool)}.</p></header>"
    )


def _table(r: Ranking, drawn: dict[str, str]) -> str:
    raw = any(run.raw for run in r.runs)
    errors = r.by == "tar" and any(run.comparison for run in r.runs)
    heads = [
        "run", "identities alike" if raw else r.by, *(["pairs alike (raw)"] if raw else []), "minus the best",
        "p", *(["equal error rate", "d′"] if errors else []),
    ]  # fmt: skip
    return section(
        "Ranking",
        figure(
            drawn["ranking"],
            "Bars: 95 % intervals of each run alone. Whether two runs differ is told by their paired difference "
            "below, not by whether their bars overlap." + (" Open circles: every pair alike." if raw else ""),
            "wide",
        ),
        table(heads, [_row(i, run, raw, errors) for i, run in enumerate(r.runs, 1)], kind="wordy"),
    )


def _row(number: int, run: Ranked, raw: bool, errors: bool) -> list[str]:
    behind, c = run.behind_best, run.comparison
    return [
        f"{number}. <b>{escape(run.name)}</b>",
        f"<b>{percent(run.first.value, 1)}</b><small>{span(run.first.ci95)}</small>",
        *([f"{percent(run.raw.value, 1)}<small>{span(run.raw.ci95)}</small>" if run.raw else ""] if raw else []),
        f"{points(behind.difference)}<small>{points(behind.ci95[0])} to {points(behind.ci95[1])}</small>"
        if behind
        else "best",
        probability(run.p_adjusted) if run.p_adjusted is not None else "",
        *([percent(c.eer, 2), f"{c.distances.d_prime:.2f}"] if errors and c else []),
    ]


def _pairwise(r: Ranking, drawn: dict[str, str]) -> str:
    unreachable = f"<p>{escape(_too_few(r))}</p>" if r.smallest_p >= LEVEL else ""
    told = "Blue: the row is better; red: it is worse; both only where the adjusted p-value is below"
    return section(
        "Every two runs",
        f"<p>Row minus column, in points, over the same drawn people. {told} {LEVEL:g}.</p>{unreachable}",
        figure(drawn["pairwise"], "p: two-sided, adjusted for all comparisons of this page (Holm 1979).", "wide"),
    )


def _curves(r: Ranking, drawn: dict[str, str]) -> str:
    parts = []
    if "det" in drawn:
        parts.append(
            section(
                "Detection error trade-off",
                figure(drawn["det"], "Every identity weighs the same. Lower is better. Bands: 95 % intervals.", "wide"),
            )
        )
    if "distances" in drawn:
        parts.append(
            section(
                "Distances within and between people",
                f"<p>{r.cell} of every run on one axis: how far apart embeddings of one person lie (intra-class, "
                "green) and those of two people (inter-class, red). After Figure 1 of Shi et al. 2020.</p>",
                figure(
                    drawn["distances"],
                    "Euclidean distance of unit embeddings, √(2 − 2 · cosine). Every pair alike, heights scaled "
                    "row by row. d′: the distance of the means in standard deviations.",
                    "wide",
                ),
            )
        )
    return "".join(parts)


def _provenance(r: Ranking) -> str:
    rows = [
        (
            f"{i}. {escape(run.name)}",
            f"<code>{escape(run.encoder.id)}</code><br>against <code>{escape(short(run.gallery))}</code>"
            f"{', image + mirror image' if run.flip else ''}{told_training(run.training)}",
        )
        for i, run in enumerate(r.runs, 1)
    ]
    rows += [
        ("Set", f"{escape(r.data.name)}: <code>{r.data.content_digest}</code>"),
        ("Intervals", f"{r.resamples:,} resamples of the identities, seed {r.seed}, the same for all runs"),
        ("Made", f"{escape(r.created)} by {escape(r.tool)}"),
    ]
    return section("Runs and data", facts(rows))


def _method(r: Ranking) -> str:
    lines = [
        "Runs are ranked by the rate over people, every identity weighing the same."
        if r.runs[0].raw
        else "Runs are ranked by their accuracy.",
        "A difference is measured on the same drawn people for both runs, resample by resample: what makes people hard "
        "for both cancels. Its 95 % interval is that of the paired differences.",
        "p is the chance to see so large a difference, either way, where there is none: twice the share of resamples "
        "on the far side of zero. It is never below 2 / (resamples + 1).",
        "The best run was found by looking, so its comparisons are adjusted together with those of all other pairs: "
        "that one claim among all is wrong is as rare as each p-value says.",
        "p-values are about people drawn like these. Another training seed could change the order of runs, too.",
    ]
    return section("How to read this", bullets(lines, "small"))
