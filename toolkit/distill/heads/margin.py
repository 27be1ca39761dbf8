"""Apply the margin of a softmax loss: a pure function of the cosine between an embedding and its class centre.

Sources: CosFace, Wang et al. 2018 (arXiv 1801.09414, eq. 4); ArcFace, Deng et al. 2019 (arXiv 1801.07698, eq. 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pkd.toolkit.core.errors import InputError

Gradient = Literal["exact", "straight-through"]


@dataclass(frozen=True)
class Margin:
    """Replace a target's cosine c by ψ(c). ``size``: radians for arcface, cosine units for cosface.

    ``gradient``: exact is dψ/dc, which ArcFace makes large near its centre (sin(θ + m) / sin θ); straight-through takes
    it as 1, as code does that computes the margin without autograd. The values are the same.
    """

    kind: Literal["softmax", "cosface", "arcface"]
    size: float = 0.0
    gradient: Gradient = "exact"

    @classmethod
    def parse(cls, spec: str, gradient: Gradient = "exact") -> Margin:
        """Read ``softmax``, ``cosface:0.35`` or ``arcface:0.5``. Raises InputError."""
        kind, _, size = spec.partition(":")
        example = "Use softmax, cosface:0.35 or arcface:0.5."
        try:
            value = float(size) if size else {"softmax": 0.0, "cosface": 0.35, "arcface": 0.5}[kind]
        except (KeyError, ValueError):
            raise InputError(f"--margin {spec!r}: unknown. {example}") from None
        if kind == "softmax":
            if value != 0:
                raise InputError(f"--margin {spec!r}: softmax has no margin. {example}")
            return cls("softmax", 0.0, gradient)
        if kind == "cosface" and 0 <= value <= 1:
            return cls("cosface", value, gradient)
        if kind == "arcface" and 0 <= value < math.pi / 2:
            return cls("arcface", value, gradient)
        raise InputError(f"--margin {spec!r}: cosface takes 0 to 1 (cosine), arcface 0 to {math.pi / 2:.2f} (radians).")

    def __call__(self, cosine: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Compute ψ of each cosine, same shape. Float32 or better. ``sizes``: a margin per cosine in place of one.

        ArcFace is cos(θ + m) while θ + m ≤ π and continues as c − m·sin(π − m), so that it never rises again.
        Within float precision of c = 1, where its slope is infinite, it is a straight line.
        """
        c = cosine.double() if cosine.dtype == torch.float64 else cosine.float()
        m = torch.full_like(c, self.size) if sizes is None else sizes.to(c.dtype)
        if self.gradient == "straight-through":
            return c + (self._psi(c.detach(), m) - c.detach())
        return self._psi(c, m)

    def _psi(self, c: Tensor, m: Tensor) -> Tensor:
        if self.kind == "softmax":
            return c
        if self.kind == "cosface":
            return c - m
        edge = torch.finfo(c.dtype).eps  # sqrt(1 − c²) has an infinite slope at ±1
        inside = c.clamp(-1 + edge, 1 - edge)
        turned = inside * m.cos() - torch.sqrt((1 - inside) * (1 + inside)) * m.sin()
        steepest = m.cos() + m.sin() / math.sqrt(2 * edge)
        turned = torch.where(c > 1 - edge, turned.detach() + steepest * (c - inside.detach()), turned)
        return torch.where(c > -m.cos(), turned, c - m * m.sin())


def margin_cross_entropy(embeddings: Tensor, centres: Tensor, labels: Tensor, margin: Margin, scale: float) -> Tensor:
    """Compute the mean margin softmax loss.

    ``embeddings``: B×D, any length. ``centres``: C×D unit rows; gradients reach them only if they require them.
    ``labels``: int64 B in 0…C−1. ``scale``: factor on the cosines.
    """
    unit = torch.nn.functional.normalize(embeddings.float() if embeddings.dtype != torch.float64 else embeddings)
    cosines = (unit @ centres.T).clamp(-1, 1)
    rows = torch.arange(len(labels), device=labels.device)
    logits = cosines.index_put((rows, labels), margin(cosines[rows, labels]).to(cosines.dtype))
    return torch.nn.functional.cross_entropy(scale * logits, labels)
