"""IResNet: the ResNet of arcface_torch, with its parameter names, so that its checkpoints load."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pkd.toolkit.distill.models.layers import Backbone, initialise, reduced


class IResNet(Backbone):
    """Build a residual network with batch normalisation before the first convolution of a block (Deng et al. 2019,
    §3.1).
    """

    stages = ("layer1", "layer2", "layer3", "layer4")

    def __init__(self, dim: int, depths: tuple[int, int, int, int], size: int = 112) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        channels = 64
        for i, (outputs, depth) in enumerate(zip((64, 128, 256, 512), depths, strict=True), start=1):
            layers = [_Block(channels if j == 0 else outputs, outputs, 2 if j == 0 else 1) for j in range(depth)]
            self.add_module(f"layer{i}", nn.Sequential(*layers))
            channels = outputs
        self.bn2 = nn.BatchNorm2d(512)
        self.fc = nn.Linear(512 * reduced(size) ** 2, dim)
        self.features = nn.BatchNorm1d(dim)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Embed crops, N×3×S×S → N×dim."""
        x = self.prelu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        out: Tensor = self.features(self.fc(torch.flatten(self.bn2(x), 1)))
        return out


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return out + (x if self.downsample is None else self.downsample(x))
