"""Fit linear maps between two embedding spaces that know nothing of each other: the cheap alternative to distillation.

All are least squares from x, an encoder's vector of unit length (d numbers), to y, the teacher's of the same image (D
numbers), and all come from the second moments of (x, y) alone, which are gathered in blocks in float64.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.encoder_info import EmbeddingSpace, EncoderInfo, describe
from pkd.toolkit.encoders.base import Embeddings, Encoder, unit_rows
from pkd.toolkit.images.codec import Rgb

Doubles = NDArray[np.float64]
BLOCK = 4096


@dataclass(frozen=True)
class Moments:
    """Hold sums over images: enough for every map, whatever the number of images."""

    n: float
    """Number of images, or the sum of their weights."""
    x: Doubles
    """d: Σx."""
    y: Doubles
    """D: Σy."""
    xx: Doubles
    """d×d: Σxxᵀ."""
    xy: Doubles
    """d×D: Σxyᵀ."""

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.n + other.n, self.x + other.x, self.y + other.y, self.xx + other.xx, self.xy + other.xy
        )  # fmt: skip


def moments(x: Embeddings, y: Embeddings, weights: Doubles | None = None) -> Moments:
    """Sum up float32 N×d and N×D rows, block by block in float64. ``weights``: how often each image counts, N."""
    d, big = x.shape[1], y.shape[1]
    total = Moments(0, np.zeros(d), np.zeros(big), np.zeros((d, d)), np.zeros((d, big)))
    for start in range(0, len(x), BLOCK):
        a, b = (rows[start : start + BLOCK].astype(np.float64) for rows in (x, y))
        if weights is None:
            total += Moments(len(a), a.sum(axis=0), b.sum(axis=0), a.T @ a, a.T @ b)
            continue
        w = weights[start : start + BLOCK]
        wa = a * w[:, None]
        total += Moments(float(w.sum()), wa.sum(axis=0), w @ b, wa.T @ a, wa.T @ b)
    return total


def fit_procrustes(m: Moments) -> tuple[Doubles, Doubles]:
    """Fit orthogonal Procrustes (Schönemann 1966, equations 1.9 to 1.13) → weight float64 d×D, bias float64 D of zeros.

    With Σxyᵀ = USVᵀ the weight is UVᵀ. For d ≤ D its rows are orthonormal, it minimises Σ‖xW − y‖² among such, and the
    cosines of two mapped vectors are those of the vectors themselves. For d > D its columns are orthonormal and it
    maximises Σ xW·y; the least squares problem has no closed solution then.
    """
    u, _, vt = np.linalg.svd(m.xy, full_matrices=False)
    weight: Doubles = u @ vt
    return weight, np.zeros(len(m.y))


def fit_ridge(m: Moments, penalty: float, *, affine: bool = True) -> tuple[Doubles, Doubles]:
    """Fit ridge regression (Hoerl and Kennard 1970) → weight float64 d×D, bias float64 D.

    Minimises Σ‖xW + b − y‖²/n + ``penalty``·‖W‖²; the bias is not penalised, and zero where ``affine`` is false.
    """
    if not affine:
        weight: Doubles = np.linalg.solve(m.xx / m.n + penalty * np.eye(len(m.x)), m.xy / m.n).astype(np.float64)
        return weight, np.zeros(len(m.y))
    mean_x, mean_y = m.x / m.n, m.y / m.n
    covariance = m.xx / m.n - np.outer(mean_x, mean_x)
    cross = m.xy / m.n - np.outer(mean_x, mean_y)
    weight = np.linalg.solve(covariance + penalty * np.eye(len(mean_x)), cross).astype(np.float64)
    return weight, mean_y - mean_x @ weight


class LinearMapEncoder:
    """Put an encoder behind an affine map of its embeddings: one more Encoder, in the space mapped into."""

    def __init__(self, base: Encoder, weight: Doubles, bias: Doubles, info: EncoderInfo) -> None:
        """``weight``: d×D. ``bias``: D. ``info``: as ``describe_mapped`` gives."""
        self.base = base
        self.info = info
        self._weight = weight.astype(np.float32)
        self._bias = bias.astype(np.float32)

    def embed(self, crops: Rgb) -> Embeddings:
        """Embed uint8 N×H×W×3 RGB → float32 N×D with unit rows."""
        return self.map(self.base.embed(crops))

    def map(self, vectors: Embeddings) -> Embeddings:
        """Map unit rows of ``base``, float32 N×d → float32 N×D with unit rows. Raises BadVector."""
        return unit_rows(vectors @ self._weight + self._bias, self.info.name)


def describe_mapped(base: EncoderInfo, kind: str, weight: Doubles, bias: Doubles, space: EmbeddingSpace) -> EncoderInfo:
    """Name a mapped encoder: its id changes with the base's and with every number of the map."""
    sha = hashlib.sha256(base.id.encode())
    for part in (weight, bias):
        sha.update(np.ascontiguousarray(part, np.float32).tobytes())
    name = f"{base.name}-{kind}"
    return describe(name, "student", sha.hexdigest(), base.preprocess, space.dim, space=space)
