"""A LossInputs with everything in it, for tests of losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pkd.toolkit.distill.heads.ema import EmaHead
from pkd.toolkit.distill.heads.frozen_softmax import FrozenHead
from pkd.toolkit.distill.heads.margin import Margin
from pkd.toolkit.distill.losses.feature import adapters
from pkd.toolkit.distill.losses.inputs import LossInputs, StagePair

CHANNELS = [(4, 6), (5, 5), (6, 3)]
SIDES = [8, 4, 2]
CLASSES, DIM = 5, 16


def make_inputs(
    labels: Sequence[int],
    *,
    rows: Sequence[int] | None = None,
    requires_grad: bool = False,
    dtype: torch.dtype = torch.float32,
    margin: str = "arcface:0.5",
    seed: int = 1,
) -> LossInputs:
    """Draw the same batch for the same seed and number of labels; ``rows`` keeps some of its images."""
    random = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    count = len(labels)
    kept = list(range(count)) if rows is None else list(rows)
    centres = normalize(noise(CLASSES, DIM))
    embeddings = noise(count, DIM)[kept].requires_grad_(requires_grad)
    teacher = normalize(noise(count, DIM))[kept]
    pairs = []
    for (student, taught), side in zip(CHANNELS, SIDES, strict=True):
        features = noise(count, student, side, side)[kept].requires_grad_(requires_grad)
        pairs.append(StagePair(features, noise(count, taught, side, side)[kept]))
    torch.manual_seed(seed)
    layers = nn.ModuleDict({name: adapters(name, CHANNELS) for name in ("fitnets", "fsp")}).to(dtype)
    return LossInputs(
        embeddings=embeddings,
        labels=torch.tensor(labels)[kept],
        margin=Margin.parse(margin),
        scale=32.0,
        teacher=teacher,
        head=FrozenHead(centres),
        ema_head=EmaHead(centres),
        trained=normalize(noise(CLASSES, DIM)).requires_grad_(requires_grad),
        temperature=4.0,
        stages=tuple(pairs),
        adapters=layers,
    )
