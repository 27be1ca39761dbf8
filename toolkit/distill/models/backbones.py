"""Networks: float32 N×3×S×S, already preprocessed (S is 112 for faces) → N×D embeddings, not normalised."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.models.iresnet import IResNet
from pkd.toolkit.distill.models.layers import Backbone, relu
from pkd.toolkit.distill.models.mobilefacenet import MobileFaceNet
from pkd.toolkit.distill.models.repvit import RepViT

BACKBONES: dict[str, Callable[[int, float, int], Backbone]] = {
    "mobilefacenet": lambda dim, width, size: MobileFaceNet(dim, width, size=size),
    "mobilefacenet-relu": lambda dim, width, size: MobileFaceNet(dim, width, relu, size),
    "repvit": lambda dim, width, size: RepViT(dim, width, size),
    "iresnet18": lambda dim, width, size: IResNet(dim, (2, 2, 2, 2), size),
    "iresnet34": lambda dim, width, size: IResNet(dim, (3, 4, 6, 3), size),
    "iresnet50": lambda dim, width, size: IResNet(dim, (3, 4, 14, 3), size),
    "iresnet100": lambda dim, width, size: IResNet(dim, (3, 13, 30, 3), size),
    "iresnet200": lambda dim, width, size: IResNet(dim, (6, 26, 60, 6), size),
}


def build(spec: str, dim: int, size: int = 112) -> Backbone:
    """Build ``mobilefacenet:0.5``, for example: the network for ``size``×``size`` crops with ``dim`` outputs.

    The part after the colon is the width multiplier. Raises InputError for unknown names and widths.
    """
    name, width = parse(spec)
    return BACKBONES[name](dim, width, size)


def parse(spec: str) -> tuple[str, float]:
    """Name and width multiplier of a backbone. Raises InputError."""
    name, _, number = spec.partition(":")
    if name not in BACKBONES:
        raise InputError(f"--student {spec!r}: unknown backbone. Choose one of {', '.join(BACKBONES)}.")
    try:
        width = float(number) if number else 1.0
    except ValueError:
        width = 0.0
    if not 0.05 <= width <= 4:
        raise InputError(f"--student {spec!r}: the width multiplier must be a number between 0.05 and 4.")
    if width != 1.0 and name.startswith("iresnet"):
        raise InputError(f"--student {spec!r}: {name} has no width multiplier. Leave the number out.")
    return name, width


def parameters(network: nn.Module) -> int:
    """Count the trained numbers."""
    return sum(p.numel() for p in network.parameters())
