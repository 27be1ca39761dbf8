"""Measure accuracy on official pair lists, fold by fold."""

from __future__ import annotations

import numpy as np

from pkd.toolkit.core.progress import Progress
from pkd.toolkit.encoders.base import Embeddings
from pkd.toolkit.evaluation.datasets.pair_list import PairList
from pkd.toolkit.evaluation.metrics.bootstrap import accuracy_interval, resampled_accuracies
from pkd.toolkit.evaluation.metrics.paired import ScoredList, accuracy_contributions, shifted_accuracies
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats, Ints, Mask
from pkd.toolkit.evaluation.metrics.resamples import ResampleValues, resampled_from
from pkd.toolkit.evaluation.protocols.common import (
    EncoderSet,
    EvaluationOptions,
    ProtocolResult,
    common,
    describe_data,
    embed,
    measure_agreement,
    notes_on,
)
from pkd.toolkit.evaluation.results.schema import Evaluation, PairAccuracy


def pair_list_accuracy(
    pairs: PairList,
    name: str,
    encoder_set: EncoderSet,
    options: EvaluationOptions,
    progress: Progress,
    *,
    threshold_pairs: PairList | None = None,
    threshold_name: str = "",
) -> ProtocolResult:
    """Measure accuracy on an official pair list: each fold at the threshold that is best on the others.

    A list of one fold takes its threshold from ``threshold_pairs``, or else from the same pairs (and says so).
    """
    encoder_pairs = encoder_set.pairs(with_probe=pairs.sides_differ, any_space=options.any_space)
    encoders = encoder_set.encoders
    vectors = {letter: embed(encoder, pairs.faces, options, progress) for letter, encoder in encoders.items()}
    other = threshold_pairs and {
        letter: embed(encoder, threshold_pairs.faces, options, progress) for letter, encoder in encoders.items()
    }
    found = []
    values: dict[str, Doubles] = {}
    for q, g in encoder_pairs:
        scores = _pair_scores(pairs, vectors[q], vectors[g])
        if threshold_pairs and other:
            source = threshold_name
            tuned = best_threshold(_pair_scores(threshold_pairs, other[q], other[g]), threshold_pairs.same)
        elif pairs.folds == 1:
            source = "the same pairs: the accuracy is slightly too high"
            tuned = best_threshold(scores, pairs.same)
        else:
            source, tuned = "the other folds", None
        if tuned is None:
            right, thresholds = out_of_fold(scores, pairs.same, pairs.fold)
        else:
            right, thresholds = (scores >= tuned) == pairs.same, np.full(pairs.folds, tuned)
        labels = pairs.faces.labels
        per_fold = np.bincount(pairs.fold, right) / np.bincount(pairs.fold)
        decided = (right, pairs.same, labels[pairs.first], labels[pairs.second])
        name_of = f"{q}–{g}/accuracy"
        values[name_of] = resampled_accuracies(*decided, resamples=options.resamples, seed=options.seed)
        listed = _listed(pairs, scores)
        origin = (
            _listed(threshold_pairs, _pair_scores(threshold_pairs, other[q], other[g]))
            if other and threshold_pairs
            else listed
        )
        shifted = shifted_accuracies(listed, origin, resamples=options.resamples, seed=options.seed)
        values |= accuracy_contributions(right, listed.first, listed.second, shifted).named(name_of)
        found.append(
            PairAccuracy(
                name=f"{q}–{g}",
                query=encoders[q].info.id,
                gallery=encoders[g].info.id,
                accuracy=float(per_fold.mean()),
                fold_std=float(per_fold.std()) if pairs.folds > 1 else None,
                ci95=accuracy_interval(*decided),
                fold_accuracy=tuple(per_fold.tolist()),
                fold_threshold=tuple(thresholds.tolist()),
                threshold_from=source,
                genuine_pairs=int(pairs.same.sum()),
                impostor_pairs=int((~pairs.same).sum()),
            )
        )
    evaluation = Evaluation(
        protocol=f"pair list of {pairs.folds} folds" if pairs.folds > 1 else "pair list",
        data=describe_data(name, pairs.faces.digest(), pairs.faces.labels),
        pair_accuracies=tuple(found),
        agreement=measure_agreement(vectors["T"], vectors["S"]) if ("S", "T") in encoder_pairs else None,
        notes=(*pairs.notes, *notes_on(encoder_set, options, [])),
        **common(encoder_set, options),
    )
    return ProtocolResult(evaluation, ResampleValues({**resampled_from(evaluation), "pairs": pairs.digest()}, values))


def _pair_scores(pairs: PairList, query: Embeddings, gallery: Embeddings) -> Floats:
    scores: Floats = np.einsum("nd,nd->n", query[pairs.first], gallery[pairs.second])
    return scores


def _listed(pairs: PairList, scores: Floats) -> ScoredList:
    labels = pairs.faces.labels
    return ScoredList(scores, pairs.same, labels[pairs.first], labels[pairs.second])


def best_threshold(scores: Floats, same: Mask) -> float:
    """Find the threshold with the most right decisions, half-way to the next score; the middle one of equals."""
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
