"""A plausible teacher for tests of heads: embeddings in clusters around random directions, one cluster a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

Float = NDArray[np.float32]
Int = NDArray[np.int64]


def unit(rows: NDArray[np.floating]) -> Float:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clusters(
    classes: int = 40, each: int = 5, dim: int = 32, noise: float = 0.5, seed: int = 0
) -> tuple[Float, Float, Int]:
    """Draw unit rows plain and mirrored, N×D each, and their labels, N."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(classes, dim))
    labels = np.repeat(np.arange(classes), each)
    plain, mirrored = (unit(centres[labels] + random.normal(size=(len(labels), dim)) * noise) for _ in range(2))
    return plain, mirrored, labels


def write_shards(folder: Path, weight: Float, world: int, layout: str = "softmax_fc") -> list[Path]:
    """Write the head as arcface_torch does on ``world`` ranks: layouts rank (2021), softmax_fc (2022), checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for rank in range(world):
        start = len(weight) // world * rank + min(rank, len(weight) % world)
        local = torch.from_numpy(weight[start : start + len(weight) // world + (rank < len(weight) % world)].copy())
        if layout == "rank":
            path = folder / f"rank_{rank}_softmax_weight.pt"
            torch.save(local, path)
            torch.save(torch.ones_like(local), folder / f"rank_{rank}_softmax_weight_mom.pt")
        elif layout == "softmax_fc":
            path = folder / f"softmax_fc_gpu_{rank}.pt"
            torch.save({"weight_mom": torch.zeros_like(local), "weight": local}, path)
        else:
            path = folder / f"checkpoint_gpu_{rank}.pt"
            backbone = {"conv1.weight": torch.zeros(4, 3, 3, 3), "fc.weight": torch.zeros(weight.shape[1], 100)}
            torch.save(
                {
                    "epoch": 20, "global_step": 1, "state_dict_backbone": backbone,
                    "state_dict_softmax_fc": {"weight": local},
                    "state_optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
                    "state_lr_scheduler": {"last_epoch": 1},
                },
                path,
            )  # fmt: skip
        paths.append(path)
    return paths
