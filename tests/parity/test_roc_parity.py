"""Operating points and equal error rate against scikit-learn's roc_curve."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from pkd.toolkit.evaluation.metrics.error_rates import equal_error_rate, fmr_at, rates, raw_fmr_at
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing


@pytest.mark.parametrize("seed", range(6))
def test_operating_points_agree_with_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(40), random.integers(1, 8, 40))
    centres = random.normal(size=(40, 16))
    vectors = (centres[labels] + random.normal(size=(len(labels), 16))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if seed % 2:
        vectors = np.round(vectors * 8) / 8  # type: ignore[assignment]  # many equal scores
    files = np.arange(len(labels))
    scores = score_pairs(Pairing(labels, labels, files, files, 40, unordered=True), vectors, vectors)

    truth = np.repeat([1, 0], [len(scores.genuine), len(scores.impostor)])
    false, true, thresholds = roc_curve(
        truth, np.concatenate([scores.genuine, scores.impostor]), drop_intermediate=False
    )
    targets = np.array([0.3, 0.1, 0.03, 0.01, 0.003])
    best = [true[false <= target].max() for target in targets]
    assert rates(scores, targets).tar == pytest.approx(best, abs=1e-12)
    assert equal_error_rate(scores) == pytest.approx(np.maximum(false, 1 - true).min(), abs=1e-12)
    assert raw_fmr_at(scores, thresholds[1:]) == pytest.approx(false[1:], abs=1e-12)

    # balanced: every two people, and every person, weigh the same
    weight = np.concatenate([1 / scores.pairing.genuine_per_identity[scores.genuine_identity], scores.share])
    false, true, thresholds = roc_curve(
        truth, np.concatenate([scores.genuine, scores.impostor]), sample_weight=weight, drop_intermediate=False
    )
    best = [true[false <= target * (1 + 1e-9)].max() for target in targets]
    assert rates(scores, targets).tar_balanced == pytest.approx(best, abs=1e-12)
    assert fmr_at(scores, thresholds[1:]) == pytest.approx(false[1:], abs=1e-12)
