"""Page: what every HTML page of pkd is made of. One file: no network, no script, no picture of a person."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from pkd.toolkit.certificates.certificate import Interval

MEANING = {
    "T–T": "teacher query, teacher gallery: the ceiling",
    "S–T": "student query, teacher gallery: the edge device against the server",
    "T–S": "teacher query, student gallery",
    "S–S": "student query, student gallery: the student alone",
    "C–T": "undistilled control query, teacher gallery: two spaces that know nothing of each other",
    "C–C": "control query, control gallery: the control alone",
    "P–T": "control turned into the teacher’s space (orthogonal Procrustes) against the teacher’s gallery",
    "R–T": "control mapped into the teacher’s space (affine ridge regression) against the teacher’s gallery",
}
"""What each ordered pair of encoders is. The query side is named first."""


def page(title: str, body: Iterable[str]) -> str:
    """The whole document. ``title`` is plain text, ``body`` markup; empty parts are dropped."""
    style = files("pkd.toolkit.evaluation.report").joinpath("page.css").read_text(encoding="utf-8")
    parts = "\n".join(part for part in body if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{parts}\n"
        "</main>\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A section with its heading, both markup."""
    return f"<section><h2>{heading}</h2>{''.join(parts)}</section>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", kind: str = "") -> str:
    """A table that scrolls sideways where it is too wide. The first cell of each row is its heading; all are markup.

    A cell that begins with ``<t`` is taken as it is, so that a caller can give it a class. ``kind``: CSS class.
    """
    head = "".join(h if h.startswith("<t") else f'<th scope="col">{h}</th>' for h in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(c if c.startswith("<t") else f"<td>{c}</td>" for c in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll"><table{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>'
        f"{f'<caption>{caption}</caption>' if caption else ''}<thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(svg: str, caption: str, kind: str = "") -> str:
    """A figure with its caption, both markup. ``kind``: ``wide`` or ``half``."""
    return (
        f"<figure{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{svg}<figcaption>{caption}</figcaption></figure>"
    )


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and what they stand for, both markup."""
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows) + "</dl>"


def bullets(lines: Iterable[str], kind: str = "") -> str:
    """A list of markup lines; nothing where there are none."""
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f"<ul{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{items}</ul>" if items else ""


def percent(rate: float, digits: int | None = None) -> str:
    """A fraction as per cent, with ``digits`` decimals or as short as it goes."""
    return f"{100 * rate:g} %" if digits is None else f"{100 * rate:.{digits}f} %"


def points(difference: float) -> str:
    """A difference of fractions in percentage points, with its sign."""
    told = f"{100 * difference:+.1f}".replace("-", "−")
    return told[1:] if float(told[1:]) == 0 else told


def span(interval: Interval, digits: int = 1) -> str:
    """An interval of fractions in per cent."""
    return f"{100 * interval[0]:.{digits}f} to {100 * interval[1]:.{digits}f} %"


def short_span(interval: Interval) -> str:
    """An interval of small fractions in per cent, two significant digits."""
    return f"{100 * interval[0]:.2g} to {100 * interval[1]:.2g} %"
