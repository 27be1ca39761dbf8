"""Classes that are one person: found among all pairs or by lists, merged without chains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pkd.toolkit.distill.heads import duplicates
from pkd.toolkit.distill.heads.duplicates import merge, neighbours, report_duplicates
from tests.support.head_data import unit


def planted(classes: int, dim: int, pairs: int, cosine: float, seed: int = 0) -> torch.Tensor:
    """Random directions; the last ``pairs`` of them at ``cosine`` to the first."""
    random = np.random.default_rng(seed)
    rows = unit(random.normal(size=(classes, dim)))
    aside = random.normal(size=(pairs, dim))
    aside = unit(aside - np.sum(aside * rows[:pairs], axis=1, keepdims=True) * rows[:pairs])  # type: ignore[assignment]
    rows[classes - pairs :] = cosine * rows[:pairs] + np.sqrt(1 - cosine**2) * aside
    return torch.from_numpy(rows)


def test_every_near_pair_against_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", 37)
    rows = planted(200, 12, 30, 0.9)
    found = neighbours(rows, 0.6)
    cosines = (rows @ rows.T).numpy()
    expected = {(i, j) for i in range(200) for j in range(i + 1, 200) if cosines[i, j] >= 0.6}
    near = found.above(0.6)
    assert set(zip(near.first.tolist(), near.second.tolist(), strict=True)) == expected and len(expected) > 30
    np.testing.assert_allclose(found.cosine, cosines[found.first, found.second], atol=1e-6)
    assert np.all(np.diff(found.cosine) <= 0)


def test_the_nearest_ten_are_there_even_if_none_is_near() -> None:
    rows = planted(300, 64, 0, 0.0)
    cosines = torch.triu(rows @ rows.T, diagonal=1).numpy().ravel()
    np.testing.assert_allclose(neighbours(rows, 0.9).cosine[:10], np.sort(cosines)[::-1][:10], atol=1e-6)


def test_lists_find_what_all_pairs_find() -> None:
    rows = planted(6000, 256, 300, 0.75)
    truth, found = neighbours(rows, 0.7).above(0.7), neighbours(rows, 0.7, exact=0).above(0.7)
    whole = set(zip(truth.first.tolist(), truth.second.tolist(), strict=True))
    part = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert len(whole) == 300 and part <= whole and len(part) >= 0.93 * len(whole)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_classes_and_identical_ones(count: int) -> None:
    rows = torch.ones(count, 4) / 2
    for exact in (0, 100):
        assert len(neighbours(rows, exact=exact).first) == count * (count - 1) // 2


def names(count: int) -> tuple[str, ...]:
    return tuple(f"p{i}" for i in range(count))


def test_a_chain_is_not_one_person() -> None:
    angles = np.deg2rad([0, 38, 80, 200])  # cosine 0.79, 0.74, and 0.17 between the ends of the chain
    rows = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    done = merge(rows, neighbours(rows, 0.7), names(4), np.array([1, 2, 3, 4]), 0.7)
    assert [(m.identity, m.others, m.images) for m in done.merged] == [("p1", ("p0",), 3)]
    assert done.classes.tolist() == [0, 0, 1, 2] and done.identities == ("p1", "p2", "p3")
    report = report_duplicates(neighbours(rows, 0.7), names(4), np.array([1, 2, 3, 4]), 0.7, done)
    assert (report.pairs, report.left_apart) == (2, 1)
    assert report_duplicates(neighbours(rows, 0.7), names(4), np.ones(4, np.int64), 0.7, None).left_apart is None


def test_groups_keep_the_distance_they_promise() -> None:
    random = np.random.default_rng(0)
    rows = torch.from_numpy(
        unit(np.repeat(random.normal(size=(60, 8)), 4, axis=0) + random.normal(size=(240, 8)) * 0.35)
    )
    done = merge(rows, neighbours(rows, 0.7), names(240), random.integers(1, 9, 240), 0.7)
    cosines = (rows @ rows.T).numpy()
    assert len(done.merged) > 20
    for new in range(len(done.identities)):
        members = np.flatnonzero(done.classes == new)
        assert cosines[np.ix_(members, members)].min() >= 0.7 - 1e-6
    for m in done.merged:
        members = [int(n[1:]) for n in (m.identity, *m.others)]  # type: ignore[assignment]
        assert m.least_cosine == pytest.approx(cosines[np.ix_(members, members)].min(), abs=1e-6)
    assert sum(len(m.others) for m in done.merged) == 240 - len(done.identities)
    for low, high in zip(*np.nonzero(np.triu(cosines, 1) >= 0.7), strict=True):  # what stays apart has a reason
        if done.classes[low] != done.classes[high]:
            a, b = (np.flatnonzero(done.classes == done.classes[c]) for c in (low, high))
            assert cosines[np.ix_(a, b)].min() < 0.7


def test_nothing_to_merge_changes_nothing() -> None:
    rows = torch.eye(5)
    done = merge(rows, neighbours(rows), names(5), np.ones(5, np.int64), 0.7)
    assert not done.merged and done.identities == names(5) and done.classes.tolist() == [0, 1, 2, 3, 4]
