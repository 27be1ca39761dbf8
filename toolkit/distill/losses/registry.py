"""Register the distillation methods (METHODS) and parse weighted sums of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.losses.classification import adadistill, kd, margindistillation, own_classifier, proxylesskd
from pkd.toolkit.distill.losses.embedding import cckd, l2kd, rkd
from pkd.toolkit.distill.losses.feature import at, fitnets, fsp
from pkd.toolkit.distill.losses.inputs import LossInputs

Classifier = Literal["frozen", "ema", "trained", "none"]


@dataclass(frozen=True)
class Method:
    """Describe a loss and what it needs."""

    loss: Callable[[LossInputs], Tensor]
    head: Classifier = "none"
    """Class centres that it reads: the teacher's, frozen; an EMA from the teacher's on; the student's own, trained."""
    teacher: bool = True
    """It reads the teacher's embeddings, stages or centres."""
    labels: bool = False
    """It ignores images without identity."""
    aligns: bool = False
    """It alone puts the student into the teacher's space, so that probes can be matched with the teacher's gallery."""
    stages: int = 0
    """Number of resolutions that student and teacher must have in common."""
    default_weight: float = 1.0
    """Weight in a sum where none is given, as published."""
    auxiliary: bool = False
    """It cannot stand alone: without another loss it is added to the student's own classifier, as published."""


METHODS: dict[str, Method] = {
    "proxylesskd": Method(proxylesskd, head="frozen", labels=True, aligns=True),
    "l2kd": Method(l2kd, aligns=True),
    "kd": Method(kd, head="frozen", aligns=True),
    "adadistill": Method(adadistill, head="ema", labels=True, aligns=True),
    "margindistillation": Method(margindistillation, head="frozen", labels=True, aligns=True),
    "fitnets": Method(fitnets, stages=1, default_weight=10.0, auxiliary=True),
    "at": Method(at, stages=1, default_weight=10.0, auxiliary=True),
    "fsp": Method(fsp, stages=2, default_weight=10.0, auxiliary=True),
    "rkd": Method(rkd, default_weight=25.0, auxiliary=True),
    "cckd": Method(cckd, default_weight=100.0, auxiliary=True),
    "none": Method(own_classifier, head="trained", teacher=False, labels=True),
}


@dataclass(frozen=True)
class WeightedSum:
    """Sum methods with their weights, for example ``proxylesskd+l2kd:0.5``."""

    terms: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, spec: str) -> WeightedSum:
        """Read a sum; ``at`` alone means ``none+at:10``, beside the student's own classifier, as published.

        Raises InputError for unknown methods, weights that are no positive numbers, and terms that exclude each other.
        """
        terms: list[tuple[str, float]] = []
        for term in spec.split("+"):
            name, _, number = term.strip().partition(":")
            if name not in METHODS:
                raise InputError(f"--method {spec!r}: unknown method {name!r}. Choose from {', '.join(METHODS)}.")
            usual = METHODS[name].default_weight
            try:
                weight = float(number) if number else usual
            except ValueError:
                weight = 0.0
            if not 0 < weight < float("inf"):
                raise InputError(f"--method {spec!r}: the weight {number!r} is not a positive number.")
            terms.append((name, weight))
        if len({name for name, _ in terms}) != len(terms):
            raise InputError(f"--method {spec!r}: names a method twice. Add up its weights.")
        if all(METHODS[name].auxiliary for name, _ in terms):
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
        """Tell whether any term reads the teacher's embeddings, stages or centres."""
        return any(METHODS[name].teacher for name, _ in self.terms)

    @property
    def aligns(self) -> bool:
        """Tell whether the student is trained into the teacher's space; otherwise it gets its own."""
        return any(METHODS[name].aligns for name, _ in self.terms)

    @property
    def head(self) -> Classifier:
        """Return the one classifier that the terms read."""
        return next((METHODS[name].head for name, _ in self.terms if METHODS[name].head != "none"), "none")

    @property
    def needs_labels(self) -> bool:
        """Tell whether every term needs labels, so that unlabelled images would be ignored."""
        return all(METHODS[name].labels for name, _ in self.terms)

    @property
    def stages(self) -> int:
        """Return the number of resolutions that student and teacher must have in common."""
        return max(METHODS[name].stages for name, _ in self.terms)

    def loss(self, inputs: LossInputs) -> Tensor:
        """Compute the weighted sum, a scalar."""
        total = [weight * METHODS[name].loss(inputs) for name, weight in self.terms]
        return sum(total[1:], total[0])
