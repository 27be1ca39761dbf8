"""Distillation methods: what a student's embedding is trained towards. METHODS is the whole registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from pkd.toolkit.distill.margin import Margin, margin_cross_entropy
from pkd.toolkit.errors import InputError


@dataclass(frozen=True)
class Step:
    """What a loss sees of one batch.

    ``embeddings``: student output B×D, not normalised. ``labels``: int64 B, −1 where unknown. ``teacher``: B×D unit
    rows of the teacher for the same (mirrored) images. ``centres``: C×D unit rows, frozen or trainable.
    """

    embeddings: Tensor
    labels: Tensor
    teacher: Tensor | None
    centres: Tensor | None
    margin: Margin
    scale: float


@dataclass(frozen=True)
class Method:
    """A loss and what it needs. ``head``: frozen (the teacher's), trained (its own) or none."""

    loss: Callable[[Step], Tensor]
    teacher: bool
    head: str


def classify(step: Step) -> Tensor:
    """Margin softmax against the step's centres, over the images with a label.

    With the teacher's frozen centres this is ProxylessKD (Shi et al. 2020, arXiv 2011.00265, §3.3).
    """
    assert step.centres is not None
    known = step.labels >= 0
    if not bool(known.any()):
        return step.embeddings.sum() * 0.0
    return margin_cross_entropy(step.embeddings[known], step.centres, step.labels[known], step.margin, step.scale)


def l2kd(step: Step) -> Tensor:
    """Mean squared distance ‖x̂ − t̂‖² of unit embeddings: plain regression onto the teacher. Needs no label."""
    assert step.teacher is not None
    return (normalize(step.embeddings.float()) - step.teacher).square().sum(dim=1).mean()


METHODS: dict[str, Method] = {
    "proxylesskd": Method(classify, teacher=True, head="frozen"),
    "l2kd": Method(l2kd, teacher=True, head="none"),
    "none": Method(classify, teacher=False, head="trained"),
}


@dataclass(frozen=True)
class WeightedSum:
    """Methods with their weights, for example ``proxylesskd+l2kd:0.5``."""

    terms: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, spec: str) -> WeightedSum:
        """Raises InputError for unknown methods, weights that are no positive numbers, and sums with ``none``."""
        terms: list[tuple[str, float]] = []
        for term in spec.split("+"):
            name, _, number = term.strip().partition(":")
            if name not in METHODS:
                raise InputError(f"--method {spec!r}: unknown method {name!r}. Choose from {', '.join(METHODS)}.")
            try:
                weight = float(number) if number else 1.0
            except ValueError:
                weight = 0.0
            if not 0 < weight < float("inf"):
                raise InputError(f"--method {spec!r}: the weight {number!r} is not a positive number.")
            terms.append((name, weight))
        if len({METHODS[name].head for name, _ in terms} - {"none"}) > 1:
            raise InputError(f"--method {spec!r}: none trains its own classifier and cannot join a frozen one.")
        if len({name for name, _ in terms}) != len(terms):
            raise InputError(f"--method {spec!r}: names a method twice. Add up its weights.")
        return cls(tuple(terms))

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at the teacher's embeddings or centres."""
        return any(METHODS[name].teacher for name, _ in self.terms)

    @property
    def head(self) -> str:
        """``frozen``, ``trained`` or ``none``."""
        return next((METHODS[name].head for name, _ in self.terms if METHODS[name].head != "none"), "none")

    @property
    def needs_labels(self) -> bool:
        """Whether every term needs labels, so that unlabelled images would be idle."""
        return all(METHODS[name].head != "none" for name, _ in self.terms)

    def loss(self, step: Step) -> Tensor:
        """The weighted sum, a scalar."""
        total = [weight * METHODS[name].loss(step) for name, weight in self.terms]
        return sum(total[1:], total[0])
