"""Check a student against its teacher on held-out people: one accuracy, with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.encoders.base import Embeddings
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing

FMRS = (1e-3, 1e-2)
"""False match rates tried; the first that the people resolve is reported."""
RESAMPLES = 200


def check_student(
    student: Embeddings, teacher: Embeddings, labels: NDArray[np.int64], info: EncoderInfo
) -> Mapping[str, Any]:
    """Measure S–T and T–T of images N×D (unit rows) by identity ``labels``; −1 is left out.

    Returns ``fmr``, ``tar`` and ``interval`` (S–T, every identity weighing the same, 95 %) and ``teacher`` (T–T); or
    ``unresolved``, the reason, where the people are too few for any rate.
    """
    known = np.flatnonzero(labels >= 0)
    names, owners = np.unique(labels[known], return_inverse=True)
    files = np.arange(len(known))
    pairing = Pairing(owners, owners, files, files, len(names), unordered=False)
    if len(names) < 2 or not pairing.genuine_pairs or not pairing.impostor_pairs:
        return {"unresolved": "no two held-out people with two images each"}
    found: dict[str, Any] = {}
    for name, query in (("S–T", student), ("T–T", teacher)):
        scores = score_pairs(pairing, query[known], teacher[known], seed=0)
        comparison, _ = measure(scores, name, info, info, fmrs=FMRS, resamples=RESAMPLES, seed=0)
        points = sorted(comparison.points, key=lambda point: point.fmr)
        if not points:
            return {"unresolved": comparison.refused[-1].reason}
        if name == "S–T":
            best = points[0]
            found = {"fmr": best.fmr, "tar": best.tar_balanced, "interval": best.tar_balanced_ci95}
        else:
            found["teacher"] = points[0].tar_balanced
    return found
