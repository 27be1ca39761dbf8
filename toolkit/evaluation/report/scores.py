"""The report's scores: error trade-off, distances, histograms, agreement on one image, and the worst pairs by name."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from pkd.toolkit.evaluation.report.html import figure, percent, section, table
from pkd.toolkit.evaluation.report.plots import file_name
from pkd.toolkit.evaluation.results.schema import Evaluation, PairOfFiles

TOLD = ("S–T", "T–S", "T–T")
"""Ordered pairs whose worst pairs of images are on the page; those of all are in report.json."""


def trade_off(e: Evaluation, drawn: Mapping[str, str]) -> str:
    """DET curves of every ordered pair."""
    if "det" not in drawn:
        return ""
    errors = ", ".join(f'<span class="whole">{c.name} {percent(c.eer, 2)}</span>' for c in e.comparisons)
    return section(
        "Detection error trade-off",
        figure(
            drawn["det"],
            "Every identity weighs the same. Lower is better. Bands: 95 % intervals. A curve ends where the impostor "
            "pairs of this set stop resolving the rate.",
            "wide",
        ),
        f"<p>Equal error rate, every pair alike: {errors}.</p>",
    )


def distances(e: Evaluation, drawn: Mapping[str, str]) -> str:
    """Distributions of the distances within and between people, a row for each ordered pair."""
    if "distances" not in drawn:
        return ""
    return section(
        "Distances within and between people",
        "<p>How far apart embeddings of one person lie (intra-class, green) and those of two people (inter-class, "
        "red), on one axis for all. The further the two stand apart, and the narrower each is, the fewer the errors: "
        "d′ is the distance of their means in standard deviations. After Figure 1 of Shi et al. 2020.</p>",
        figure(
            drawn["distances"],
            "Euclidean distance of unit embeddings, √(2 − 2 · cosine): 0 for equal ones, 1.41 for unrelated ones. "
            "Every pair alike, heights scaled row by row. Behind each mean: the standard deviation.",
            "wide",
        ),
    )


def scores(e: Evaluation, drawn: Mapping[str, str]) -> str:
    """Histograms of genuine and impostor scores, one for each ordered pair."""
    if not e.comparisons:
        return ""
    figures = "".join(
        figure(
            drawn[f"scores-{file_name(c.name)}"],
            f"<b>{c.name}</b>: {c.genuine_pairs:,} genuine pairs of {c.genuine_identities:,} identities, "
            f"{c.impostor_pairs:,} impostor pairs.",
        )
        for c in e.comparisons
    )
    return section(
        "Scores",
        "<p>Each ordered pair of encoders has its own distribution, and so its own thresholds (dashed, one per false "
        f'match rate).</p><div class="figures">{figures}</div>',
    )


def agreement(e: Evaluation, drawn: Mapping[str, str]) -> str:
    """Cosine of teacher and student on one and the same image."""
    if e.agreement is None:
        return ""
    a = e.agreement
    return section(
        f"Teacher and student on the same {'template' if e.templates else 'image'}",
        figure(
            drawn["agreement"],
            f"Mean cosine {a.mean:.3f}, median {a.median:.3f}, 5th percentile {a.low:.3f}, standard deviation "
            f"{a.std:.3f}.",
            "half",
        ),
    )


def worst(e: Evaluation) -> str:
    """The false matches with the highest and the false non-matches with the lowest scores, of teacher and student."""
    cells = {c.name: c for c in e.comparisons}
    told = [(cells[name], found) for name in TOLD if name in cells and (found := cells[name].worst)]
    if not told:
        return ""
    return section(
        "The pairs it gets most wrong",
        "<p>File names only, worst first; those of every ordered pair are in report.json. They may name people: mind "
        "who is given this page. Look at the images before you believe the labels: the highest false matches are often "
        "one person under two names.</p>",
        *(
            f"<h3>{c.name}</h3>{_files('False matches: two people, highest scores', found.false_matches)}"
            + _files("False non-matches: one person, lowest scores", found.false_non_matches)
            for c, found in told
        ),
    )


def _files(caption: str, pairs: tuple[PairOfFiles, ...]) -> str:
    rows = [[f"{pair.score:.3f}", _breakable(pair.query), _breakable(pair.gallery)] for pair in pairs]
    return table(["score", "query", "gallery"], rows, caption=caption, kind="text")


def _breakable(name: str) -> str:
    """A file name that a narrow screen may break after its slashes and underscores."""
    return escape(name).replace("/", "/<wbr>").replace("_", "_<wbr>")
