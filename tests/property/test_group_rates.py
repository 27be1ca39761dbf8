"""Rates per group agree with a brute-force oracle on the group's own images, and say so where they are not resolved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.toolkit.certificates.certificate import Attribute
from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.evaluation.metrics.demographics import divide, measure_groups
from pkd.toolkit.evaluation.metrics.error_rates import EXPECTED
from pkd.toolkit.evaluation.metrics.labels import Labels
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing
from tests.support import evaluation_oracle as oracle

ENCODER = describe("tiny", "teacher", "0" * 64, Preprocess(), 5)
FMRS = (0.3, 0.1, 0.03)


class Drawn:
    """People with a group each (``a``, ``b`` or none), images with equal scores and copies among them."""

    def __init__(self, seed: int, people: int, *, unordered: bool, spread: float = 0.8) -> None:
        random = np.random.default_rng(seed)
        self.names = [f"p{i:02d}" for i in range(people)]
        self.owners = np.repeat(np.arange(people), random.integers(1, 4, people))
        vectors = random.normal(size=(people, 5))[self.owners] + spread * random.normal(size=(len(self.owners), 5))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        self.vectors = (np.round(vectors * 64) / 64).astype(np.float32)  # products are exact in either precision
        files = np.arange(len(self.owners))
        twice = np.flatnonzero(self.owners[1:] == self.owners[:-1])[:1]
        files[twice + 1] = files[twice]
        self.pairing = Pairing(self.owners, self.owners, files, files, people, unordered=unordered)
        self.group = random.choice(np.array(["a", "b", ""]), people, p=(0.6, 0.3, 0.1))
        self.group[:2] = "a", "b"
        values = {n: (g or None,) for n, g in zip(self.names, self.group.tolist(), strict=True)}
        self.labels = Labels("labels.csv", "0" * 64, ("kind",), values)  # type: ignore[arg-type]

    def measured(self) -> tuple[Attribute, list[float]]:
        scores = score_pairs(self.pairing, self.vectors, self.vectors)
        points = measure(scores, "T–T", ENCODER, ENCODER, fmrs=FMRS, resamples=100, seed=0)[0].points
        groups = divide(self.labels, self.names, self.pairing, one_set=True)
        (found,) = measure_groups(groups, self.vectors, self.vectors, scores, points, seed=0)
        return found, [p.threshold for p in points]


@given(st.integers(0, 10_000), st.integers(15, 45), st.booleans())
@settings(max_examples=25)
def test_groups_agree_with_the_oracle(seed: int, people: int, unordered: bool) -> None:
    drawn = Drawn(seed, people, unordered=unordered)
    found, thresholds = drawn.measured()
    everyone = oracle.all_pairs(drawn.pairing, drawn.vectors, drawn.vectors)
    assert found.unlabelled == int((drawn.group == "").sum())
    assert [g.value for g in found.groups] == sorted(set(drawn.group.tolist()) - {""})
    for group in found.groups:
        member = {i for i, g in enumerate(drawn.group.tolist()) if g == group.value}
        pairs = [p for p in everyone if p.query in member and p.gallery in member]
        assert group.identities == len(member)
        assert group.images == sum(owner in member for owner in drawn.owners.tolist())
        assert group.genuine_pairs == sum(p.same for p in pairs)
        assert group.impostor_pairs == sum(not p.same for p in pairs)
        assert group.identity_pairs == len({frozenset((p.query, p.gallery)) for p in pairs if not p.same})
        assert group.genuine_identities == len({p.query for p in pairs if p.same})
        assert [r.threshold for r in group.rates] == thresholds
        for rates in group.rates:
            smallest = EXPECTED / max(1, min(group.identity_pairs, group.impostor_pairs))
            if rates.target_fmr < smallest * (1 - 1e-9):
                assert rates.fmr is rates.fmr_ci95 is rates.fmr_ratio is None and not rates.fmr_is_upper_bound
            else:
                exact = oracle.fmr_balanced(pairs, rates.threshold)
                assert rates.fmr == pytest.approx(max(exact, smallest))
                assert rates.fmr_is_upper_bound == (exact < smallest)
                assert rates.fmr_ratio == pytest.approx(rates.fmr / oracle.fmr_balanced(everyone, rates.threshold))  # type: ignore[operator]
                low, high = rates.fmr_ci95 or (1, 0)
                assert 0 <= low <= exact + 1e-9 and rates.fmr <= high * (1 + 1e-9)  # type: ignore[operator]
            if group.genuine_identities < EXPECTED:
                assert rates.fnmr is rates.fnmr_balanced is rates.fnmr_balanced_ci95 is None
            else:
                assert rates.fnmr == pytest.approx(1 - oracle.tar(pairs, rates.threshold))
                assert rates.fnmr_balanced == pytest.approx(1 - oracle.tar_balanced(pairs, rates.threshold))
                low, high = rates.fnmr_balanced_ci95 or (1, 0)
                assert 0 <= low < high <= 1
                overall = 1 - oracle.tar_balanced(everyone, rates.threshold)
                if overall > 1e-9:
                    assert rates.fnmr_balanced_ratio == pytest.approx(rates.fnmr_balanced / overall)  # type: ignore[operator]


def test_a_group_of_everyone_has_everyones_rates() -> None:
    drawn = Drawn(1, 60, unordered=True)
    drawn.labels.values.update(dict.fromkeys(drawn.names, ("all",)))
    drawn.group[:] = "all"
    (group,) = drawn.measured()[0].groups
    scores = score_pairs(drawn.pairing, drawn.vectors, drawn.vectors)
    points = measure(scores, "T–T", ENCODER, ENCODER, fmrs=FMRS, resamples=100, seed=0)[0].points
    for rates, point in zip(group.rates, points, strict=True):
        assert rates.fmr_ratio == pytest.approx(1) and rates.fnmr_balanced_ratio == pytest.approx(1)
        assert rates.fnmr_balanced == pytest.approx(1 - point.tar_balanced)
        assert rates.fmr_ci95 == pytest.approx(point.fmr_ci95)
        assert (
            rates.fnmr_balanced_ci95 and rates.fnmr_balanced_ci95[0] < rates.fnmr_balanced < rates.fnmr_balanced_ci95[1]  # type: ignore[operator]
        )


def test_a_group_without_genuine_or_without_impostor_pairs_is_counted_and_not_rated() -> None:
    people = 40
    owners = np.repeat(np.arange(people), [1] * 30 + [4] * 10)
    vectors = np.random.default_rng(0).normal(size=(people, 5))[owners] + 0.4 * np.random.default_rng(1).normal(
        size=(len(owners), 5)
    )
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    files = np.arange(len(owners))
    pairing = Pairing(owners, owners, files, files, people, unordered=True)
    names = [f"p{i:02d}" for i in range(people)]
    values = {n: (("single" if i < 30 else "alone" if i == 39 else "rest"),) for i, n in enumerate(names)}
    groups = divide(Labels("l", "0" * 64, ("kind",), values), names, pairing, one_set=True)  # type: ignore[arg-type]
    scores = score_pairs(pairing, unit, unit)
    points = measure(scores, "T–T", ENCODER, ENCODER, fmrs=(0.1,), resamples=100, seed=0)[0].points
    (found,) = measure_groups(groups, unit, unit, scores, points, seed=0)
    alone, rest, single = found.groups
    assert (single.genuine_pairs, single.rates[0].fnmr, alone.impostor_pairs, alone.rates[0].fmr) == (0, None, 0, None)
    assert single.rates[0].fmr is not None and alone.min_fmr is None and rest.min_fmr is not None


def test_a_probe_and_a_gallery_set_are_divided_alike() -> None:
    """Images of the two sides are counted together; rates agree with the oracle in both directions."""
    drawn = Drawn(3, 40, unordered=False)
    q, g = np.arange(0, len(drawn.owners), 2), np.arange(1, len(drawn.owners), 2)
    pairing = Pairing(drawn.owners[q], drawn.owners[g], q, g, 40)
    scores = score_pairs(pairing, drawn.vectors[q], drawn.vectors[g])
    points = measure(scores, "S–T", ENCODER, ENCODER, fmrs=(0.3, 0.1), resamples=100, seed=0)[0].points
    groups = divide(drawn.labels, drawn.names, pairing, one_set=False)
    (found,) = measure_groups(groups, drawn.vectors[q], drawn.vectors[g], scores, points, seed=0)
    everyone = oracle.all_pairs(pairing, drawn.vectors[q], drawn.vectors[g])
    assert sum(group.images for group in found.groups) == int((drawn.group[drawn.owners] != "").sum())
    for group in found.groups:
        member = {i for i, x in enumerate(drawn.group.tolist()) if x == group.value}
        pairs = [p for p in everyone if p.query in member and p.gallery in member]
        assert group.impostor_pairs == sum(not p.same for p in pairs)
        for rates in group.rates:
            if rates.fmr is not None and not rates.fmr_is_upper_bound:
                assert rates.fmr == pytest.approx(oracle.fmr_balanced(pairs, rates.threshold))


def test_labels_of_strangers_are_refused() -> None:
    drawn = Drawn(0, 10, unordered=True)
    with pytest.raises(InputError, match=r"10 of its 10 identities are not in the set, .*first: 'p00'"):
        divide(drawn.labels, [f"x{i}" for i in range(10)], drawn.pairing, one_set=True)
