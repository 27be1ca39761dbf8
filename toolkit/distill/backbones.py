"""Networks: float32 N×3×S×S, already preprocessed (S is 112 for faces) → N×D embeddings, not normalised."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pkd.toolkit.errors import InputError

Activation = Callable[[int], nn.Module]


class Backbone(nn.Module):
    """A network with named stages. ``stages``: submodules whose outputs are N×C×H×W features, each half the last's."""

    stages: tuple[str, ...]


class MobileFaceNet(Backbone):
    """MobileFaceNet (Chen et al. 2018, arXiv 1804.07573, table 1); the width multiplies every layer but the last."""

    def __init__(self, dim: int, width: float = 1.0, activation: Activation = nn.PReLU, size: int = 112) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(8, int(channels * width / 8 + 0.5) * 8)

        a, b, last = scaled(64), scaled(128), scaled(512)
        stages = [(a, 2, 5, 2), (b, 4, 1, 2), (b, 2, 6, 1), (b, 4, 1, 2), (b, 2, 2, 1)]
        self.stem = nn.Sequential(
            *_conv(3, a, 3, 2, activation=activation), *_conv(a, a, 3, 1, groups=a, activation=activation)
        )
        blocks: list[nn.Module] = []
        ends = ["stem"]
        channels = a
        for out, expansion, repeats, stride in stages:
            if stride == 2 and blocks:
                ends.append(f"blocks.{len(blocks) - 1}")
            for i in range(repeats):
                blocks.append(_Bottleneck(channels, out, expansion, stride if i == 0 else 1, activation))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.stages = (*ends, f"blocks.{len(blocks) - 1}")
        self.top = nn.Sequential(
            *_conv(channels, last, 1, 1, activation=activation),
            *_conv(last, last, _reduced(size), 1, padding=0, groups=last),
            nn.Flatten(),
            nn.Linear(last, dim, bias=False),
            nn.BatchNorm1d(dim),
        )
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """N×3×S×S → N×dim."""
        out: Tensor = self.top(self.blocks(self.stem(x)))
        return out


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, activation: Activation) -> None:
        super().__init__()
        middle = expansion * inputs
        self.body = nn.Sequential(
            *_conv(inputs, middle, 1, 1, activation=activation),
            *_conv(middle, middle, 3, stride, groups=middle, activation=activation),
            *_conv(middle, outputs, 1, 1),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.shortcut else out


class IResNet(Backbone):
    """The ResNet of arcface_torch, with its parameter names, so that its checkpoints load (Deng et al. 2019, §3.1)."""

    stages = ("layer1", "layer2", "layer3", "layer4")

    def __init__(self, dim: int, depths: tuple[int, int, int, int], size: int = 112) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64, eps=1e-5)
        self.prelu = nn.PReLU(64)
        channels = 64
        for i, (outputs, depth) in enumerate(zip((64, 128, 256, 512), depths, strict=True), start=1):
            layers = [_IBasicBlock(channels if j == 0 else outputs, outputs, 2 if j == 0 else 1) for j in range(depth)]
            self.add_module(f"layer{i}", nn.Sequential(*layers))
            channels = outputs
        self.bn2 = nn.BatchNorm2d(512, eps=1e-5)
        self.fc = nn.Linear(512 * _reduced(size) ** 2, dim)
        self.features = nn.BatchNorm1d(dim, eps=1e-5)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """N×3×S×S → N×dim."""
        x = self.prelu(self.bn1(self.conv1(x)))
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        out: Tensor = self.features(self.fc(torch.flatten(self.bn2(x), 1)))
        return out


class _IBasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs, eps=1e-5)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, eps=1e-5)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs, eps=1e-5)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs, eps=1e-5)
            )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return out + (x if self.downsample is None else self.downsample(x))


def _conv(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int,
    *,
    padding: int | None = None,
    groups: int = 1,
    activation: Activation | None = None,
) -> list[nn.Module]:
    pad = kernel // 2 if padding is None else padding
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), *([activation(outputs)] if activation else [])]


def _reduced(size: int) -> int:
    """Side of the feature map after four halvings, each rounded up."""
    return math.ceil(size / 16)


def _relu(channels: int) -> nn.Module:
    return nn.ReLU(inplace=True)


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


BACKBONES: dict[str, Callable[[int, float, int], Backbone]] = {
    "mobilefacenet": lambda dim, width, size: MobileFaceNet(dim, width, size=size),
    "mobilefacenet-relu": lambda dim, width, size: MobileFaceNet(dim, width, _relu, size),
    "iresnet18": lambda dim, width, size: IResNet(dim, (2, 2, 2, 2), size),
    "iresnet34": lambda dim, width, size: IResNet(dim, (3, 4, 6, 3), size),
    "iresnet50": lambda dim, width, size: IResNet(dim, (3, 4, 14, 3), size),
    "iresnet100": lambda dim, width, size: IResNet(dim, (3, 13, 30, 3), size),
}


def build(spec: str, dim: int, size: int = 112) -> Backbone:
    """``mobilefacenet:0.5`` → the network for ``size``×``size`` crops with ``dim`` outputs.

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
    if width != 1.0 and not name.startswith("mobilefacenet"):
        raise InputError(f"--student {spec!r}: {name} has no width multiplier. Leave the number out.")
    return name, width


def parameters(network: nn.Module) -> int:
    """Number of trained numbers."""
    return sum(p.numel() for p in network.parameters())
