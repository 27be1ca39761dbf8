"""Rotation: a secret orthogonal matrix per gallery, under which vectors are stored where they cannot be encrypted.

A vector database compares plain numbers. A rotation keeps every length and angle, hence every search, and hides the
coordinates that a face can be reconstructed from. It is no encryption: angles between templates stay in the open, and
who knows D independent vectors both before and after (their own enrolments, say) solves for the matrix.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


class Rotation:
    """Drawn uniformly from all rotations and reflections of ``dim`` dimensions by a seed of 32 bytes."""

    def __init__(self, seed: bytes, dim: int) -> None:
        # QR of normal numbers, signs fixed by R's diagonal: Mezzadri 2007, arXiv math-ph/0609050.
        orthogonal, upper = np.linalg.qr(_normals(seed, dim * dim).reshape(dim, dim))
        self._matrix = orthogonal * np.sign(np.diag(upper))  # float64: what is revealed differs by one rounding alone

    def hide(self, vectors: Vectors) -> Vectors:
        """Rows N×D as they are to be stored and searched by. Cosines change by rounding alone, below 1e-6."""
        hidden: Vectors = (vectors @ self._matrix).astype(np.float32)
        return hidden

    def reveal(self, hidden: Vectors) -> Vectors:
        """The rows that ``hide`` was given, to rounding."""
        vectors: Vectors = (hidden @ self._matrix.T).astype(np.float32)
        return vectors


def _normals(seed: bytes, count: int) -> NDArray[np.float64]:
    """Standard normal numbers from AES-256-CTR: numpy's own generators may give others in its next release."""
    pairs = -(-count // 2)
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(16 * pairs))
    # In (0, 1), 53 bits each; Box–Muller makes two normal numbers of two uniform ones.
    uniform = ((np.frombuffer(stream, "<u8") >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
