"""Ranking: what ``compare.json`` holds. Page, table and pictures read their numbers from here and nowhere else."""

from __future__ import annotations

from pkd.toolkit.certificates.certificate import Interval
from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.models import Record
from pkd.toolkit.evaluation.results.schema import Comparison, Data, PairedDifference, Training


class Measured(Record):
    """One statistic of one run over all people, with its 95 % identity-level bootstrap interval."""

    value: float
    ci95: Interval


class Ranked(Record):
    """One evaluation in the order of the ranking."""

    name: str
    encoder: EncoderInfo
    """Of the query side of the cell."""
    gallery: str
    """Encoder id of the gallery side."""
    training: Training | None
    """How the query side's encoder was trained; None where its file does not tell."""
    flip: bool
    first: Measured
    """What is ranked by: every identity alike, where the statistic knows identities."""
    raw: Measured | None
    """Every pair alike; None for statistics without it."""
    behind_best: PairedDifference | None
    """This run minus the best; None for the best."""
    p_adjusted: float | None
    """Of ``behind_best``, adjusted over all pairs of runs (Holm 1979)."""
    comparison: Comparison | None
    """The cell itself, for its curves; None for statistics without."""


class Versus(Record):
    """Two runs, by name: ``a`` minus ``b``, ``a`` ranking before ``b``."""

    a: str
    b: str
    difference: PairedDifference
    p_adjusted: float


class Ranking(Record):
    """A whole run of pkd-compare."""

    schema_version: int = 1
    tool: str
    created: str
    """ISO 8601, UTC."""
    cell: str
    by: str
    """What is ranked by: a name in ``STATISTICS``."""
    target: float | None
    """Target false match (or false positive identification) rate; None for statistics without one."""
    data: Data
    protocol: str
    synthetic: bool
    resamples: int
    seed: int
    runs: tuple[Ranked, ...]
    """Best first."""
    pairs: tuple[Versus, ...]
    """Every two runs."""
    smallest_p: float
    """The smallest adjusted p-value that so many resamples and comparisons can give."""
