"""Official pair lists: accuracy of right decisions, fold by fold."""

from __future__ import annotations

import numpy as np

from pkd.toolkit.encoders.base import Embeddings
from pkd.toolkit.evaluation.comparison.outcome import Outcome
from pkd.toolkit.evaluation.datasets.pair_list import PairList
from pkd.toolkit.evaluation.metrics.bootstrap import drawn_accuracies, interval
from pkd.toolkit.evaluation.metrics.kfold import best_threshold, out_of_fold
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats
from pkd.toolkit.evaluation.metrics.resamples import Draws, drawn_from
from pkd.toolkit.evaluation.protocols.common import Bar, Options, agree, common, describe_data, embed, notes_on
from pkd.toolkit.evaluation.protocols.encoder_set import Lineup
from pkd.toolkit.evaluation.results.schema import Evaluation, PairAccuracy


def pair_list_accuracy(
    pairs: PairList,
    name: str,
    lineup: Lineup,
    options: Options,
    bar: Bar,
    *,
    threshold_pairs: PairList | None = None,
    threshold_name: str = "",
) -> Outcome:
    """Accuracy on an official pair list: each fold at the threshold that is best on the others.

    A list of one fold takes its threshold from ``threshold_pairs``, or else from the same pairs (and says so).
    """
    cells = lineup.cells(with_probe=pairs.sides_differ, any_space=options.any_space)
    encoders = lineup.encoders
    vectors = {letter: embed(encoder, pairs.faces, options, bar) for letter, encoder in encoders.items()}
    other = threshold_pairs and {
        letter: embed(encoder, threshold_pairs.faces, options, bar) for letter, encoder in encoders.items()
    }
    found = []
    values: dict[str, Doubles] = {}
    for q, g in cells:
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
        values[f"{q}–{g}/accuracy"] = drawn_accuracies(
            right,
            pairs.same,
            labels[pairs.first],
            labels[pairs.second],
            resamples=options.resamples,
            seed=options.seed,
        )
        found.append(
            PairAccuracy(
                name=f"{q}–{g}",
                query=encoders[q].info.id,
                gallery=encoders[g].info.id,
                accuracy=float(per_fold.mean()),
                fold_std=float(per_fold.std()) if pairs.folds > 1 else None,
                ci95=interval(values[f"{q}–{g}/accuracy"]),
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
        agreement=agree(vectors["T"], vectors["S"]) if ("S", "T") in cells else None,
        notes=(*pairs.notes, *notes_on(lineup, options, [])),
        **common(lineup, options),
    )
    return Outcome(evaluation, Draws({**drawn_from(evaluation), "pairs": pairs.digest()}, values))


def _pair_scores(pairs: PairList, query: Embeddings, gallery: Embeddings) -> Floats:
    scores: Floats = np.einsum("nd,nd->n", query[pairs.first], gallery[pairs.second])
    return scores
