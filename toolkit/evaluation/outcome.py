"""Outcome: all that one evaluation writes into its folder."""

from __future__ import annotations

from dataclasses import dataclass

from pkd.toolkit.certificate import Certificate
from pkd.toolkit.evaluation.draws import Draws
from pkd.toolkit.evaluation.results import Evaluation


@dataclass(frozen=True)
class Outcome:
    """All that one evaluation writes."""

    evaluation: Evaluation
    draws: Draws
    certificates: tuple[Certificate, ...] = ()
