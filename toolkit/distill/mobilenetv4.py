"""MobileNetV4-Conv-Small for crops of 112 pixels: plain convolutions first, universal inverted bottlenecks after."""

from __future__ import annotations

from torch import Tensor, nn

from pkd.toolkit.distill.layers import Backbone, conv, embedding_top, initialise, relu, scaled

_BLOCKS = (
    ((96, 3, 5, 5, 2), (96, 2, 0, 3, 1), (96, 2, 0, 3, 1), (96, 2, 0, 3, 1), (96, 2, 0, 3, 1), (96, 4, 3, 0, 1)),
    ((128, 6, 3, 3, 2), (128, 4, 5, 5, 1), (128, 4, 0, 5, 1), (128, 3, 0, 5, 1), (128, 4, 0, 3, 1), (128, 4, 0, 3, 1)),
)
"""At strides 8 and 16: outputs, expansion, kernel of the first and of the middle depthwise convolution, stride."""


class MobileNetV4(Backbone):
    """MobileNetV4-Conv-Small (Qin et al. 2024, arXiv 2404.10518, table 11) without its stage at stride 4 of 32.

    A crop of 112 pixels is a quarter of the paper's input, so one halving fewer leaves the same 7×7 at the end. The
    width multiplies every layer.
    """

    def __init__(self, dim: int, width: float = 1.0, size: int = 112) -> None:
        super().__init__()
        stem, fused, channels = scaled(32, width), scaled(96, width), scaled(64, width)
        self.stem = nn.Sequential(*conv(3, stem, 3, 2, activation=relu))
        self.stage1 = nn.Sequential(
            *conv(stem, fused, 3, 2, activation=relu), *conv(fused, channels, 1, activation=relu)
        )
        for i, blocks in enumerate(_BLOCKS, start=2):
            made: list[nn.Module] = []
            for outputs, expansion, first, middle, stride in blocks:
                out = scaled(outputs, width)
                made.append(_Universal(channels, out, expansion, first, middle, stride))
                channels = out
            self.add_module(f"stage{i}", nn.Sequential(*made))
        self.stages = ("stem", "stage1", "stage2", "stage3")
        self.top = embedding_top(channels, scaled(512, width), dim, size, relu)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """N×3×S×S → N×dim."""
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        out: Tensor = self.top(x)
        return out


class _Universal(nn.Module):
    """Universal inverted bottleneck (§3): 1×1 up, 1×1 down, a depthwise convolution before, between or both."""

    def __init__(self, inputs: int, outputs: int, expansion: int, first: int, middle: int, stride: int) -> None:
        super().__init__()
        wide = scaled(inputs * expansion, 1)
        self.body = nn.Sequential(
            *(conv(inputs, inputs, first, 1 if middle else stride, groups=inputs) if first else ()),
            *conv(inputs, wide, 1, activation=relu),
            *(conv(wide, wide, middle, stride, groups=wide, activation=relu) if middle else ()),
            *conv(wide, outputs, 1),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.shortcut else out
