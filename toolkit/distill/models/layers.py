"""Build blocks of the backbones: the base class, convolutions with batch normalisation, the embedding top."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn

Activation = Callable[[int], nn.Module]
"""Number of channels → an activation."""


class Backbone(nn.Module):
    """Describe a network with named stages. ``stages``: submodules whose outputs are N×C×H×W features, each half the
    last's.
    """

    stages: tuple[str, ...]


class Adoptable(Backbone, ABC):
    """A network whose layers come from a model that existed, so that its file must describe them."""

    trunk: nn.Module
    map: nn.Module

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """Describe the network without its weights, as plain values and tensors."""


class Fusible(nn.Module, ABC):
    """A part that trains with several branches and runs as fewer operators."""

    @abstractmethod
    def fuse(self) -> None:
        """Turn into what runs, in eval mode and in place. The outputs stay the same; training is over."""


def fused(network: nn.Module) -> nn.Module:
    """Return ``network`` as it should run: a copy with every Fusible part fused, or itself where there is none."""
    if not any(isinstance(part, Fusible) for part in network.modules()):
        return network
    made = copy.deepcopy(network)
    for part in list(made.modules()):
        if isinstance(part, Fusible):
            part.fuse()
    return made


def conv(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    *,
    padding: int | None = None,
    groups: int = 1,
    activation: Activation | None = None,
) -> list[nn.Module]:
    """Build a convolution without bias, batch normalisation and, where given, an activation; padded to keep the
    size.
    """
    pad = kernel // 2 if padding is None else padding
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), *([activation(outputs)] if activation else [])]


def embedding_top(channels: int, last: int, dim: int, size: int, activation: Activation) -> nn.Sequential:
    """Map the features of a ``size``×``size`` crop at stride 16 → N×dim, by a global depthwise convolution.

    Unlike a mean it weighs every position of an aligned crop by itself (Chen et al. 2018, arXiv 1804.07573, §3.1).
    """
    return nn.Sequential(
        *conv(channels, last, 1, activation=activation),
        *conv(last, last, reduced(size), padding=0, groups=last),
        nn.Flatten(),
        nn.Linear(last, dim, bias=False),
        nn.BatchNorm1d(dim),
    )


def reduced(size: int) -> int:
    """Compute the side of the feature map after four halvings, each rounded up."""
    return math.ceil(size / 16)


def scaled(channels: int, width: float) -> int:
    """Multiply ``channels`` by ``width``, to the nearest multiple of 8."""
    return max(8, int(channels * width / 8 + 0.5) * 8)


def relu(channels: int) -> nn.Module:
    """Make a ReLU in place, whatever the number of channels."""
    return nn.ReLU(inplace=True)


def initialise(network: nn.Module) -> None:
    """Initialise as He et al. 2015, fan-out, for every convolution and linear layer; biases zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
