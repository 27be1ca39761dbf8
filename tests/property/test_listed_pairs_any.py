"""Rates over listed template pairs against brute force, ties included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pkd.toolkit.evaluation.metrics import listed_pairs as listed_module
from pkd.toolkit.evaluation.metrics import pair_scores as scores_module
from pkd.toolkit.evaluation.metrics.bootstrap import bootstrap
from pkd.toolkit.evaluation.metrics.error_rates import (
    accepted_rates,
    equal_error_rate,
    first_beyond,
    impostor_cumulative,
    rates,
    raw_impostor_cumulative,
)
from pkd.toolkit.evaluation.metrics.listed_pairs import ListedPairs, listed, read_pair_labels, score_listed
from pkd.toolkit.evaluation.metrics.pair_scores import PairScores
from tests.support import evaluation_oracle as oracle

TARGETS = np.array([0.5, 0.25, 0.1, 0.02])


def make(seed: int, people: int, templates: int, count: int, scale: float = 4.0) -> tuple[ListedPairs, np.ndarray]:
    """Pairs of templates with repeated scores; some templates, and so some people, are in no pair."""
    random = np.random.default_rng(seed)
    subject = np.append(random.integers(0, people, templates), people)
    first, second = (random.integers(0, templates - 1, count).astype(np.int32) for _ in range(2))
    keep = first != second
    first, second = first[keep], second[keep]
    vectors = (random.integers(-4, 5, (templates + 1, 3)) / (2 * scale)).astype(np.float32)
    return listed(first, second, subject[first] == subject[second], subject), vectors


def looped(pairs: ListedPairs, vectors: np.ndarray, multiplicity: np.ndarray) -> list[oracle.Pair]:
    found = []
    for i, j, same in zip(pairs.first, pairs.second, pairs.same, strict=True):
        a, b = int(pairs.query[i]), int(pairs.gallery[j])
        assert (a == b) == same
        drawn = float(multiplicity[a] if same else multiplicity[a] * multiplicity[b])
        if drawn:
            found.append(oracle.Pair(float(vectors[i].astype(np.float64) @ vectors[j]), a, b, drawn))
    return found


@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(3, 10), st.integers(4, 60), st.booleans())
@settings(max_examples=60)
def test_rates_with_drawn_identities_are_those_of_the_loop(
    seed: int, people: int, templates: int, count: int, draw: bool
) -> None:
    pairs, vectors = make(seed, people, templates, count)
    assume(pairs.same.any() and not pairs.same.all())
    multiplicity = (
        np.random.default_rng(seed).integers(0, 3, pairs.identities).astype(float)
        if draw
        else np.ones(pairs.identities)
    )
    found = looped(pairs, vectors, multiplicity)
    assume(any(p.same for p in found) and any(not p.same for p in found))
    assert pairs.genuine_pairs == pairs.same.sum() and pairs.impostor_pairs == (~pairs.same).sum()
    assert pairs.impostor_weight(multiplicity) == sum(p.weight for p in found if not p.same)
    everyone = looped(pairs, vectors, np.ones(pairs.identities))
    both = [frozenset((p.query, p.gallery)) for p in everyone if not p.same]
    assert pairs.identity_pairs == len(set(both))
    drawn_people = {frozenset((p.query, p.gallery)): p.weight for p in found if not p.same}
    assert pairs.identity_pair_weight(multiplicity) == sum(drawn_people.values())
    assert set(np.concatenate([pairs.query[pairs.first], pairs.query[pairs.second]])) == set(range(pairs.identities))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listed_module, "BLOCK", 7)
        scores = score_listed(pairs, vectors, vectors)
    places = (
        first_beyond(cumulative, cumulative, np.ones(len(TARGETS)), TARGETS)
        for cumulative in (impostor_cumulative(scores, multiplicity), raw_impostor_cumulative(scores, multiplicity))
    )
    made = accepted_rates(scores, *places, multiplicity)  # type: ignore[arg-type, call-arg]
    for k, target in enumerate(TARGETS):
        raw = oracle.threshold_at(found, float(target), oracle.fmr)
        assert made.raw_threshold[k] == raw
        assert made.tar[k] == pytest.approx(oracle.tar(found, raw), abs=1e-12)
        threshold = oracle.threshold_at(found, float(target))
        assert made.threshold[k] == threshold
        # every drawn identity weighs the same, however many pairs the list has of it
        assert made.tar_balanced[k] == pytest.approx(oracle.tar_balanced(found, threshold), abs=1e-12)
    assert equal_error_rate(scores) == pytest.approx(oracle.equal_error_rate(everyone), abs=1e-12)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_what_is_kept_of_a_long_list_gives_the_same_rates(seed: int) -> None:
    random = np.random.default_rng(seed)
    subject = random.integers(0, 30, 200)
    vectors = random.normal(size=(200, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    first, second = (side.astype(np.int32) for side in np.triu_indices(200, 1))
    pairs = listed(first, second, subject[first] == subject[second], subject)
    whole = score_listed(pairs, vectors, vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores_module, "KEEP", 100)
        patch.setattr(listed_module, "KEEP", 100)
        part = score_listed(pairs, vectors, vectors, seed=seed)
    assert np.isneginf(whole.cut) and part.cut > -1 and len(part.impostor) < 0.1 * len(whole.impostor)
    exact = part.impostor >= part.cut
    np.testing.assert_array_equal(part.impostor[exact], whole.impostor[: exact.sum()])
    assert part.weight[exact] == pytest.approx(1) and part.weight.sum() == pytest.approx(pairs.impostor_pairs)
    assert part.histogram.sum() == pairs.impostor_pairs
    np.testing.assert_allclose(rates(part, TARGETS).raw_threshold, rates(whole, TARGETS).raw_threshold, atol=2e-5)
    np.testing.assert_allclose(rates(part, TARGETS).tar, rates(whole, TARGETS).tar, atol=0.02)


def test_intervals_cover_the_measured_rates() -> None:
    pairs, vectors = make(3, 40, 200, 4000)
    noise = np.random.default_rng(0).normal(size=vectors.shape).astype(np.float32) / 100
    scores: PairScores = score_listed(pairs, vectors, vectors + noise)  # type: ignore[arg-type]
    targets = np.array([0.1, 0.05])
    full = rates(scores, targets)
    drawn = bootstrap(scores, targets, full.threshold, resamples=200)
    for k in range(2):
        low, high = drawn.tar_balanced_interval(k)
        assert low < full.tar_balanced[k] < high
        low, high = drawn.fmr_interval(k)
        assert low < targets[k] < high and high - low < 0.1


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 1)), min_size=1, max_size=40),
    st.integers(1, 64),
    st.booleans(),
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_list_reads_alike_in_blocks_of_any_size(
    tmp_path: Path, rows: list[tuple[int, int, int]], block: int, ends: bool
) -> None:
    ids = np.array([1, 5, 20, 333, 4444, 55555])
    rows = [(a, b if a != b else (b + 1) % 6, label) for a, b, label in rows]
    text = "\n".join(f"{ids[a]} {ids[b]}\t{label}" for a, b, label in rows) + ("\r\n\n" if ends else "")
    (tmp_path / "pairs.txt").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listed_module, "READ", block)
        first, second, same = read_pair_labels(tmp_path / "pairs.txt", ids)
    assert list(zip(first.tolist(), second.tolist(), same.astype(int).tolist(), strict=True)) == rows
