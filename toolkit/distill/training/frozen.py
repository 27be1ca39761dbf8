"""Train the last layers of an adopted student on stored outputs of the first ones, which stay as they are.

A mobile face model spends most of its arithmetic on early layers, at high resolution, that know edges and textures of
faces already. What they give for an image is computed once and kept on disk as half floats, so that a step costs only
the layers behind them (measured: benchmarks/adoption.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.row_store import Rows
from pkd.toolkit.distill.models.adopted import Adopted, AdoptedNetwork, Features
from pkd.toolkit.distill.models.onnx_graph import OnnxModule
from pkd.toolkit.encoders.embed import embed_stored

NEARLY = 0.05
"""Share of the arithmetic that is given away where features are smaller earlier in the network."""


@dataclass(frozen=True)
class Cut:
    """Name the last frozen layer. ``step``: of the trunk; ``tensor``: of its graph; ``share`` of all multiplications
    in front of what follows; ``shape``: C, H, W of what it gives.
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


class FrozenFeatures:
    """Read what the frozen layers give for every image, plain and mirrored, by index from disk."""

    def __init__(self, plain: Rows, mirrored: Rows, shape: tuple[int, ...]) -> None:
        """Take N×(C·H·W) rows of the plain and of the mirrored images. ``shape``: C, H, W."""
        self._plain, self._mirrored = plain, mirrored
        self._shape = shape

    def batch(self, indices: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Tensor:
        """Read float16 B×C×H×W, the mirrored image's where ``mirrored``, bool B, says so."""
        rows = np.empty((len(indices), int(np.prod(self._shape))), np.float16)
        for stored, chosen in ((self._plain, ~mirrored), (self._mirrored, mirrored)):
            if chosen.any():
                rows[chosen] = stored[indices[chosen]]
        return torch.from_numpy(rows.reshape(-1, *self._shape))


def store_features(
    student: Adopted,
    cut: Cut,
    faces: FaceSet,
    *,
    mirror: bool,
    cache: Path,
    jobs: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> FrozenFeatures:
    """Compute what the frozen layers give for every image that is not in ``cache`` yet; ``mirror``: both ways round.

    Raises InputError for features that half floats cannot hold.
    """
    digest = hashlib.sha256(f"{student.info.id} features {cut.tensor}".encode()).hexdigest()
    width = int(np.prod(cut.shape))
    own = describe(f"{student.info.name}-frozen", "teacher", digest, student.info.preprocess, width)
    encoder = _Halves(Features(own, student.up_to(cut.tensor)), student.source)
    plain, mirrored = (
        embed_stored(encoder, faces, flip=flip, cache=cache, half=True, jobs=jobs, advance=advance)
        for flip in (False, mirror)
    )
    return FrozenFeatures(plain, mirrored, cut.shape)


class _Halves:
    """Compute features and refuse those that half floats cannot hold: an Encoder."""

    def __init__(self, features: Features, source: str) -> None:
        self.info = features.info
        self._features, self._source = features, source

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        rows = self._features.embed(crops)
        if np.abs(rows).max(initial=0) > np.finfo(np.float16).max:
            raise InputError(
                f"--student {self._source}: the features of its frozen layers reach {np.abs(rows).max():.1e}, more "
                "than half floats hold. Use --freeze 0."
            )
        return rows
