"""Error rates against brute force, on vectors whose products are exact in float32: ties are real ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pkd.toolkit.evaluation.metrics import pair_scores as scores_module
from pkd.toolkit.evaluation.metrics.error_rates import (
    accepted_rates,
    equal_error_rate,
    first_beyond,
    fmr_at,
    impostor_cumulative,
    lowest_impostor,
    rates,
    raw_fmr_at,
    raw_impostor_cumulative,
)
from pkd.toolkit.evaluation.metrics.pair_scores import BINS, bin_edges, bin_of, score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing
from tests.support import evaluation_oracle as oracle

TARGETS = np.array([0.5, 0.25, 0.1, 0.02])
SETTINGS = settings(max_examples=60)


@st.composite
def pairings(draw: st.DrawFn) -> tuple[Pairing, np.ndarray, np.ndarray]:
    """Draw a small set (or gallery and probe set) with repeated scores, singletons and byte-identical files."""
    people = draw(st.integers(2, 5))
    kind = draw(st.sampled_from(["unordered", "ordered", "two sets"]))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    count = draw(st.integers(3, 12))
    labels = random.integers(0, people, count)
    vectors = random.integers(-4, 5, (count, 3)).astype(np.float32) / 8
    files = np.arange(count)
    if draw(st.booleans()):
        files[random.integers(count)] = files[random.integers(count)]
    if kind != "two sets":
        pairing = Pairing(labels, labels, files, files, people, unordered=kind == "unordered")
        return pairing, vectors, vectors
    other = draw(st.integers(3, 12))
    gallery = random.integers(-4, 5, (other, 3)).astype(np.float32) / 8
    gallery_files = np.where(random.random(other) < 0.3, random.integers(0, count, other), np.arange(other) + count)
    return Pairing(labels, random.integers(0, people, other), files, gallery_files, people), vectors, gallery


@given(pairings())
@SETTINGS
def test_counts_are_those_of_the_loop(case: tuple[Pairing, np.ndarray, np.ndarray]) -> None:
    pairing, query, gallery = case
    found = oracle.all_pairs(pairing, query, gallery)
    assert pairing.genuine_pairs == sum(p.same for p in found)
    assert pairing.impostor_pairs == sum(not p.same for p in found)
    for identity in range(pairing.identities):
        assert pairing.genuine_per_identity[identity] == sum(p.same and p.query == identity for p in found)
    assert pairing.identity_pairs == len({frozenset((p.query, p.gallery)) for p in found if not p.same})


@given(pairings(), st.integers(0, 2**32 - 1))
@SETTINGS
def test_rates_with_drawn_identities_are_those_of_the_loop(
    case: tuple[Pairing, np.ndarray, np.ndarray], seed: int
) -> None:
    pairing, query, gallery = case
    random = np.random.default_rng(seed)
    multiplicity = (
        random.integers(0, 3, pairing.identities).astype(np.float64) if seed % 3 else np.ones(pairing.identities)
    )
    found = oracle.all_pairs(pairing, query, gallery, multiplicity)
    assume(any(p.same for p in found) and any(not p.same for p in found))
    assert pairing.impostor_weight(multiplicity) == sum(p.weight for p in found if not p.same)

    scores = score_pairs(pairing, query, gallery)
    people = [frozenset((p.query, p.gallery)) for p in found if not p.same]
    drawn_people = {pair: multiplicity[list(pair)].prod() for pair in people}
    assert pairing.identity_pair_weight(multiplicity) == sum(drawn_people.values())
    a, b = (np.array(side) for side in zip(*(sorted(pair) for pair in drawn_people), strict=True))
    if (multiplicity > 0).all():
        assert pairing.pairs_between(a, b).tolist() == [people.count(pair) for pair in drawn_people]
    places = (
        first_beyond(cumulative, cumulative, np.ones(len(TARGETS)), TARGETS)
        for cumulative in (impostor_cumulative(scores, multiplicity), raw_impostor_cumulative(scores, multiplicity))
    )
    made = accepted_rates(scores, *places, multiplicity)  # type: ignore[arg-type, call-arg]
    if (multiplicity == 1).all():
        whole = rates(scores, TARGETS)
        np.testing.assert_array_equal(made.threshold, whole.threshold)
        np.testing.assert_array_equal(made.raw_threshold, whole.raw_threshold)
    for k, target in enumerate(TARGETS):
        threshold = oracle.threshold_at(found, float(target))
        assert made.threshold[k] == threshold
        assert made.tar_balanced[k] == pytest.approx(oracle.tar_balanced(found, threshold), abs=1e-12)
        raw = oracle.threshold_at(found, float(target), oracle.fmr)
        assert made.raw_threshold[k] == raw
        assert made.tar[k] == pytest.approx(oracle.tar(found, raw), abs=1e-12)


@given(pairings())
@SETTINGS
def test_error_rate_curve_is_that_of_the_loop(case: tuple[Pairing, np.ndarray, np.ndarray]) -> None:
    pairing, query, gallery = case
    found = oracle.all_pairs(pairing, query, gallery)
    assume(any(p.same for p in found) and any(not p.same for p in found))
    scores = score_pairs(pairing, query, gallery)
    assert equal_error_rate(scores) == pytest.approx(oracle.equal_error_rate(found), abs=1e-12)
    thresholds = np.array([-2.0, -0.5, 0.0, 0.125, 0.3, 0.75, 2.0])
    assert raw_fmr_at(scores, thresholds) == pytest.approx([oracle.fmr(found, t) for t in thresholds], abs=1e-12)
    assert fmr_at(scores, thresholds) == pytest.approx([oracle.fmr_balanced(found, t) for t in thresholds], abs=1e-12)
    assert oracle.fmr(found, lowest_impostor(scores)) == 1.0


@given(st.integers(0, 2**32 - 1), st.booleans(), st.integers(17, 64))
@settings(max_examples=25)
def test_what_is_kept_of_a_large_set_gives_the_same_rates(seed: int, unordered: bool, tile: int) -> None:
    """With small limits a set of 120 images takes the path of a large one: tiles, strata, both ways of sampling."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 20, 120)
    vectors = random.normal(size=(120, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    files = np.where(random.random(120) < 0.05, 7, np.arange(120))
    pairing = Pairing(labels, labels, files, files, 20, unordered)
    whole = score_pairs(pairing, vectors, vectors)
    assert len(whole.impostor) == pairing.impostor_pairs and np.isneginf(whole.cut)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores_module, "KEEP", 100)
        patch.setattr(scores_module, "TILE", tile)
        patch.setattr(scores_module, "FEW", 1 / 4)
        part = score_pairs(pairing, vectors, vectors, seed=seed)
    assert part.cut > -1 and len(part.impostor) < 0.4 * len(whole.impostor)
    exact = part.impostor >= part.cut
    assert 50 <= exact.sum() <= 200
    np.testing.assert_allclose(part.impostor[exact], whole.impostor[: exact.sum()], atol=1e-6)
    assert part.weight[exact] == pytest.approx(1)
    assert part.weight.sum() == pytest.approx(pairing.impostor_pairs)
    assert part.histogram.sum() == pairing.impostor_pairs
    np.testing.assert_allclose(part.genuine, whole.genuine, atol=1e-6)
    query, gallery = vectors[part.impostor_query], vectors[part.impostor_gallery]
    np.testing.assert_allclose(part.impostor, np.einsum("nd,nd->n", query, gallery), atol=1e-6)
    targets = np.array([0.9, 0.5, 0.2, 0.02, 0.005])
    np.testing.assert_allclose(rates(part, targets).raw_threshold, rates(whole, targets).raw_threshold, atol=2e-5)
    assert rates(part, targets).tar == pytest.approx(rates(whole, targets).tar, abs=0.01)
    grid = np.linspace(-0.9, 0.9, 30)
    np.testing.assert_allclose(
        raw_fmr_at(part, grid), raw_fmr_at(whole, grid), rtol=0, atol=12 / pairing.impostor_pairs
    )
    assert equal_error_rate(part) == pytest.approx(equal_error_rate(whole), abs=2e-3)


def test_rates_from_the_sample_are_unbiased_with_and_without_drawn_people() -> None:
    """One set, 200 samples of its impostors: their mean lies within four standard errors of all of them."""
    random = np.random.default_rng(5)
    labels = random.integers(0, 20, 120)
    vectors = random.normal(size=(120, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairing = Pairing(labels, labels, np.arange(120), np.arange(120), 20)
    whole = score_pairs(pairing, vectors, vectors)
    drawn = random.multinomial(20, np.full(20, 0.05)).astype(np.float64)
    thresholds = np.array([0.8, 0.6, 0.3, 0.0])

    def measured(scores: scores_module.PairScores) -> np.ndarray:
        matched = (scores.impostor[:, None] >= thresholds).sum(axis=0)
        curves = [c(scores, w) for c in (impostor_cumulative, raw_impostor_cumulative) for w in (np.ones(20), drawn)]
        return np.array([np.append(0.0, curve)[matched] for curve in curves])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores_module, "KEEP", 100)
        patch.setattr(scores_module, "FEW", 1 / 4)
        samples = np.array([measured(score_pairs(pairing, vectors, vectors, seed=seed)) for seed in range(200)])
    error = samples.std(axis=0) / np.sqrt(len(samples))
    assert (error[:, 1:] > 0).all(), "nothing was sampled"
    assert (np.abs(samples.mean(axis=0) - measured(whole)) <= 4 * error + 1e-12).all()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_the_histogram_bins_a_score_where_bin_of_says(seed: int) -> None:
    """Scores on the edges, just beside them, and just beyond −1 and 1."""
    random = np.random.default_rng(seed)
    edges = bin_edges()[random.integers(0, BINS, 50)].astype(np.float32)
    scores = np.concatenate([edges, np.nextafter(edges, np.float32(-2)), np.float32([1, -1, 1.000001, -1.000001, 0])])  # type: ignore[arg-type]
    counts = scores_module.fold_margins(scores_module.count_bins(scores[None]))
    np.testing.assert_array_equal(counts, np.bincount(bin_of(scores), minlength=BINS))
