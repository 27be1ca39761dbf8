"""Right decisions on a list of pairs, each fold at the threshold that is best on the others."""

from __future__ import annotations

import numpy as np

from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats, Ints, Mask


def best_threshold(scores: Floats, same: Mask) -> float:
    """Threshold with the most right decisions on these pairs, half-way to the next score; the middle one of equals."""
    order = np.argsort(-scores, kind="stable")
    down, genuine = scores[order].astype(np.float64), same[order]
    right = np.concatenate([[0], np.cumsum(np.where(genuine, 1, -1))])  # + the impostors, a constant
    allowed = np.concatenate([[True], down[1:] < down[:-1], [True]])  # equal scores fall on one side
    best = np.flatnonzero(allowed & (right == right[allowed].max()))
    cut = best[len(best) // 2]
    padded = np.concatenate([[down[0] + 1e-6], down, [down[-1] - 1e-6]])
    return float((padded[cut] + padded[cut + 1]) / 2)


def out_of_fold(scores: Floats, same: Mask, fold: Ints) -> tuple[Mask, Doubles]:
    """Decide each pair at the threshold that is best on the other folds (LFW View 2; Huang et al. 2007).

    Returns which decisions are right (bool, one per pair) and the threshold of each fold.
    """
    right = np.empty(len(scores), bool)
    thresholds = np.empty(int(fold.max()) + 1)
    for k in range(len(thresholds)):
        held = fold == k
        thresholds[k] = best_threshold(scores[~held], same[~held])
        right[held] = (scores[held] >= thresholds[k]) == same[held]
    return right, thresholds
