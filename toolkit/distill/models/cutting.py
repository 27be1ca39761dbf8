"""Find where an adopted network can be cut, to freeze its first layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from pkd.toolkit.distill.models.adopted import AdoptedNetwork
from pkd.toolkit.distill.models.onnx_graph import OnnxModule

NEARLY = 0.05
"""Share of the arithmetic that is given away where features are smaller earlier in the network."""


@dataclass(frozen=True)
class Cut:
    """Name a layer after which a network can be cut. ``step``: of the trunk; ``tensor``: of its graph; ``share`` of all
    multiplications that are done by then; ``shape``: C, H, W of what it gives.
    """

    step: str
    tensor: str
    share: float
    shape: tuple[int, ...]


def choose_cut(network: AdoptedNetwork, share: float) -> Cut | None:
    """Find the layer up to which about ``share`` of the network's multiplications are done, at most that many.

    Returns None where the network cannot be cut so early.
    """
    trunk = network.trunk
    tensors = trunk.cuts()
    done, total = 0.0, sum(_multiplications(trunk, name) for name in trunk.step_names)
    found: list[Cut] = []
    for name in trunk.step_names:
        done += _multiplications(trunk, name)
        shape = trunk.shapes[name]
        if name in tensors and shape is not None and len(shape) == 4 and 0 < done <= share * total:
            found.append(Cut(name, tensors[name], done / total, tuple(shape[1:])))
    if not found:
        return None
    near = [cut for cut in found if cut.share >= found[-1].share - NEARLY]
    return min(reversed(near), key=lambda cut: int(np.prod(cut.shape)))


def _multiplications(trunk: OnnxModule, name: str) -> float:
    """Count the multiplications of one step for one image."""
    shape, module = trunk.shapes[name], getattr(trunk, name)
    area = 1 if shape is None or len(shape) < 4 else int(np.prod(shape[2:]))
    layers = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    return float(sum(layer.weight.numel() for layer in layers) * area)
