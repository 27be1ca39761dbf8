"""Compute in float32 what a student's INT8 graph will, with gradients (fake quantisation).

Values are rounded to the steps that QuantizeLinear and DequantizeLinear leave of them; in the backward pass rounding
counts as the identity and what was clipped gets no gradient (Bengio et al. 2013, arXiv 1308.3432; Jacob et al. 2018,
arXiv 1712.05877, §3).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import conv2d, linear
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.overrides import TorchFunctionMode

from pkd.toolkit.distill.models.layers import Backbone, fused

Ranges = Mapping[str, tuple[float, float]]
"""Name of an activation → the lowest and highest value that INT8 tells apart."""
LINEAR = (conv2d, linear)
SUMS = (Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add)


@dataclass(frozen=True)
class Grid:
    """Describe the integers that activations are rounded to."""

    lowest: int
    highest: int
    steps: int
    """Between the ends of a range."""
    symmetric: bool
    """Zero is the integer 0, and the range is widened to be as long on either side of it."""


UNSIGNED = Grid(0, 255, 255, symmetric=False)
SIGNED = Grid(-128, 127, 254, symmetric=True)


def scale_of(low: float, high: float, grid: Grid) -> tuple[float, int]:
    """Return a range's step width and the integer of zero, as onnxruntime's quantiser takes them; zero is inside."""
    low, high = min(low, 0.0), max(high, 0.0)
    if grid.symmetric:
        high = max(-low, high)
        low = -high
    scale = (high - low) / grid.steps
    if scale < torch.finfo(torch.float32).tiny:
        return 1.0, 0
    return float(torch.tensor(scale)), 0 if grid.symmetric else round(grid.lowest - low / scale)


def fake_quantise(values: Tensor, low: float, high: float, grid: Grid) -> Tensor:
    """Round float32 values of any shape to ``grid`` over the range ``low`` to ``high`` and clip them to it."""
    scale, zero = scale_of(low, high, grid)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, grid.lowest, grid.highest)


def fake_quantise_weight(weight: Tensor) -> Tensor:
    """Round a weight, float32 outputs×…, to symmetric INT8: 127 steps on either side, a scale per output."""
    largest = weight.detach().abs().amax(dim=tuple(range(1, weight.ndim)))
    scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -127, 127)


def folded(student: nn.Module) -> nn.Module:
    """Copy ``student`` as it is exported, trainable: branches fused, batch normalisation folded into the layer before.

    Normalisation that has no linear layer before it stays (IResNet).
    """
    made = fused(copy.deepcopy(student).eval())
    graph = fx.symbolic_trace(made).graph
    parts = dict(made.named_modules())
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        operator, norm = parts[str(before.target)], parts[str(node.target)]
        if isinstance(operator, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            joined: nn.Module = fuse_conv_bn_eval(operator, norm)
        elif isinstance(operator, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
            joined = fuse_linear_bn_eval(operator, norm)
        else:
            continue
        made.set_submodule(str(before.target), joined)
        made.set_submodule(str(node.target), nn.Identity())
    return made.requires_grad_(True)


class Int8Student(Backbone):
    """Run a folded student with INT8 weights and activations, once it has ``ranges``.

    It rounds what QDQQuantizer rounds in the graph: weights, and whatever enters or leaves a convolution, a linear
    layer or a sum. It stays in eval mode: running statistics and dropout belong to an earlier training.
    """

    def __init__(self, student: nn.Module, grid: Grid) -> None:
        super().__init__()
        self.plain = student
        self.stages = tuple(f"plain.{name}" for name in getattr(student, "stages", ()))
        self.grid = grid
        self.ranges: Ranges = {}

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels N×3×S×S to embeddings N×dim."""
        rounding = _Rounding(self.ranges, self.grid)
        x = rounding.made(x, ())
        with rounding:
            out: Tensor = self.plain(x)
        return out

    def activations(self, x: Tensor) -> dict[str, Tensor]:
        """Return by name, in float32, the activations of N×3×S×S that get a range."""
        watching = _Watching()
        watching.made(x, ())
        with torch.no_grad(), watching:
            self.plain(x)
        return {name: values for name, values in watching.values.items() if name in watching.rounded}

    def train(self, mode: bool = True) -> Int8Student:
        """Stay in eval mode."""
        super().train(False)
        return self


class _Calls(TorchFunctionMode, ABC):
    """Number every call that makes a tensor, alike in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self._number = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LINEAR:
            x, weight, *rest = args
            return self.made(func(x, self.weight(weight), *rest, **(kwargs or {})), (x,), linear=True)
        if func in SUMS and isinstance(args[1], Tensor):
            return self.made(args[0] + args[1], args[:2], linear=True)
        out = func(*args, **(kwargs or {}))
        return self.made(out, ()) if isinstance(out, Tensor) else out

    def made(self, values: Tensor, read: Sequence[Tensor], *, linear: bool = False) -> Tensor:
        """Return what replaces ``values``, made from ``read`` by a ``linear`` operator or by any other."""
        name = str(self._number)
        self._number += 1
        return self.replaced(name, values, read, linear)

    @abstractmethod
    def replaced(self, name: str, values: Tensor, read: Sequence[Tensor], linear: bool) -> Tensor:
        """Return what replaces ``values``, the result of call ``name``."""

    @abstractmethod
    def weight(self, weight: Tensor) -> Tensor:
        """Return what replaces a weight."""


class _Watching(_Calls):
    """Keep what is made, and note what a linear operator reads or makes."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self.rounded: set[str] = set()
        self._maker: dict[int, tuple[str, Tensor]] = {}
        """Call name and tensor by ``id``; the tensor is kept so that no other gets its id."""

    def replaced(self, name: str, values: Tensor, read: Sequence[Tensor], linear: bool) -> Tensor:
        self._maker[id(values)] = name, values
        self.values[name] = values.detach().clone()  # what follows may work in place
        self.rounded |= {self._maker[id(tensor)][0] for tensor in read} | ({name} if linear else set())
        return values

    def weight(self, weight: Tensor) -> Tensor:
        return weight


class _Rounding(_Calls):
    """Round weights and every value that has a range."""

    def __init__(self, ranges: Ranges, grid: Grid) -> None:
        super().__init__()
        self._ranges = ranges
        self._grid = grid

    def replaced(self, name: str, values: Tensor, read: Sequence[Tensor], linear: bool) -> Tensor:
        return fake_quantise(values, *self._ranges[name], self._grid) if name in self._ranges else values

    def weight(self, weight: Tensor) -> Tensor:
        return fake_quantise_weight(weight)
