"""Heads of any size on any number of ranks; groups of any geometry; sums over any labelling."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.toolkit.distill.heads.duplicates import merge, neighbours
from pkd.toolkit.distill.heads.head import class_means, image_centres, merge_classes, read_head
from tests.support.head_data import unit, write_shards


@settings(max_examples=30)
@given(
    classes=st.integers(1, 60),
    dim=st.integers(2, 20),
    world=st.integers(1, 16),
    layout=st.sampled_from(["rank", "softmax_fc", "checkpoint"]),
)
def test_shards_come_back_whole(classes: int, dim: int, world: int, layout: str) -> None:
    world = min(world, classes)  # a rank without classes leaves a file without rows; no training has that
    weight = unit(np.random.default_rng(classes).normal(size=(classes, dim)))
    with tempfile.TemporaryDirectory() as folder:
        paths = write_shards(Path(folder), weight, world, layout)
        head = read_head(
            [str(p) for p in sorted(paths, key=lambda p: p.name[::-1])], tuple(map(str, range(classes))), dim
        )
    np.testing.assert_allclose(head.centres, weight, atol=1e-6)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), classes=st.integers(1, 40), dim=st.integers(1, 6), threshold=st.floats(0.05, 0.99))
def test_merged_classes_are_near_each_other_and_nothing_is_lost(
    seed: int, classes: int, dim: int, threshold: float
) -> None:
    random = np.random.default_rng(seed)
    rows = torch.from_numpy(unit(random.normal(size=(classes, dim)) + 1e-3))
    names = tuple(f"n{i}" for i in range(classes))
    counts = random.integers(1, 50, classes)
    done = merge(rows, neighbours(rows, threshold), names, counts, threshold)
    assert len(done.classes) == classes and set(done.classes) == set(range(len(done.identities)))
    assert len(set(done.identities)) == len(done.identities) and set(done.identities) <= set(names)
    cosines = (rows @ rows.T).numpy()
    for new, name in enumerate(done.identities):
        members = np.flatnonzero(done.classes == new)
        assert cosines[np.ix_(members, members)].min() >= threshold - 1e-5
        assert counts[names.index(name)] == counts[members].max() and names.index(name) in members


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), images=st.integers(2, 60), classes=st.integers(1, 12))
def test_means_do_not_depend_on_order_and_merging_is_relabelling(seed: int, images: int, classes: int) -> None:
    random = np.random.default_rng(seed)
    plain, mirrored = (unit(random.normal(size=(images, 8))) for _ in range(2))
    labels = np.append(np.arange(classes), random.integers(-1, classes, images))[:images]
    names = tuple(map(str, range(classes)))[: labels.max() + 1]
    head = class_means(plain, mirrored, labels, names)
    order = random.permutation(images)
    again = class_means(plain[order], mirrored[order], labels[order], names)
    np.testing.assert_allclose(head.centres, again.centres, atol=1e-5)
    per_image, rows = image_centres(plain, mirrored, labels, names)
    exclude = per_image.exclude
    assert exclude is not None and np.all((exclude[rows][:, 0] <= rows) & (rows < exclude[rows][:, 1]))
    same = merge_classes(head, np.arange(len(names)), names)
    np.testing.assert_allclose(same.centres, head.centres, atol=1e-6)
