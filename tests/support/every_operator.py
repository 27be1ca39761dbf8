"""A small network with every operator of students' graphs, for runtimes that take seconds to build a real one."""

from __future__ import annotations

import onnx
import torch
from torch import Tensor, nn

from pkd.export.graph.build import torch_network
from tests.support.bundle_factory import DIM


class EveryOperator(nn.Module):
    """float32 N×3×112×112 → N×DIM."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.slopes = nn.PReLU(8)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.excite = nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(8 * 14 * 14, DIM)

    def forward(self, x: Tensor) -> Tensor:
        """PReLU; a normalisation before a padded convolution, which cannot be folded; a gate; a shortcut."""
        x = self.slopes(self.stem(x))
        y = torch.relu(self.depthwise(self.norm(x)))
        y = y * torch.sigmoid(self.excite(nn.functional.adaptive_avg_pool2d(y, 1)))
        return self.last(torch.flatten(x + y, 1))


def every_operator() -> onnx.ModelProto:
    """Make the network in ONNX, its weights drawn, its slopes and statistics away from their start."""
    torch.manual_seed(0)
    module = EveryOperator()
    module.slopes.weight.data = torch.rand(8) / 2
    module.norm.running_mean = torch.randn(8) / 4
    module.norm.running_var = torch.rand(8) + 0.5
    return torch_network(module.eval(), 112)
