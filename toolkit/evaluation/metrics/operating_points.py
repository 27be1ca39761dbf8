"""Turn the scores of one ordered pair of encoders into what is reported of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pkd.toolkit.certificates.certificate import Assurance, Assured, Calibration, OperatingPoint
from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.errors import UnsupportedFmr
from pkd.toolkit.evaluation.metrics.bootstrap import Bootstrap, bootstrap
from pkd.toolkit.evaluation.metrics.error_rates import (
    Rates,
    equal_error_rate,
    lowest_impostor,
    rates,
    require_resolved,
    smallest_fmr,
)
from pkd.toolkit.evaluation.metrics.influence import planned
from pkd.toolkit.evaluation.metrics.pair_scores import BINS, Ids, PairScores, bin_edges, bin_of
from pkd.toolkit.evaluation.metrics.paired import tar_contributions
from pkd.toolkit.evaluation.metrics.pairing import Doubles, Floats, Pairing
from pkd.toolkit.evaluation.results.schema import Comparison, Det, Distances, Histogram, PairOfFiles, Refusal, Worst

PLOT_BINS = 128
STEP = 1.05
"""About the quotient of neighbouring rates of the calibration."""
BEYOND = 12.0
"""Factor below the smallest resolved rate to which scores are kept for thresholds that assure it."""
MARGIN = 4e-6
"""Distance of a threshold from the impostor below it. It is more than a cosine of float32 vectors, as here, differs
from the same one in float64, as in a server: scores that tie do not part over their last places."""
WORST = 10
"""Pairs of each kind that are named."""


def measure(
    scores: PairScores,
    name: str,
    query: EncoderInfo,
    gallery: EncoderInfo,
    *,
    fmrs: Sequence[float],
    resamples: int,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[Comparison, dict[str, Doubles]]:
    """Measure operating points at those of ``fmrs`` that are resolved, calibration and DET curve, with intervals.

    Returns the values of every resample and what people contribute, too, by name, for ``ResampleValues``.
    """
    pairing = scores.pairing
    refused = [r for fmr in sorted(fmrs, reverse=True) if (r := _refusal(pairing, fmr))]
    targets = np.array(sorted(set(fmrs) - {r.fmr for r in refused}, reverse=True))
    grid = _grid(smallest_fmr(pairing), targets)
    curve = np.concatenate([grid, _beyond(grid)])
    full = rates(scores, curve)
    first = lowest_impostor(scores)
    drawn = bootstrap(scores, grid, np.append(first, full.threshold), resamples=resamples, seed=seed, advance=advance)
    places = [int(np.flatnonzero(grid == fmr)[0]) for fmr in targets]
    calibration = _calibrate(curve, len(grid), np.append(first, full.last_rejected + MARGIN), drawn)
    comparison = Comparison(
        name=name,
        query=query.id,
        gallery=gallery.id,
        genuine_pairs=pairing.genuine_pairs,
        genuine_identities=int((pairing.genuine_per_identity > 0).sum()),
        impostor_pairs=pairing.impostor_pairs,
        identity_pairs=pairing.identity_pairs,
        min_fmr=smallest_fmr(pairing),
        points=tuple(_point(grid, full, drawn, calibration, k) for k in places),
        effective_people=tuple(float(drawn.variance.people[k + 1]) for k in places),
        planned=tuple(planned(drawn, k, float(grid[k]), k + 1) for k in places),
        refused=tuple(refused),
        eer=equal_error_rate(scores),
        det=_det(grid, full, drawn),
        genuine=histogram(scores.genuine),
        impostor=Histogram(fractions=_coarser(scores.histogram)),
        distances=_distances(scores),
        calibration=calibration,
    )
    values = {
        f"{name}/{statistic}/{grid[k]:g}": samples[:, k]
        for statistic, samples in (("tar_balanced", drawn.tar_balanced), ("tar", drawn.tar))
        for k in places
    }
    for k in places:
        rate, variance = float(drawn.observed_fmr[k + 1]), float(drawn.variance.total[k + 1])
        contributed = tar_contributions(
            scores, float(grid[k]), float(full.threshold[k]), np.sqrt(variance) / rate if rate > 0 else 1.0
        )
        values |= contributed.named(f"{name}/tar_balanced/{grid[k]:g}")
    return comparison, values


def worst(scores: PairScores, query_name: Callable[[int], str], gallery_name: Callable[[int], str]) -> Worst:
    """Name the images of the ``WORST`` highest impostor and lowest genuine scores."""

    def named(rows: Ids, columns: Ids, values: Floats) -> tuple[PairOfFiles, ...]:
        triples = zip(rows, columns, values, strict=True)
        return tuple(PairOfFiles(query=query_name(i), gallery=gallery_name(j), score=float(s)) for i, j, s in triples)

    genuine = slice(None, -WORST - 1, -1)
    return Worst(
        false_matches=named(scores.impostor_query[:WORST], scores.impostor_gallery[:WORST], scores.impostor[:WORST]),
        false_non_matches=named(
            scores.genuine_query[genuine], scores.genuine_gallery[genuine], scores.genuine[genuine]
        ),
    )


def histogram(scores: Floats) -> Histogram:
    """Count ``scores`` as fractions in ``PLOT_BINS`` bins over −1 to 1."""
    return Histogram(fractions=_coarser(np.bincount(bin_of(scores), minlength=BINS)))


def _grid(smallest: float, targets: Doubles) -> Doubles:
    """List falling false match rates of the calibration and DET curves, down to the smallest that is resolved."""
    coarse = np.geomspace(0.05, 0.95, 60)
    fine = np.geomspace(0.05, min(0.05, smallest), 141)
    grid = np.unique(np.concatenate([coarse, fine, targets, [min(smallest, 1.0)]]))[::-1]
    kept: Doubles = grid[(grid < 1) & (grid >= smallest * (1 - 1e-9))]
    return kept


def _beyond(grid: Doubles) -> Doubles:
    """List rates below the smallest resolved one: thresholds that assure it lie at such."""
    if not len(grid):
        return grid
    steps = int(np.ceil(np.log(BEYOND) / np.log(STEP)))
    beyond: Doubles = grid[-1] * STEP ** -np.arange(1.0, steps + 1)
    return beyond


def _point(grid: Doubles, full: Rates, drawn: Bootstrap, calibration: Calibration, k: int) -> OperatingPoint:
    def assured(assurance: Assurance) -> Assured | None:
        threshold = calibration.assured_at(float(grid[k]), assurance)
        if threshold is None:
            return None
        accepted = full.tar_balanced[calibration.score.index(threshold) - 1]
        return Assured(threshold=threshold, tar_balanced=float(accepted))

    return OperatingPoint(
        fmr=float(grid[k]),
        threshold=calibration.score[k + 1],
        fmr_ci95=drawn.fmr_interval(k + 1),
        prediction95=drawn.prediction(k + 1),
        raw_threshold=float(full.raw_threshold[k]),
        tar=float(full.tar[k]),
        tar_ci95=drawn.tar_interval(k),
        tar_balanced=float(full.tar_balanced[k]),
        tar_balanced_ci95=drawn.tar_balanced_interval(k),
        as_point=assured("point"),
        as_bound=assured("bound"),
    )


def _det(grid: Doubles, full: Rates, drawn: Bootstrap) -> Det:
    fnmr = 1 - full.tar_balanced[: len(grid)]
    high, low = (1 - end for end in drawn.tar_balanced_intervals())
    return Det(
        fmr=tuple(grid.tolist()),
        fnmr=tuple(fnmr.tolist()),
        low=tuple(np.minimum(low, fnmr).tolist()),
        high=tuple(np.maximum(high, fnmr).tolist()),
    )


def _calibrate(curve: Doubles, resolved: int, knots: Doubles, drawn: Bootstrap) -> Calibration:
    """Build the curve score → FMR. A knot's rate is its target, so that threshold and rate are inverses.

    ``resolved``: how many rates of the falling ``curve`` are; the others are stated as the smallest of these.
    """
    stated = np.append(1.0, np.maximum(curve, curve[resolved - 1] if resolved else 1.0))
    low, high = np.array([drawn.fmr_interval(k) for k in range(len(knots))]).T
    asked: tuple[Assurance, ...] = ("point", "bound")
    point, bound = (
        _falling(np.maximum([drawn.assured(k, one) for k in range(len(knots))], np.append(1.0, curve))) for one in asked
    )
    return Calibration(
        score=tuple(np.maximum.accumulate(knots).tolist()),
        fmr=tuple(stated.tolist()),
        low=tuple(np.minimum(low, stated).tolist()),
        high=tuple(np.maximum(high, stated).tolist()),
        point=tuple(point.tolist()),
        bound=tuple(bound.tolist()),
    )


def _falling(rates: Doubles) -> Doubles:
    """Raise each rate to the largest of those after it, and none above 1."""
    falling: Doubles = np.minimum(np.maximum.accumulate(rates[::-1])[::-1], 1.0)
    return falling


def _refusal(pairing: Pairing, fmr: float) -> Refusal | None:
    try:
        require_resolved(pairing, fmr)
    except UnsupportedFmr as error:
        return Refusal(fmr=fmr, reason=str(error))
    return None


def _distances(scores: PairScores) -> Distances:
    """Summarise distances; those of impostors come from the histogram, exact to a bin."""
    within = _euclidean(scores.genuine.astype(np.float64))
    between, count = _euclidean(bin_edges() + 1 / BINS), scores.histogram / scores.histogram.sum()
    mean = float(between @ count)
    variance = float((between - mean) ** 2 @ count)
    spread = np.sqrt((within.var() + variance) / 2)
    return Distances(
        genuine_mean=float(within.mean()),
        genuine_std=float(within.std()),
        impostor_mean=mean,
        impostor_std=float(np.sqrt(variance)),
        d_prime=float(abs(within.mean() - mean) / spread) if spread > 0 else 0.0,
    )


def _euclidean(cosine: Doubles) -> Doubles:
    distance: Doubles = np.sqrt(np.maximum(2 - 2 * cosine, 0))
    return distance


def _coarser(bins: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> tuple[float, ...]:
    counts = bins.reshape(PLOT_BINS, -1).sum(axis=1)
    return tuple((counts / counts.sum()).tolist())
