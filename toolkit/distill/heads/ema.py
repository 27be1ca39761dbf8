"""Keep class centres drawn towards the teacher's embeddings as the student learns (AdaDistill)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pkd.toolkit.distill.heads.frozen_softmax import FrozenHead


class EmaHead:
    """Keep class centres as adaptive exponential moving averages (Boutros et al. 2024, arXiv 2407.01332, §3.2).

    A centre is stored as a unit row (C×D float32) and its length, because the average runs over vectors that are not
    normalised again. It starts from the given centres, so that classes not yet seen are sensible negatives.
    """

    def __init__(self, centres: Tensor) -> None:
        self.units = centres.detach().to(torch.promote_types(centres.dtype, torch.float32), copy=True)
        self.lengths = self.units.new_ones(len(centres))
        self.head = FrozenHead(self.units)

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
        """Move the centres of ``labels`` (int64 B): w ← α·w + (1 − α)·t̂.

        ``student``, ``teacher``: B×D unit rows. α = cos(x̂, t̂)·cos(w, t̂), both cut at 0: what the student cannot
        follow yet, or what is far from its centre, is taught as itself; the rest as its class. A label that occurs
        twice in the batch takes the mean of its updates, whatever their order.
        """
        classes, where = torch.unique(labels, return_inverse=True)
        centres = self.units[labels]
        toward = (centres * teacher).sum(dim=1).clamp(1e-6, 1)
        alpha = ((student * teacher).sum(dim=1).clamp(-1, 1) * toward).clamp(1e-6, 1)[:, None]
        moved = alpha * centres * self.lengths[labels, None] + (1 - alpha) * teacher
        counts = torch.bincount(where, minlength=len(classes))[:, None]
        means = moved.new_zeros(len(classes), moved.shape[1]).index_add_(0, where, moved) / counts
        lengths = means.norm(dim=1).clamp_min(1e-12)
        self.units[classes] = means / lengths[:, None]
        self.lengths[classes] = lengths

    def state(self) -> dict[str, Any]:
        """Return the centres for a checkpoint."""
        return {"units": self.units, "lengths": self.lengths}

    def restore(self, state: dict[str, Any]) -> None:
        """Load what ``state`` returned."""
        self.units.copy_(state["units"])
        self.lengths.copy_(state["lengths"])
