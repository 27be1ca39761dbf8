"""Build MobileFaceNet: inverted bottlenecks and a global depthwise convolution, with PReLU (the paper's) or ReLU."""

from __future__ import annotations

from torch import Tensor, nn

from pkd.toolkit.distill.models.layers import Activation, Backbone, conv, embedding_top, initialise, scaled

_STAGES = ((64, 2, 5, 2), (128, 4, 1, 2), (128, 2, 6, 1), (128, 4, 1, 2), (128, 2, 2, 1))
"""Outputs, expansion, repeats, stride of the first."""


class MobileFaceNet(Backbone):
    """Build MobileFaceNet (Chen et al. 2018, arXiv 1804.07573, table 1); the width multiplies every layer but the last.

    PReLU's backward pass is a third of a training step on a CPU, and runtimes fuse ReLU into the convolution before it.
    """

    def __init__(self, dim: int, width: float = 1.0, activation: Activation = nn.PReLU, size: int = 112) -> None:
        super().__init__()
        channels = scaled(64, width)
        self.stem = nn.Sequential(
            *conv(3, channels, 3, 2, activation=activation),
            *conv(channels, channels, 3, groups=channels, activation=activation),
        )
        blocks: list[nn.Module] = []
        ends = ["stem"]
        for outputs, expansion, repeats, stride in _STAGES:
            if stride == 2 and blocks:
                ends.append(f"blocks.{len(blocks) - 1}")
            for i in range(repeats):
                out = scaled(outputs, width)
                blocks.append(_Bottleneck(channels, out, expansion, stride if i == 0 else 1, activation))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.stages = (*ends, f"blocks.{len(blocks) - 1}")
        self.top = embedding_top(channels, scaled(512, width), dim, size, activation)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Embed crops, N×3×S×S → N×dim."""
        out: Tensor = self.top(self.blocks(self.stem(x)))
        return out


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, activation: Activation) -> None:
        super().__init__()
        middle = expansion * inputs
        self.body = nn.Sequential(
            *conv(inputs, middle, 1, activation=activation),
            *conv(middle, middle, 3, stride, groups=middle, activation=activation),
            *conv(middle, outputs, 1),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.shortcut else out
