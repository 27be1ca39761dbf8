"""Train the last layers of an adopted student on stored outputs of the first ones, which stay as they are.

A mobile face model spends most of its arithmetic on early layers, at high resolution, that know edges and textures of
faces already. What they give for an image is computed once and kept on disk as half floats, so that a step costs only
the layers behind them (measured: benchmarks/adoption.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.data.row_store import Rows
from pkd.toolkit.distill.models.adopted import Adopted, Features
from pkd.toolkit.distill.models.cutting import Cut
from pkd.toolkit.encoders.embed import embed_stored


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
