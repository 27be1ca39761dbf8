"""A small network with every operator of students' graphs, for runtimes that take seconds to build a real one."""

from __future__ import annotations

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from pkd.export.graph.build import torch_network
from tests.support.bundle_factory import DIM, network


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


def other_layers(dim: int, *, padded_pools: bool) -> nn.Module:
    """Stack what the network above has not: paddings, groups, multipliers, dilation, poolings and clips."""
    torch.manual_seed(0)
    pools = (nn.MaxPool2d(3, 2, padding=1), nn.AvgPool2d(3, 2, padding=1, count_include_pad=False))
    most, mean = pools if padded_pools else (nn.MaxPool2d(2), nn.AvgPool2d(3, 2))
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.ReLU6(),
        nn.Conv2d(6, 12, 3, padding=(2, 0), groups=6),
        nn.Hardtanh(-0.5, 0.5),
        nn.Conv2d(12, 8, 3, stride=3, groups=2),
        nn.Tanh(),
        most,
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False),
        nn.Hardswish(),
        mean,
        nn.BatchNorm2d(8),
        nn.PReLU(),
        nn.Flatten(),
        nn.Linear(200 if padded_pools else 128, dim),
    ).eval()


def unknown_operator(kind: str) -> onnx.ModelProto:
    """End the small network in an operator, called bell, which a format does not translate."""
    made = network()
    made.graph.node[-1].output[0] = "row"
    made.graph.node.append(helper.make_node(kind, ["row"], ["embedding_out"], name="bell"))
    made.graph.output[0].name = "embedding_out"
    return made
