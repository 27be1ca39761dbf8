"""The report's groups: error rates of people who share a label, at the thresholds that everyone gets."""

from __future__ import annotations

from html import escape

from pkd.toolkit.certificates.demographic_groups import Attribute, Group, GroupRates
from pkd.toolkit.evaluation.report.html import bullets, percent, section, short_span, span, table
from pkd.toolkit.evaluation.results.schema import Comparison, Evaluation

SHOWN = ("S–T", "T–T")
"""Ordered pairs with tables of their own; report.json has the others."""
NONE = '<td class="none">too few people</td>'


def demographics(e: Evaluation) -> str:
    """Per attribute and ordered pair a table of its groups; nothing where no labels were given."""
    if not e.labels:
        return ""
    cells = [c for name in SHOWN for c in e.comparisons if c.name == name]
    return section(
        "Groups",
        f"<p>Labels from {escape(e.labels.name)}. Pairs count where both people belong to the group. Thresholds are "
        "those found over everyone, so groups differ in their error rates. × is the ratio to everyone’s rate. A false "
        "match rate is given where the group’s pairs of different people resolve the target; ≤ where the group’s own "
        "lies below what they resolve. Below each rate: its 95 % interval.</p>",
        bullets(_unlabelled(e, attribute) for attribute in cells[0].demographics if attribute.unlabelled),
        "".join(_people(attribute) for attribute in cells[0].demographics),
        "".join(_rates(c, attribute) for c in cells for attribute in c.demographics),
    )


def _unlabelled(e: Evaluation, attribute: Attribute) -> str:
    assert e.labels is not None
    named = e.labels.unlabelled[attribute.name]
    more = " …" if attribute.unlabelled > len(named) else ""
    people = "identity has" if attribute.unlabelled == 1 else "identities have"
    return (
        f"{attribute.unlabelled:,} {people} no {escape(attribute.name)} and count in none of its groups: "
        f"{escape(', '.join(named))}{more}"
    )


def _people(attribute: Attribute) -> str:
    rows = [
        [
            escape(group.value),
            f"{group.identities:,}",
            f"{group.images:,}",
            f"{group.genuine_identities:,}",
            f"{group.identity_pairs:,}",
            f"{100 * group.min_fmr:.2g} %" if group.min_fmr is not None else NONE,
        ]
        for group in attribute.groups
    ]
    heads = ["", "people", "images", "with genuine pairs", "pairs of people", "resolves FMR from"]
    return table(heads, rows, caption=escape(attribute.name))


def _rates(c: Comparison, attribute: Attribute) -> str:
    rows = [_row(group, rates) for group in attribute.groups for rates in group.rates]
    heads = ["", "at FMR", "false matches", "false non-matches", "pairs alike (raw)"]
    return table(heads, rows, caption=f"{c.name}: {escape(attribute.name)}") if rows else ""


def _row(group: Group, rates: GroupRates) -> list[str]:
    false = balanced = raw = NONE
    if rates.fmr is not None and rates.fmr_ci95:
        bound = "≤ " if rates.fmr_is_upper_bound else ""
        false = (
            f"<b>{bound}{100 * rates.fmr:.2g} %</b>{_times(rates.fmr_ratio)}<small>{short_span(rates.fmr_ci95)}</small>"
        )
    if rates.fnmr_balanced is not None and rates.fnmr_balanced_ci95:
        balanced = (
            f"<b>{percent(rates.fnmr_balanced, 1)}</b>{_times(rates.fnmr_balanced_ratio)}"
            f"<small>{span(rates.fnmr_balanced_ci95)}</small>"
        )
    if rates.fnmr is not None and rates.fnmr_ci95:
        raw = f"{percent(rates.fnmr, 1)}<small>{span(rates.fnmr_ci95)}</small>"
    return [escape(group.value), percent(rates.target_fmr), false, balanced, raw]


def _times(ratio: float | None) -> str:
    return f" × {ratio:.2f}" if ratio is not None else ""
