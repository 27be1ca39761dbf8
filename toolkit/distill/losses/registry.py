"""Distillation methods: what a student is trained towards. METHODS is the whole registry; a sum of them is a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.losses.classification import adadistill, kd, margindistillation, own_classifier, proxylesskd
from pkd.toolkit.distill.losses.embedding import cckd, l2kd, rkd
from pkd.toolkit.distill.losses.feature import at, fitnets, fsp
from pkd.toolkit.distill.losses.inputs import Step

Classifier = Literal["frozen", "moving", "trained", "none"]


@dataclass(frozen=True)
class Method:
    """A loss and what it needs."""

    loss: Callable[[Step], Tensor]
    head: Classifier = "none"
    """Whose class centres it reads: the teacher's, frozen; the teacher's, moving; its own, trained; none."""
    teacher: bool = True
    """Whether it reads the teacher at all."""
    labels: bool = False
    """Whether images without identity are idle in it."""
    ties: bool = False
    """Whether it alone puts the student into the teacher's space, so that a query can meet the teacher's gallery."""
    stages: int = 0
    """How many resolutions student and teacher must have in common."""
    beside: float | None = None
    """Its weight beside the student's own classifier, as it was published; None for a loss that stands alone."""


METHODS: dict[str, Method] = {
    "proxylesskd": Method(proxylesskd, head="frozen", labels=True, ties=True),
    "l2kd": Method(l2kd, ties=True),
    "kd": Method(kd, head="frozen", ties=True),
    "adadistill": Method(adadistill, head="moving", labels=True, ties=True),
    "margindistillation": Method(margindistillation, head="frozen", labels=True, ties=True),
    "fitnets": Method(fitnets, stages=1, beside=10.0),
    "at": Method(at, stages=1, beside=10.0),
    "fsp": Method(fsp, stages=2, beside=10.0),
    "rkd": Method(rkd, beside=25.0),
    "cckd": Method(cckd, beside=100.0),
    "none": Method(own_classifier, head="trained", teacher=False, labels=True),
}


@dataclass(frozen=True)
class WeightedSum:
    """Methods with their weights, for example ``proxylesskd+l2kd:0.5``."""

    terms: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, spec: str) -> WeightedSum:
        """``at`` alone means ``none+at:10``: beside the student's own classifier, as such methods were published.

        Raises InputError for unknown methods, weights that are no positive numbers, and terms that exclude each other.
        """
        terms: list[tuple[str, float]] = []
        for term in spec.split("+"):
            name, _, number = term.strip().partition(":")
            if name not in METHODS:
                raise InputError(f"--method {spec!r}: unknown method {name!r}. Choose from {', '.join(METHODS)}.")
            usual = METHODS[name].beside or 1.0
            try:
                weight = float(number) if number else usual
            except ValueError:
                weight = 0.0
            if not 0 < weight < float("inf"):
                raise InputError(f"--method {spec!r}: the weight {number!r} is not a positive number.")
            terms.append((name, weight))
        if len({name for name, _ in terms}) != len(terms):
            raise InputError(f"--method {spec!r}: names a method twice. Add up its weights.")
        if all(METHODS[name].beside is not None for name, _ in terms):
            terms.insert(0, ("none", 1.0))
        classifiers = {METHODS[name].head: name for name, _ in terms if METHODS[name].head != "none"}
        if len(classifiers) > 1:
            raise InputError(
                f"--method {spec!r}: {' and '.join(classifiers.values())} need different classifiers "
                f"({', '.join(classifiers)}). Choose one of them."
            )
        return cls(tuple(terms))

    def __str__(self) -> str:
        return "+".join(name if weight == 1 else f"{name}:{weight:g}" for name, weight in self.terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at the teacher's embeddings, stages or centres."""
        return any(METHODS[name].teacher for name, _ in self.terms)

    @property
    def ties(self) -> bool:
        """Whether the student ends up in the teacher's space; otherwise in one of its own."""
        return any(METHODS[name].ties for name, _ in self.terms)

    @property
    def head(self) -> Classifier:
        """The one classifier that the terms read."""
        return next((METHODS[name].head for name, _ in self.terms if METHODS[name].head != "none"), "none")

    @property
    def needs_labels(self) -> bool:
        """Whether every term needs labels, so that unlabelled images would be idle."""
        return all(METHODS[name].labels for name, _ in self.terms)

    @property
    def stages(self) -> int:
        """How many resolutions student and teacher must have in common."""
        return max(METHODS[name].stages for name, _ in self.terms)

    def loss(self, step: Step) -> Tensor:
        """The weighted sum, a scalar."""
        total = [weight * METHODS[name].loss(step) for name, weight in self.terms]
        return sum(total[1:], total[0])
