"""Define the inputs of a loss: everything that is known of one batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from pkd.toolkit.distill.heads.ema import EmaHead
from pkd.toolkit.distill.heads.frozen_softmax import FrozenHead
from pkd.toolkit.distill.heads.margin import Margin


@dataclass(frozen=True)
class StagePair:
    """Hold the features of one stage at the same resolution: student N×C×H×W, teacher N×C′×H×W, both float32."""

    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class Bank:
    """Hold further images' embeddings by the teacher: a sample of the cached ones, the same in every step."""

    rows: Tensor
    """Unit rows R×D."""
    images: Tensor
    """int64 R, number of the image among all."""
    people: Tensor
    """int64 R, number of the identity; −1 where unknown."""


@dataclass(frozen=True)
class LossInputs:
    """Hold one batch for a loss. Fields that no chosen method needs are None or empty."""

    embeddings: Tensor
    """Student output B×D, float32, not normalised."""
    labels: Tensor
    """int64 B, rows of the head; −1 where unknown."""
    margin: Margin
    scale: float
    """Factor on the cosines."""
    teacher: Tensor | None = None
    """The teacher's unit embeddings for the same (mirrored) images, B×D."""
    head: FrozenHead | None = None
    """The teacher's classifier, frozen."""
    ema_head: EmaHead | None = None
    """Centres that move from the teacher's classifier towards its embeddings (adadistill)."""
    trained: Tensor | None = None
    """The student's own centres, C×D unit rows with gradient (none)."""
    exclude: Tensor | None = None
    """int64 B×2 or None: range of head rows left out of each sample's denominator, its own row included."""
    images: Tensor | None = None
    """int64 B, number of each image among all."""
    people: Tensor | None = None
    """int64 B, number of each image's identity; −1 where unknown."""
    bank: Bank | None = None
    """Further embeddings of the teacher, where a method asks for them (csd, infonce)."""
    temperature: float = 4.0
    """Softens kd's logits."""
    stages: tuple[StagePair, ...] = ()
    """Stage features, fine resolution first."""
    adapters: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    """Trained layers between student and teacher stages, by method; dropped after training."""
