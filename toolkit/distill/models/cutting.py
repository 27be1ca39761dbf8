"""Cut an adopted network: to freeze its first layers, or to keep only them under a small new head."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.models.adopted import Adopted, AdoptedNetwork, Features
from pkd.toolkit.distill.models.onnx_graph import OnnxModule

Floats = NDArray[np.float32]
NEARLY = 0.05
"""Share of the arithmetic that is given away where features are smaller earlier in the network."""
HEAD = 1
"""Version of the new head of a shortened network."""


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


def shorten(student: Adopted, share: float, seed: int = 0) -> Adopted:
    """Keep the layers that do the first ``share`` of the arithmetic, and put a small new head behind them.

    The head: a 3×3 depthwise convolution at stride 2, a pointwise one to twice the channels, both with PReLU, and a
    depthwise one over what area is left, as at the end of MobileFaceNet (Chen et al. 2018, arXiv 1804.07573). Its
    weights are drawn from ``seed`` and must be trained. Raises InputError where the network cannot be cut there.
    """
    cut = choose_cut(student.network(student.weight.shape[1]), share)
    if cut is None:
        raise InputError(f"--shorten {share:g}: the student has no layer up to which so little is done. Keep more.")
    channels, height, width = cut.shape
    if min(height, width) < 3:
        raise InputError(f"--shorten {share:g}: only {height}×{width} positions are left there. Keep less.")
    trunk = student.up_to(cut.tensor)
    random = np.random.default_rng((seed, HEAD))
    rest = ((height + 1) // 2, (width + 1) // 2)
    _append(
        trunk, "Conv", _drawn(random, channels, 1, 3, 3), cut.tensor, group=channels, strides=[2, 2], pads=[1, 1, 1, 1]
    )
    _append(trunk, "PRelu", np.full((channels, 1, 1), 0.25, np.float32))
    _append(trunk, "Conv", _drawn(random, 2 * channels, channels, 1, 1))
    _append(trunk, "PRelu", np.full((2 * channels, 1, 1), 0.25, np.float32))
    _append(trunk, "Conv", _drawn(random, 2 * channels, 1, *rest), group=2 * channels)
    del trunk.graph.output[:]
    end = trunk.graph.node[-1].output[0]
    shape = [1, 2 * channels, 1, 1]
    trunk.graph.output.append(helper.make_tensor_value_info(end, TensorProto.FLOAT, shape))
    trunk.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1  # as adopted graphs have it: all sizes known
    digest = hashlib.sha256(f"{student.info.id} {cut.tensor} head {HEAD} {seed}".encode()).hexdigest()
    info = describe(
        f"{student.info.name}-{cut.share * 100:.0f}", "teacher", digest, student.info.preprocess, 2 * channels
    )
    made = replace(
        student, info=info, trunk=trunk, width=2 * channels, weight=np.eye(2 * channels), bias=np.zeros(2 * channels)
    )
    features = describe(f"{info.name}-features", "teacher", digest, info.preprocess, 2 * channels)
    return replace(made, features=Features(features, made.up_to(end)))


def _append(model: onnx.ModelProto, kind: str, weight: Floats, before: str = "", **options: Any) -> None:
    """Add a node that reads the tensor ``before``, by default the last node's, and ``weight``."""
    name = f"head{len(model.graph.node)}"
    before = before or model.graph.node[-1].output[0]
    model.graph.initializer.append(numpy_helper.from_array(weight, f"{name}/weight"))
    model.graph.node.append(helper.make_node(kind, [before, f"{name}/weight"], [name], name=name, **options))


def _drawn(random: np.random.Generator, *shape: int) -> Floats:
    """Draw weights that keep the variance of what follows a rectifier (He et al. 2015)."""
    drawn: Floats = (random.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
    return drawn


def _multiplications(trunk: OnnxModule, name: str) -> float:
    """Count the multiplications of one step for one image."""
    shape, module = trunk.shapes[name], getattr(trunk, name)
    area = 1 if shape is None or len(shape) < 4 else int(np.prod(shape[2:]))
    layers = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    return float(sum(layer.weight.numel() for layer in layers) * area)
