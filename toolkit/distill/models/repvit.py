"""Build RepViT for crops of 112 pixels: a MobileNet block with its token and channel mixers apart, its branches
fusible.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pkd.toolkit.distill.models.layers import Backbone, Fusible, conv, embedding_top, initialise, relu, scaled

_STAGES = ((48, 2), (96, 8), (192, 2))


class RepViT(Backbone):
    """Build RepViT (Wang et al. 2023, arXiv 2307.09283, §3) without its first stage, with ReLU; the width multiplies
    all.
    """

    def __init__(self, dim: int, width: float = 1.0, size: int = 112) -> None:
        super().__init__()
        channels = scaled(24, width)
        self.stem = nn.Sequential(*conv(3, channels, 3, 2, activation=relu))
        for i, (outputs, depth) in enumerate(_STAGES, start=1):
            out = scaled(outputs, width)
            down = [*conv(channels, channels, 3, 2, groups=channels), *conv(channels, out, 1), _Feed(out)]
            blocks = [nn.Sequential(_Mixer(out, attend=j % 2 == 0), _Feed(out)) for j in range(depth)]
            self.add_module(f"stage{i}", nn.Sequential(*down, *blocks))
            channels = out
        self.stages = ("stem", "stage1", "stage2", "stage3")
        self.top = embedding_top(channels, scaled(512, width), dim, size, relu)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Embed crops, N×3×S×S → N×dim."""
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        out: Tensor = self.top(x)
        return out


class _Mixer(Fusible):
    def __init__(self, channels: int, attend: bool) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.wide_norm = nn.BatchNorm2d(channels)
        self.point = nn.Conv2d(channels, channels, 1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.fused: nn.Module | None = None
        hidden = scaled(channels // 4, 1)
        self.attention = (
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(channels, hidden, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(hidden, channels, 1),
                nn.Sigmoid(),
            )
            if attend
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.wide_norm(self.wide(x)) + self.point(x) + x) if self.fused is None else self.fused(x)
        return y if self.attention is None else y * self.attention(y)

    @torch.no_grad()
    def fuse(self) -> None:
        """Both convolutions, the identity and the normalisations become one 3×3 depthwise convolution, in place."""
        wide, point, norm = fuse_conv_bn_eval(self.wide, self.wide_norm), self.point, self.norm
        assert wide.bias is not None and point.bias is not None
        centre = torch.zeros_like(wide.weight)
        centre[:, :, 1, 1] = point.weight[:, :, 0, 0] + 1
        wide.weight.copy_(wide.weight + centre)
        wide.bias.copy_(wide.bias + point.bias)
        self.fused = fuse_conv_bn_eval(wide, norm)


class _Feed(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv(channels, 2 * channels, 1, activation=relu), *conv(2 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out
