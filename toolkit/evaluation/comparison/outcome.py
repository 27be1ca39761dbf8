"""Outcome: all that one evaluation writes into its folder."""

from __future__ import annotations

from dataclasses import dataclass

from pkd.toolkit.certificates.certificate import Certificate
from pkd.toolkit.evaluation.metrics.resamples import Draws
from pkd.toolkit.evaluation.results.schema import Evaluation


@dataclass(frozen=True)
class Outcome:
    """All that one evaluation writes."""

    evaluation: Evaluation
    draws: Draws
    certificates: tuple[Certificate, ...] = ()
