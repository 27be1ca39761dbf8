"""The report's baselines: what an undistilled control, and a linear map of it, would have given."""

from __future__ import annotations

from pkd.toolkit.evaluation.results import Evaluation


def baselines(e: Evaluation) -> str:
    """What distillation bought, or what to pass to see it."""
    return ""
