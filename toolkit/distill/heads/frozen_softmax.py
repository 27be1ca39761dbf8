"""Compute softmax losses over a frozen head in one pass: exact loss and gradient without ever holding B×C.

The head is constant, so a training step needs no gradient for it, no optimiser state and no stored logits. Class rows
come in chunks; a running maximum, sum and weighted centre per sample are all that stays (Milakov and Gimelshein 2018,
arXiv 1805.02867, "online normalizer"; the weighted centre is attention whose keys and values are both the head).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from pkd.toolkit.core.errors import BadHead, InputError


class FrozenHead:
    """Hold frozen class centres and answer what losses ask of them.

    ``centres``: C×D unit rows, float32 or bfloat16, in memory or memory-mapped. ``ShardedHead`` keeps a part per
    process and answers the same.
    """

    def __init__(self, centres: Tensor, *, chunk: int | None = None) -> None:
        if centres.ndim != 2 or not len(centres) or centres.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            shape = tuple(centres.shape)
            raise BadHead(f"centres of shape {shape} and {centres.dtype}: a frozen head is C×D, float32 or bfloat16.")
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk {chunk}: must be 1 or more class rows.")
        self.centres = centres
        self.chunk = chunk

    @property
    def classes(self) -> int:
        """Count the classes of all processes together."""
        return len(self.centres)

    def rows(self, indices: Tensor) -> Tensor:
        """Return the centres of int64 class indices, K → K×D, float32 (float64 for a float64 head). No gradient."""
        rows = self.centres.detach()[indices]
        return rows if rows.dtype == torch.float64 else rows.float()

    def logsumexp(self, unit: Tensor, scale: float, *, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute ``streaming_logsumexp`` over these centres."""
        wide = unit if unit.dtype == torch.float64 else unit.float()
        result: tuple[Tensor, Tensor] = _LogSumExp.apply(wide, self, scale, exclude)  # type: ignore[no-untyped-call]
        return result

    def reduce(self, unit: Tensor, scale: float, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute log Σ exp and the softmax-weighted centre, without autograd."""
        return finish(*stream(unit, self.centres, scale, exclude, self.chunk))


def streaming_logsumexp(
    unit: Tensor, centres: Tensor | FrozenHead, scale: float, *, exclude: Tensor | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute log Σ_j exp(scale · unit_i · centre_j) over the classes, and the centre that these weights point to.

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
    """Compute the margin softmax loss log(1 + exp(a − s·ψ)) with a = log Σ_{j≠y} exp(s·c_j) over a frozen head.

    ``embeddings``: B×D, any length. ``centres``: C×D unit rows or a FrozenHead. ``labels``: int64 B in 0…C−1. ``psi``:
    B target cosines → B replaced cosines, a ``Margin`` or any differentiable function. ``exclude``: int64 B×2, ranges
    left out of a in place of the own class alone; each should hold its label. Target terms are float32 whatever the
    head's dtype. Returns a scalar, or B losses with ``reduction="none"``. Raises InputError for labels outside.
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
    """Pass once over the class rows.

    Returns per sample the largest logit in bits (B), Σ 2^(logit − largest) (B), and the sum of the centres with the
    same weights (B×D). Logits are scale · cosine / ln 2, since exp2 costs a third of exp.

    ``exclude`` counts from the first of these rows and may reach beyond them.
    """
    batch, classes = len(unit), len(centres)
    exact = torch.bfloat16 if centres.dtype == torch.bfloat16 and fast_bf16(unit) else unit.dtype
    size = min(classes, chunk or chunk_rows(batch, unit.device, exact))
    queries = (unit * (scale / math.log(2))).to(exact)
    top = unit.new_full((batch, 1), torch.finfo(unit.dtype).min)
    total = unit.new_zeros((batch, 1))
    weighted = torch.zeros_like(unit)
    buffers = _Buffers(unit, exact, size)
    excluded = _Excluded(exclude, classes, size)
    least = torch.finfo(exact).eps / 2 / math.ceil(classes / size)
    for index, start in enumerate(range(0, classes, size)):
        rows = buffers.rows(centres[start : start + size])
        weights, product = buffers.logits(len(rows))
        torch.mm(queries, rows.T, out=product)
        if weights is not product:
            weights.copy_(product)
        excluded.mask(weights, index, start)
        new = torch.maximum(top, weights.amax(dim=1, keepdim=True))
        fade = (top - new).exp2_()
        sums = weights.sub_(new).exp2_().sum(dim=1, keepdim=True)
        total.mul_(fade).add_(sums)
        weighted.mul_(fade)
        top = new
        heavy = _heavy(sums, total * least)
        if heavy is not None:  # what is left out adds up to less than half a unit in the last place of the weights
            weighted.index_add_(0, heavy, (weights[heavy].to(exact) @ rows).to(unit.dtype))
        elif weights is product:
            weighted.addmm_(weights, rows)
        else:
            weighted.add_(product.copy_(weights) @ rows)
    return top[:, 0], total[:, 0], weighted


def finish(top: Tensor, total: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the result of ``stream`` into log Σ exp and the weighted mean of the centres."""
    return (top + total.log2()) * math.log(2), weighted / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None]


def chunk_rows(batch: int, device: torch.device, product: torch.dtype = torch.float32) -> int:
    """Choose the class rows of a chunk.

    On a CPU the logits stay in the cache between the two products and every thread has enough work; on a GPU they fill
    64 MiB.
    """
    if device.type == "cpu":
        return max(256, min(4096 // product.itemsize * torch.get_num_threads(), 2**22 // max(batch, 1)))
    return max(1024, 2**24 // max(batch, 1))


class _Buffers:
    """Hold the memory of one chunk, used again for every chunk."""

    def __init__(self, unit: Tensor, product: torch.dtype, size: int) -> None:
        self._logits = unit.new_empty(len(unit) * size)
        self._product = self._logits if product == unit.dtype else torch.empty_like(self._logits, dtype=product)
        self._rows = torch.empty(0, dtype=product, device=unit.device)
        self._shape = (size, unit.shape[1])
        self._batch = len(unit)

    def rows(self, centres: Tensor) -> Tensor:
        """Return the chunk's centres in the dtype and on the device of the products; copy only if they differ."""
        if centres.dtype == self._rows.dtype and centres.device == self._rows.device:
            return centres
        if not len(self._rows):
            self._rows = self._rows.new_empty(self._shape)
        return self._rows[: len(centres)].copy_(centres)

    def logits(self, count: int) -> tuple[Tensor, Tensor]:
        """Return B×count twice: in the dtype of sums and in that of products; one tensor where these are the same."""
        wide = self._logits[: self._batch * count].view(self._batch, count)
        if self._product is self._logits:
            return wide, wide
        return wide, self._product[: self._batch * count].view(self._batch, count)


class _Excluded:
    """Group by chunk the (sample, class) pairs that a sum leaves out."""

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
    """Differentiate by d/dunit log Σ exp(s·unit·w_j) = s · (softmax-weighted centre), known from the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, unit: Tensor, head: FrozenHead, scale: float, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        result, centre = head.reduce(unit.detach(), scale, exclude)
        ctx.save_for_backward(centre, unit)
        ctx.mark_non_differentiable(centre)
        ctx.scale = scale
        return result, centre

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        centre, unit = ctx.saved_tensors
        slope: Tensor = centre * (ctx.scale * grad.detach())[:, None]
        if torch.is_grad_enabled():  # create_graph=True
            slope = _NotDifferentiable.apply(slope, unit, grad)  # type: ignore[no-untyped-call]
        return slope, None, None, None


class _NotDifferentiable(torch.autograd.Function):
    """Pass a first derivative on, and refuse to differentiate it: as a constant it would give wrong second ones."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, unit: Tensor, grad: Tensor) -> Tensor:
        return slope.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise NotImplementedError(
            "the frozen head has no second derivative: its pass keeps no logits. Leave create_graph=True out, or use "
            "margin_cross_entropy, which holds them all."
        )


def _heavy(sums: Tensor, least: Tensor) -> Tensor | None:
    """Find samples whose weights in this chunk survive rounding; None where nearly all do, and on a GPU."""
    if sums.device.type != "cpu":
        return None
    heavy = (sums > least)[:, 0]
    count = int(heavy.count_nonzero())
    return heavy.nonzero()[:, 0] if 4 * count <= 3 * len(heavy) else None


def fast_bf16(unit: Tensor) -> bool:
    """Tell whether products of bfloat16 matrices are worth it: instructions for them, not an emulation."""
    if unit.dtype == torch.float64:
        return False
    if unit.device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not public; a torch without it converts chunks
    return unit.device.type == "cpu" and asked is not None and bool(asked())


def _as_head(centres: Tensor | FrozenHead, chunk: int | None) -> FrozenHead:
    return centres if isinstance(centres, FrozenHead) else FrozenHead(centres, chunk=chunk)


def _check_labels(labels: Tensor, classes: int) -> None:
    if not len(labels):
        raise InputError("a batch without labels has no classification loss. Leave the term out of this step.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise InputError(f"label {wrong}: the head has classes 0 to {classes - 1:,}. Leave unlabelled images out.")
