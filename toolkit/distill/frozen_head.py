"""Softmax over a frozen head in one pass over its rows: the exact loss and gradient without ever holding B×C.

The head is constant, so a training step needs no gradient for it, no optimiser state and no stored logits. Class rows
come in chunks; a running maximum, sum and weighted centre per sample are all that stays (Milakov and Gimelshein 2018,
arXiv 1805.02867, "online normalizer"; the weighted centre is attention whose keys and values are both the head).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, normalize

from pkd.toolkit.errors import BadHead, InputError

CHUNK_BYTES = 2 * 2**20
"""Logits held at a time: small enough to stay in the cache between the two products of a chunk."""


class FrozenHead:
    """Class centres that a loss may ask about, wherever their rows are kept.

    ``centres``: C×D unit rows, float32 or bfloat16, in memory or memory-mapped. ``ShardedHead`` keeps a part per rank
    and answers the same questions.
    """

    def __init__(self, centres: Tensor, *, chunk: int | None = None) -> None:
        if centres.ndim != 2 or not len(centres) or centres.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise BadHead(
                f"centres of shape {tuple(centres.shape)} and {centres.dtype}: a frozen head is C×D, float32 or bfloat16."
            )
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk {chunk}: must be 1 or more class rows.")
        self.centres = centres
        self.chunk = chunk

    @property
    def classes(self) -> int:
        """C, over all ranks."""
        return len(self.centres)

    def rows(self, indices: Tensor) -> Tensor:
        """Centres of int64 class indices, K → K×D, float32 (float64 for a float64 head). No gradient."""
        rows = self.centres.detach()[indices]
        return rows if rows.dtype == torch.float64 else rows.float()

    def logsumexp(self, unit: Tensor, scale: float, *, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``streaming_logsumexp`` of these centres."""
        result: tuple[Tensor, Tensor] = _LogSumExp.apply(unit, self, scale, exclude)
        return result

    def reduce(self, unit: Tensor, scale: float, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        """log Σ exp and the softmax-weighted centre, without autograd."""
        top, total, weighted = stream(unit, self.centres, scale, exclude, self.chunk)
        return top + total.log(), weighted / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None]


def streaming_logsumexp(
    unit: Tensor, centres: Tensor | FrozenHead, scale: float, *, exclude: Tensor | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """log Σ_j exp(scale · unit_i · centre_j) over the classes, and the centre that these weights point to.

    ``unit``: B×D float32 (or float64) unit rows. ``centres``: C×D unit rows, float32 or bfloat16, or a FrozenHead.
    ``exclude``: int64 B×2, half-open range of class rows left out of each sample's sum. ``chunk``: class rows at a
    time, by default from the batch. Returns B sums, differentiable with respect to ``unit`` (−inf where no class is
    left), and B×D weighted centres without gradient (0 where no class is left).
    """
    return _as_head(centres, chunk).logsumexp(unit, scale, exclude=exclude)


def frozen_cross_entropy(
    embeddings: Tensor,
    centres: Tensor | FrozenHead,
    labels: Tensor,
    psi: Callable[[Tensor], Tensor],
    scale: float,
    *,
    reduction: Literal["mean", "none"] = "mean",
    exclude: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Margin softmax loss log(1 + exp(a − s·ψ)) with a = log Σ_{j≠y} exp(s·c_j) over a frozen head.

    ``embeddings``: B×D, any length. ``centres``: C×D unit rows or a FrozenHead. ``labels``: int64 B in 0…C−1. ``psi``:
    B target cosines → B replaced cosines, a ``Margin`` or any differentiable function. ``exclude``: int64 B×2, ranges
    left out of a in place of the own class alone; each should hold its label. Target terms are float32 whatever the
    head's dtype. Returns a scalar, or B losses with ``reduction="none"``. Raises InputError for labels outside the head.
    """
    head = _as_head(centres, chunk)
    _check_labels(labels, head.classes)
    unit = normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float())
    target = (unit * head.rows(labels).to(unit.dtype)).sum(dim=1).clamp(-1, 1)
    own = torch.stack([labels, labels + 1], dim=1) if exclude is None else exclude
    others, _ = head.logsumexp(unit, scale, exclude=own)
    losses = -logsigmoid(scale * psi(target).to(unit.dtype) - others)
    return losses.mean() if reduction == "mean" else losses


def stream(
    unit: Tensor, centres: Tensor, scale: float, exclude: Tensor | None, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the class rows: per sample the largest logit (B), Σ exp(logit − largest) (B), and the sum of the
    centres with the same weights (B×D). ``exclude`` counts from the first of these rows and may reach beyond them.
    """
    batch, dim = unit.shape
    size = min(len(centres), chunk or max(256, CHUNK_BYTES // (4 * max(batch, 1))))
    queries = unit * scale
    top = unit.new_full((batch, 1), torch.finfo(unit.dtype).min)
    total = unit.new_zeros((batch, 1))
    weighted = unit.new_zeros((batch, dim))
    logits = unit.new_empty((batch, size))
    holes = _Holes(exclude, len(centres), size)
    for index, start in enumerate(range(0, len(centres), size)):
        rows = centres[start : start + size].to(unit.dtype)
        part = logits[:, : len(rows)]
        torch.mm(queries, rows.T, out=part)
        holes.mask(part, index, start)
        new = torch.maximum(top, part.amax(dim=1, keepdim=True))
        fade = (top - new).exp_()
        part.sub_(new).exp_()
        total.mul_(fade).add_(part.sum(dim=1, keepdim=True))
        weighted.mul_(fade).addmm_(part, rows)
        top = new
    return top[:, 0], total[:, 0], weighted


class _Holes:
    """The (sample, class) pairs that a sum leaves out, grouped by chunk."""

    def __init__(self, exclude: Tensor | None, classes: int, size: int) -> None:
        self._bounds: list[int] | None = None
        if exclude is None:
            return
        ranges = exclude.clamp(0, classes)
        lengths = (ranges[:, 1] - ranges[:, 0]).clamp_min(0)
        samples = torch.repeat_interleave(torch.arange(len(ranges), device=ranges.device), lengths)
        offsets = torch.arange(len(samples), device=ranges.device) - (lengths.cumsum(0) - lengths)[samples]
        columns, order = (ranges[samples, 0] + offsets).sort()
        self._samples, self._columns = samples[order], columns
        edges = torch.arange(0, classes + size, size, device=ranges.device)
        self._bounds = torch.searchsorted(columns, edges).tolist()

    def mask(self, logits: Tensor, index: int, start: int) -> None:
        """Set what chunk ``index``, whose first class is ``start``, leaves out to −inf."""
        if self._bounds is None or self._bounds[index] == self._bounds[index + 1]:
            return
        here = slice(self._bounds[index], self._bounds[index + 1])
        logits[self._samples[here], self._columns[here] - start] = -torch.inf


class _LogSumExp(torch.autograd.Function):
    """d/dunit log Σ exp(s·unit·w_j) = s · (softmax-weighted centre), which the forward pass has already."""

    @staticmethod
    def forward(
        ctx: Any, unit: Tensor, head: FrozenHead, scale: float, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        result, centre = head.reduce(unit.detach(), scale, exclude)
        ctx.save_for_backward(centre)
        ctx.mark_non_differentiable(centre)
        ctx.scale = scale
        return result, centre

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (centre,) = ctx.saved_tensors
        return centre * (ctx.scale * grad)[:, None], None, None, None


def _as_head(centres: Tensor | FrozenHead, chunk: int | None) -> FrozenHead:
    return centres if isinstance(centres, FrozenHead) else FrozenHead(centres, chunk=chunk)


def _check_labels(labels: Tensor, classes: int) -> None:
    if not len(labels):
        raise InputError("a batch without labels has no classification loss. Leave the term out of this step.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise InputError(f"label {wrong}: the head has classes 0 to {classes - 1:,}. Leave unlabelled images out.")
