"""Rank-k and FNIR at FPIR against brute force, on vectors whose products are exact in float32: ties are real ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from pkd.toolkit.evaluation.metrics.identification import SearchRates, joined, one_gallery, search, two_galleries
from pkd.toolkit.evaluation.metrics.pairing import Pairing
from tests.support import identification_oracle as oracle

FPIRS = np.array([0.9, 0.5, 0.3, 0.1, 0.01])
RANKS = (1, 2, 5)
SETTINGS = settings(max_examples=80)
Case = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a small gallery, with several entries for some people, and probes of these and of others; scores repeat."""
    people = draw(st.integers(2, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sides = []
    for _ in range(2):
        count = draw(st.integers(2, 14))
        vectors = random.integers(-3, 4, (count, 3)).astype(np.float32) / 4
        sides += [vectors, random.integers(0, people, count)]
    probe, identity, gallery, owner = sides
    return probe, identity, gallery, owner, people


@given(cases(), st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([1 << 22, 16, 1]))
@SETTINGS
def test_rates_with_drawn_identities_are_those_of_the_loop(case: Case, seed: int, within: int, block: int) -> None:
    probe, identity, gallery, owner, people = case
    drawn = np.random.default_rng(seed).integers(0, 3, people).astype(np.float64) if seed % 3 else np.ones(people)
    found = oracle.searches(probe, identity, gallery, owner)
    assume(any(one.mate is not None and drawn[one.identity] for one in found))
    assume(any(one.mate is None and drawn[one.identity] for one in found))

    made = search(probe, identity, gallery, owner, block=block)
    assert made.best.tolist() == [one.best for one in found]
    assert made.mate.tolist() == [-np.inf if one.mate is None else one.mate for one in found]
    assert made.rank.tolist() == [one.rank for one in found]

    rates = SearchRates(made, people, within=within).draw(drawn, RANKS, FPIRS)
    for row, balanced in enumerate((True, False)):
        weight = oracle.weights(found, drawn, balanced=balanced)
        for k, rank in enumerate(RANKS):
            assert rates.ranks[row, k] == pytest.approx(oracle.rank_rate(found, weight, rank), abs=1e-12)
        for k, target in enumerate(FPIRS):
            threshold = oracle.threshold_at(found, weight, float(target))
            assert rates.threshold[row, k] == threshold
            assert rates.fnir[row, k] == pytest.approx(oracle.fnir(found, weight, threshold, within), abs=1e-12)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_open_set_rates_agree_with_scikit_learn(seed: int) -> None:
    """With the rank left free, FNIR against FPIR is the curve of the mates' scores against the best of the others'."""
    random = np.random.default_rng(seed)
    owner = np.repeat(np.arange(30), random.integers(1, 4, 30))
    centres = random.normal(size=(60, 8))
    identity = random.integers(0, 60, 150)
    probe, gallery = (
        np.round((centres[who] + random.normal(size=(len(who), 8))) * 2).astype(np.float32) / 64
        for who in (identity, owner)
    )
    made = search(probe, identity, gallery, owner)  # type: ignore[arg-type]
    assume(made.mated.any() and not made.mated.all())
    rates = SearchRates(made, 60, within=30).draw(np.ones(60), (1,), FPIRS)
    scores = np.where(made.mated, made.mate, made.best)
    share = 1 / np.array(
        [np.sum((identity == i) & (made.mated == m)) for i, m in zip(identity, made.mated, strict=True)]
    )
    for row, weight in enumerate((share, np.ones(150))):
        false, true, _ = roc_curve(made.mated, scores, sample_weight=weight, drop_intermediate=False)
        best = [true[false <= target * (1 + 1e-9)].max() for target in FPIRS]
        assert 1 - rates.fnir[row] == pytest.approx(best, abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(2, 9))
@settings(max_examples=40)
def test_two_galleries_search_everyone_once_without_a_mate(seed: int, people: int) -> None:
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(people), random.integers(0, people, 12)])
    files = np.arange(len(labels))
    plans = two_galleries(Pairing(labels, labels, files, files, people), seed)
    order = random.permutation(len(labels))
    turned = two_galleries(Pairing(labels[order], labels[order], files[order], files[order], people), seed)
    assert [sorted(order[p.enrolled].tolist()) for p in turned] == [sorted(p.enrolled.tolist()) for p in plans]
    enrolled = [set(labels[plan.enrolled].tolist()) for plan in plans]
    assert [len(plan.enrolled) for plan in plans] == [people // 2, people - people // 2]
    assert not enrolled[0] & enrolled[1] and enrolled[0] | enrolled[1] == set(range(people))
    for plan, who in zip(plans, enrolled, strict=True):
        assert sorted([*plan.enrolled, *plan.searched]) == list(range(len(labels)))
        assert len(who) == len(plan.enrolled)
    vectors = np.eye(people, dtype=np.float32)[labels]
    made = joined(
        [search(vectors[p.searched], labels[p.searched], vectors[p.enrolled], labels[p.enrolled]) for p in plans]
    )
    assert (made.rank[made.mated] == 1).all() and (made.best[~made.mated] == 0).all()
    assert np.bincount(made.identity[~made.mated]).tolist() == np.bincount(labels).tolist()
    assert (np.bincount(made.identity[made.mated], minlength=people) == np.bincount(labels) - 1).all()


def test_a_probe_that_is_enrolled_is_not_searched() -> None:
    labels, files = np.array([0, 0, 1, 2]), np.array([7, 8, 9, 7])
    (plan,) = one_gallery(Pairing(labels, np.array([0, 1]), files, np.array([7, 5]), 3))
    assert plan.enrolled.tolist() == [0, 1] and plan.searched.tolist() == [1, 2] and plan.left_out == 2
