"""The distinct sets of attributes in a gallery, numbered, so that a filter is one look-up per row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

NO_SET = 0
"""Number that rows without a template have. No filter allows it."""


class AttributeSets:
    """Number the sets that templates share; a set that no template has any more is forgotten, its number reused."""

    def __init__(self) -> None:
        self._numbers: dict[frozenset[tuple[str, str]], int] = {}
        self._sets: list[frozenset[tuple[str, str]]] = [frozenset()]
        self._templates: list[int] = [0]
        self._free: list[int] = []
        self._having: dict[tuple[str, str], set[int]] = {}

    def __len__(self) -> int:
        """How many sets are in use."""
        return len(self._numbers)

    def hold(self, attributes: Mapping[str, str], templates: int) -> int:
        """Return the number of this set, which so many more templates have from now on."""
        items = frozenset(attributes.items())
        number = self._numbers.get(items)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._sets[number] = items
            else:
                number = len(self._sets)
                self._sets.append(items)
                self._templates.append(0)
            self._numbers[items] = number
            for item in items:
                self._having.setdefault(item, set()).add(number)
        self._templates[number] += templates
        return number

    def release(self, numbers: NDArray[np.int32]) -> None:
        """Take back the sets of templates that are gone, one number for each."""
        for number, count in enumerate(np.bincount(numbers).tolist()):
            if not count:
                continue
            self._templates[number] -= count
            if not self._templates[number]:
                items = self._sets[number]
                del self._numbers[items]
                for item in items:
                    self._having[item].discard(number)
                    if not self._having[item]:
                        del self._having[item]
                self._free.append(number)

    def allowed(self, where: Mapping[str, str]) -> NDArray[np.bool_]:
        """Tell of each set, by its number, whether it has all of ``where``."""
        having = sorted((self._having.get(item, set()) for item in where.items()), key=len)
        matching = set.intersection(*having) if having else set(self._numbers.values())
        mask = np.zeros(len(self._sets), np.bool_)
        mask[np.fromiter(matching, np.int64, len(matching))] = True
        return mask
