"""Galleries, subjects and vectors for tests of stores, and what is asked of them again and again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from pkd.serving.galleries.store import Enrolled, Enrolment, GalleryStore, NewTemplate, Space, Template
from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.errors import PkdError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import unit_rows
from pkd.toolkit.encoders.space_map import SpaceMap, fit_space_map

DIM = 16
OLD, NEW = Space("old@sha256:1", DIM), Space("new@sha256:2", DIM)
ENCODER, STUDENT, NEXT = "teacher@sha256:a", "student@sha256:b", "next@sha256:c"
ALICE, BOB = "key of alice", "key of bob"
"""Actors."""
Floats = NDArray[np.float32]
Open = Callable[[], GalleryStore]


def unit(seed: int, count: int = 1, dim: int = DIM) -> Floats:
    """Rows count×dim, of unit length but for float16, in which they are exact: so are their scores."""
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float16).astype(np.float32)


def one(subject: str, vector: Floats, *, encoder: str = ENCODER, space: Space = OLD, **more: object) -> Enrolment:
    """Make an enrolment of one template."""
    return Enrolment(subject, [NewTemplate(encoder, space.id, vector)], **more)  # type: ignore[arg-type]


def plain_search(templates: Sequence[tuple[str, Floats]], query: Floats, top_k: int) -> list[tuple[str, float]]:
    """Search by the reference: a loop in float64 over (subject, vector)."""
    best: dict[str, float] = {}
    for subject, vector in templates:
        exact = vector.astype(np.float64)
        score = float(np.dot(exact / np.linalg.norm(exact), query.astype(np.float64)))
        best[subject] = max(best.get(subject, -2.0), score)
    return sorted(best.items(), key=lambda item: (-item[1], item[0]))[:top_k]


@contextlib.contextmanager
def refused(error: type[PkdError]) -> Iterator[pytest.ExceptionInfo[PkdError]]:
    """Make an error of this class, whose text says something."""
    with pytest.raises(error) as caught:
        yield caught
    assert len(str(caught.value)) > 10


def enrolled(answers: Sequence[Enrolled | PkdError]) -> list[Enrolled]:
    """All of them, none refused."""
    for answer in answers:
        assert isinstance(answer, Enrolled), answer
    return [answer for answer in answers if isinstance(answer, Enrolled)]


def soon(check: Callable[[], bool], seconds: float = 1.0) -> bool:
    """Whether ``check`` becomes true within the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.01)
    return check()


def id_of(template: Template) -> bytes:
    """Return what a template holds, as ``unit`` made it."""
    return np.asarray(template.vector, np.float32).tobytes()


def space_map() -> SpaceMap:
    """Fit a map from the vectors of ENCODER to the space NEW, of some teacher there."""
    random = np.random.default_rng(0)
    old = describe("old", "teacher", "a", Preprocess(), DIM)
    new = describe("next", "teacher", "b", Preprocess(), DIM)
    x = unit(1, 200)
    y = unit_rows((x @ random.normal(size=(DIM, DIM)) + 0.5 * random.normal(size=x.shape)).astype(np.float32))
    made = fit_space_map(old, new, x, y, np.full(200, -1), data="faces", data_digest="d")
    spaces = [info.space.model_copy(update={"id": space.id}) for info, space in ((old, OLD), (new, NEW))]
    named = old.model_copy(update={"id": ENCODER, "space": spaces[0]}), new.model_copy(update={"space": spaces[1]})
    return replace(made, old=named[0], new=named[1])
