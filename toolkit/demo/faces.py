"""Choose the demo's people: three groups without a common identity, drawn or taken from real crops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.synthetic.faces import write_faces

SEED = 2011
DIFFICULTY = 0.6
"""Difficulty that networks this small learn in a minute, and still get wrong now and then."""
TEST_IMAGES, VISITOR_IMAGES = 5, 3
"""Synthetic images of each person who measures the encoders, and of each who comes to the door afterwards."""
LEAST_TEST, LEAST_VISITORS = 48, 4
"""48 people make 1,128 pairs of different people: what an FMR of 1e-2 needs; 142 make 10,011, for 1e-3."""
MOST_TEST, MOST_VISITORS = 300, 40
LEAST_PEOPLE = 80


@dataclass(frozen=True)
class Groups:
    """Name who trains the encoders, who measures them and who is matched over HTTP: folders or list files."""

    train: Path
    test: Path
    visitors: Path


def draw_groups(folder: Path, people: int, images: int, progress: Callable[[int], None]) -> Groups:
    """Draw synthetic people into ``folder/{train,test,visitors}``."""
    groups = Groups(folder / "train", folder / "test", folder / "visitors")
    first = 0
    for group, (count, each) in zip((groups.train, groups.test, groups.visitors), _sizes(people, images), strict=True):
        write_faces(group, SEED, count, each, first=first, difficulty=DIFFICULTY, progress=progress)
        first += count
    return groups


def images_drawn(people: int, images: int) -> int:
    """Count the crops that ``draw_groups`` writes."""
    return sum(count * each for count, each in _sizes(people, images))


def split_groups(folder: Path, source: Path) -> Groups:
    """Split real crops by identity into list files in ``folder``: visitors 1/8 (4 to 40), test 1/4 (48 to 300).

    Both are of people with two or more images. Everyone else trains. Raises InputError with fewer than 80 such people.
    """
    faces = FaceSet.read(source)
    counts = np.bincount(faces.labels[faces.labels >= 0], minlength=len(faces.identities))
    several = np.flatnonzero(counts >= 2)
    if len(several) < LEAST_PEOPLE:
        raise InputError(
            f"{source}: {len(several)} identities have two or more images; the demo trains, measures and tries on "
            f"different people and needs at least {LEAST_PEOPLE}. Give more people."
        )
    several = np.random.default_rng(SEED).permutation(several)
    visitors = set(several[: _within(len(several) // 8, LEAST_VISITORS, MOST_VISITORS)].tolist())
    test = set(several[len(visitors) :][: _within(len(several) // 4, LEAST_TEST, MOST_TEST)].tolist())
    folder.mkdir(parents=True, exist_ok=True)
    groups = Groups(folder / "train.txt", folder / "test.txt", folder / "visitors.txt")
    lines: dict[Path, list[str]] = {groups.train: [], groups.test: [], groups.visitors: []}
    for index, label in enumerate(faces.labels.tolist()):
        group = groups.visitors if label in visitors else groups.test if label in test else groups.train
        lines[group].append(f"{faces.path(index).resolve()}\n")
    for group, content in lines.items():
        group.write_text("".join(content), encoding="utf-8")
    return groups


def _sizes(people: int, images: int) -> tuple[tuple[int, int], ...]:
    """Return people and images of each, by group."""
    test, visitors = _within(people // 2, LEAST_TEST, MOST_TEST), _within(people // 8, LEAST_VISITORS, MOST_VISITORS)
    return (people, images), (test, TEST_IMAGES), (visitors, VISITOR_IMAGES)


def _within(count: int, least: int, most: int) -> int:
    return min(max(count, least), most)
