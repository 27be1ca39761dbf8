"""Small pictures with identities, and a small teacher, for tests of training. Nothing here shows a face."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.distill.models.student import TorchEncoder, weights_digest
from pkd.toolkit.images.codec import write_rgb

SIZE = 32


def write_patterns(folder: Path, identities: int = 6, images: int = 5, seed: int = 0, size: int = SIZE) -> Path:
    """Write a folder per identity; every image is its identity's smooth pattern plus noise."""
    random = np.random.default_rng(seed)
    for i in range(identities):
        coarse = random.uniform(0, 255, (4, 4, 3))
        pattern = np.kron(coarse, np.ones((size // 4, size // 4, 1)))
        target = folder / f"id-{i:02}"
        target.mkdir(parents=True)
        for k in range(images):
            noisy = pattern + random.normal(0, 12, pattern.shape)
            write_rgb(target / f"{k}.png", np.clip(noisy, 0, 255).astype(np.uint8))
    return folder


def make_teacher(dim: int = 16, seed: int = 0) -> TorchEncoder:
    """Make a fixed random projection of the 4×4 downscaled picture: separates the patterns well."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, dim, bias=False))
    preprocess = Preprocess(size=SIZE, template="none")
    info = describe("projection", "teacher", weights_digest(network.state_dict()), preprocess, dim)
    return TorchEncoder(info, network, {})


class Pyramid(nn.Module):
    """Three stages at half, a quarter and an eighth of the side."""

    stages = ("fine", "middle", "coarse")

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1, bias=False), nn.Tanh())
        self.middle = nn.Sequential(nn.Conv2d(5, 6, 3, 2, 1, bias=False), nn.Tanh())
        self.coarse = nn.Sequential(nn.Conv2d(6, 7, 3, 2, 1, bias=False), nn.Tanh())
        self.top = nn.Linear(7 * (SIZE // 8) ** 2, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N×3×32×32 → N×dim."""
        out: torch.Tensor = self.top(self.coarse(self.middle(self.fine(x))).flatten(1))
        return out


def make_pyramid(dim: int = 16, seed: int = 0) -> TorchEncoder:
    """Make a random convolutional teacher with stages, without biases, so that it separates the patterns."""
    torch.manual_seed(seed)
    network = Pyramid(dim)
    preprocess = Preprocess(size=SIZE, template="none")
    info = describe("pyramid", "teacher", weights_digest(network.state_dict()), preprocess, dim)
    return TorchEncoder(info, network, {})


def write_teacher(path: Path, dim: int = 16) -> None:
    """Write the same kind of teacher as an ONNX file: float n×3×32×32 → n×dim."""
    weights = np.random.default_rng(0).normal(size=(48, dim)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("AveragePool", ["x"], ["p"], kernel_shape=[8, 8], strides=[8, 8]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("MatMul", ["f", "w"], ["y"]),
        ],
        "teacher",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", dim])],
        [helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.tobytes(), raw=True)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
