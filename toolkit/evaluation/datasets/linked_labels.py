"""Groups of images, or of templates, that must show one person: joined where a list declares two of them the same."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def linked(count: int, first: Ints, second: Ints) -> Ints:
    """Connected components of ``count`` items under the links ``first[i]``–``second[i]`` → int64 label each, from 0.

    Union-find with path halving (Tarjan and van Leeuwen 1984); labels ascend with the first item of each group.
    """
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return np.unique(np.array([root(item) for item in range(count)], np.int64), return_inverse=True)[1].astype(np.int64)
