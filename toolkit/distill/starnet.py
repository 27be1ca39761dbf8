"""StarNet for crops of 112 pixels: two linear maps of the same features, multiplied."""

from __future__ import annotations

from torch import Tensor, nn

from pkd.toolkit.distill.layers import Backbone, conv, embedding_top, initialise, relu, scaled

_STAGES = ((48, 2), (96, 8), (192, 3))


class StarNet(Backbone):
    """StarNet-S1 (Ma et al. 2024, arXiv 2403.19967, table 14) without its first stage; the width multiplies all."""

    def __init__(self, dim: int, width: float = 1.0, size: int = 112) -> None:
        super().__init__()
        channels = scaled(32, width)
        self.stem = nn.Sequential(*conv(3, channels, 3, 2, activation=_relu6))
        for i, (outputs, depth) in enumerate(_STAGES, start=1):
            out = scaled(outputs, width)
            self.add_module(f"stage{i}", nn.Sequential(*conv(channels, out, 3, 2), *(_Star(out) for _ in range(depth))))
            channels = out
        self.stages = ("stem", "stage1", "stage2", "stage3")
        self.top = embedding_top(channels, scaled(512, width), dim, size, relu)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """N×3×S×S → N×dim."""
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        out: Tensor = self.top(x)
        return out


class _Star(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.before = nn.Sequential(*conv(channels, channels, 7, groups=channels))
        self.left = nn.Sequential(*conv(channels, wide, 1, activation=_relu6))
        self.right = nn.Sequential(*conv(channels, wide, 1))
        self.after = nn.Sequential(*conv(wide, channels, 1), *conv(channels, channels, 7, groups=channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        out: Tensor = x + self.after(self.left(y) * self.right(y))
        return out


def _relu6(channels: int) -> nn.Module:
    return nn.ReLU6(inplace=True)
