"""Register the distillation methods (METHODS) and parse weighted sums of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.extensions import load_object
from pkd.toolkit.distill.losses.asymmetric import csd, d3still, infonce, raml
from pkd.toolkit.distill.losses.classification import adadistill, kd, margindistillation, own_classifier, proxylesskd
from pkd.toolkit.distill.losses.embedding import cckd, l2kd, rkd
from pkd.toolkit.distill.losses.feature import at, fitnets, fsp
from pkd.toolkit.distill.losses.inputs import LossInputs

Classifier = Literal["frozen", "ema", "trained", "none"]


@dataclass(frozen=True)
class Method:
    """Describe a loss and what it needs. A module of anybody's may define one for ``--method MODULE:NAME``."""

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
    bank: int = 0
    """Number of further teacher embeddings, sampled from all images, that it compares with at most."""
    auxiliary: bool = False
    """It cannot stand alone: without another loss it is added to the student's own classifier, as published."""


METHODS: dict[str, Method] = {
    "proxylesskd": Method(proxylesskd, head="frozen", labels=True, aligns=True),
    "l2kd": Method(l2kd, aligns=True),
    "raml": Method(raml, aligns=True),
    "d3still": Method(d3still, aligns=True),
    "csd": Method(csd, aligns=True, bank=65_536, default_weight=10.0),
    "infonce": Method(infonce, aligns=True, bank=8192),
    "kd": Method(kd, head="frozen", aligns=True),
    "adadistill": Method(adadistill, head="ema", labels=True, aligns=True),
    "margindistillation": Method(margindistillation, head="frozen", labels=True, aligns=True),
    "fitnets": Method(fitnets, stages=1, default_weight=10.0, auxiliary=True),
    "at": Method(at, stages=1, default_weight=10.0, auxiliary=True),
    "fsp": Method(fsp, stages=2, default_weight=10.0, auxiliary=True),
    "rkd": Method(rkd, default_weight=25.0, auxiliary=True),
    "cckd": Method(cckd, default_weight=100.0, auxiliary=True),
    "map": Method(l2kd, aligns=True),  # alone, and without a step: training/closed_form.py
    "none": Method(own_classifier, head="trained", teacher=False, labels=True),
}


@dataclass(frozen=True)
class Term:
    """Hold one summand: a method, the name it was asked for by, and its weight."""

    name: str
    weight: float
    method: Method

    @classmethod
    def parse(cls, spec: str, term: str) -> Term:
        """Read ``l2kd``, ``l2kd:0.5``, ``mymodule:loss`` or ``mymodule:loss:0.5`` of the sum ``spec``."""
        name, *rest = term.strip().split(":")
        if name in METHODS:
            method = METHODS[name]
        elif rest and rest[0].isidentifier():
            name = f"{name}:{rest.pop(0)}"
            method = load_method(name)
        else:
            raise InputError(
                f"--method {spec!r}: unknown method {name!r}. Choose from {', '.join(METHODS)}, or name a loss of "
                "your own as MODULE:NAME."
            )
        try:
            weight = float(":".join(rest)) if rest else method.default_weight
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise InputError(f"--method {spec!r}: the weight {':'.join(rest)!r} is not a positive number.")
        return cls(name, weight, method)

    def loss(self, inputs: LossInputs) -> Tensor:
        """Compute the loss without its weight. Raises InputError where a loss of somebody's own is no scalar tensor."""
        value = self.method.loss(inputs)
        if not isinstance(value, Tensor) or value.ndim or (inputs.embeddings.requires_grad and not value.requires_grad):
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"--method {self.name}: returned {found}. A loss is one number with a gradient: a scalar tensor that "
                "depends on inputs.embeddings."
            )
        return value


def load_method(spec: str) -> Method:
    """Import a loss that a user wrote, ``MODULE:NAME``.

    NAME is a ``Method``, or a function of ``LossInputs`` alone, which then reads the teacher and needs nothing else.
    Raises InputError where module or name is missing, or what it names cannot be a loss.
    """
    found = load_object(spec, "--method", ", ".join(METHODS))
    name = spec.partition(":")[2]
    if isinstance(found, Method):
        return found
    if not callable(found):
        raise InputError(f"--method {spec}: is of type {type(found).__name__}, not a function or Method. Name a loss.")
    try:
        inspect.signature(found).bind(None)
    except (TypeError, ValueError):
        raise InputError(
            f"--method {spec}: takes other arguments than one. Define it as def {name}(inputs: LossInputs) -> Tensor."
        ) from None
    return Method(found)


@dataclass(frozen=True)
class WeightedSum:
    """Sum methods with their weights, for example ``proxylesskd+l2kd:0.5``."""

    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, spec: str) -> WeightedSum:
        """Read a sum; ``at`` alone means ``none+at:10``, beside the student's own classifier, as published.

        Raises InputError for unknown methods, weights that are no positive numbers, and terms that exclude each other.
        """
        terms = [Term.parse(spec, term) for term in spec.split("+")]
        if len({term.name for term in terms}) != len(terms):
            raise InputError(f"--method {spec!r}: names a method twice. Add up its weights.")
        if all(term.method.auxiliary for term in terms):
            terms.insert(0, Term("none", 1.0, METHODS["none"]))
        classifiers = {term.method.head: term.name for term in terms if term.method.head != "none"}
        if len(classifiers) > 1:
            raise InputError(
                f"--method {spec!r}: {' and '.join(classifiers.values())} need different classifiers "
                f"({', '.join(classifiers)}). Choose one of them."
            )
        return cls(tuple(terms))

    def __str__(self) -> str:
        return "+".join(term.name if term.weight == 1 else f"{term.name}:{term.weight:g}" for term in self.terms)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the terms."""
        return tuple(term.name for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        """Tell whether any term reads the teacher's embeddings, stages or centres."""
        return any(term.method.teacher for term in self.terms)

    @property
    def aligns(self) -> bool:
        """Tell whether the student is trained into the teacher's space; otherwise it gets its own."""
        return any(term.method.aligns for term in self.terms)

    @property
    def head(self) -> Classifier:
        """Return the one classifier that the terms read."""
        return next((term.method.head for term in self.terms if term.method.head != "none"), "none")

    @property
    def needs_labels(self) -> bool:
        """Tell whether every term needs labels, so that unlabelled images would be ignored."""
        return all(term.method.labels for term in self.terms)

    @property
    def stages(self) -> int:
        """Return the number of resolutions that student and teacher must have in common."""
        return max(term.method.stages for term in self.terms)

    @property
    def bank(self) -> int:
        """Return the number of further teacher embeddings that the terms compare with at most."""
        return max(term.method.bank for term in self.terms)

    def loss(self, inputs: LossInputs) -> Tensor:
        """Compute the weighted sum, a scalar."""
        losses = [term.weight * term.loss(inputs) for term in self.terms]
        return sum(losses[1:], losses[0])

    def not_finite(self, inputs: LossInputs) -> tuple[str, ...]:
        """Name the terms whose loss is not finite."""
        return tuple(term.name for term in self.terms if not bool(term.loss(inputs).isfinite()))
