"""Render templates to one-file HTML pages: no network, no script, no picture of a person.

Jinja2 escapes whatever a template prints; only drawings of this package go in as they are (``| safe``).
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from pkd.toolkit.certificates.certificate import Interval
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import MissingExtra
from pkd.toolkit.evaluation.report.plots import LINES

if TYPE_CHECKING:
    from jinja2 import Environment

MEANING = {
    "T–T": "teacher query, teacher gallery: the ceiling",
    "S–T": "student query, teacher gallery: the edge device against the server",
    "T–S": "teacher query, student gallery",
    "S–S": "student query, student gallery: the student alone",
    "T–M": "teacher query, gallery of an old encoder whose templates were mapped",
    "S–M": "student query, gallery of an old encoder whose templates were mapped",
    "C–T": "undistilled control query, teacher gallery: two spaces that know nothing of each other",
    "C–C": "control query, control gallery: the control alone",
    "P–T": "control turned into the teacher’s space (orthogonal Procrustes) against the teacher’s gallery",
    "R–T": "control mapped into the teacher’s space (affine ridge regression) against the teacher’s gallery",
}
"""Description of each ordered pair of encoders. The query side is named first."""


def render_page(template: str, **context: Any) -> str:
    """Render ``templates/<template>`` to a whole document. Raises MissingExtra without jinja2."""
    return environment().get_template(template).render(**context)


@cache
def environment() -> Environment:
    """Make the templates' environment, once. Raises MissingExtra without jinja2."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise MissingExtra("jinja2", "evaluate") from None
    made = Environment(
        loader=PackageLoader("pkd.toolkit.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": percent,
        "points": points,
        "span": span,
        "short_span": short_span,
        "short": short,
        "setting": _setting,
        "breakable": _breakable,
    }
    made.globals["meaning"] = MEANING
    made.globals["colours"] = {name: colour for name, (colour, _) in LINES.items()}
    return made


def percent(rate: float, digits: int | None = None) -> str:
    """Write a fraction as per cent, with ``digits`` decimals or as short as it goes."""
    return f"{100 * rate:g} %" if digits is None else f"{100 * rate:.{digits}f} %"


def points(difference: float) -> str:
    """Write a difference of fractions in percentage points, with its sign."""
    text = f"{100 * difference:+.1f}".replace("-", "−")
    return text[1:] if float(text[1:]) == 0 else text


def span(interval: Interval, digits: int = 1) -> str:
    """Write an interval of fractions in per cent."""
    return f"{100 * interval[0]:.{digits}f} to {100 * interval[1]:.{digits}f} %"


def short_span(interval: Interval) -> str:
    """Write an interval of small fractions in per cent, two significant digits."""
    return f"{100 * interval[0]:.2g} to {100 * interval[1]:.2g} %"


def _setting(value: str | int | float | bool) -> str:
    return short(value) if isinstance(value, str) else f"{value:,}" if type(value) is int else str(value)


def _breakable(name: str) -> Any:
    """Mark where a narrow screen may break a file name: after its slashes and underscores."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([/_])", r"\1<wbr>", str(escape(name))))
