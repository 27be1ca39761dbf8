"""Align faces: find the similarity that puts five facial points on the ArcFace template, and cut the crop."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.core.errors import NoFace
from pkd.toolkit.images.codec import Rgb

SIZE = 112
ALIGNED_TO = "arcface5pt"
"""Name of the template below, the only one that faces are aligned to here."""
TEMPLATE: NDArray[np.float64] = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Points of eyes, nose and mouth corners (left before right, as seen in the image) that ArcFace expects in 112×112."""
COMPLEX = np.array([1, 1j])
"""Makes a complex number of x and y."""


def similarity(points: NDArray[np.floating], target: NDArray[np.floating] = TEMPLATE) -> NDArray[np.float64]:
    """Find the least-squares rotation, scale and shift that maps N×2 ``points`` onto N×2 ``target`` → float64 2×3.

    In the plane the least squares of Umeyama (1991) are a complex number, Σ z̄ w / Σ z̄ z; never a reflection. Raises
    NoFace where the points are not finite or all coincide.
    """
    source, wanted = np.asarray(points, np.float64), np.asarray(target, np.float64)
    if source.shape != wanted.shape or source.ndim != 2 or source.shape[1] != 2 or not np.isfinite(source).all():
        raise NoFace(f"landmarks of shape {source.shape} are no {len(wanted)} finite points. Use another detector.")
    z, w = source @ COMPLEX, wanted @ COMPLEX
    z_centre, w_centre = z.sum() / len(z), w.sum() / len(w)
    z = z - z_centre
    variance = np.vdot(z, z).real
    if variance < 1e-6 * len(z):
        raise NoFace("the landmarks all lie on one point, so there is no face to align.")
    turn = np.vdot(z, w) / variance  # and scale
    shift = w_centre - turn * z_centre
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def warp(image: Rgb, landmarks: NDArray[np.floating], size: int = SIZE) -> Rgb:
    """Cut the aligned face out of a uint8 H×W×3 RGB image → uint8 size×size×3; black where the image ends.

    ``landmarks``: 5×2 pixels (x, y): the image-left eye, the other eye, nose tip, image-left mouth corner, the other.
    Faces far larger than the crop are averaged down first, so that nothing aliases. Raises NoFace as ``similarity``.
    """
    matrix = similarity(landmarks, TEMPLATE * (size / SIZE))
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    if scale < 0.5:
        height, width = (max(1, round(side * 2 * scale)) for side in image.shape[:2])
        shrunk = np.array([width / image.shape[1], height / image.shape[0]])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
        # a pixel's centre, not its corner, lies at its coordinate
        matrix = similarity((np.asarray(landmarks, np.float64) + 0.5) * shrunk - 0.5, TEMPLATE * (size / SIZE))
    crop = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    return crop.astype(np.uint8, copy=False)
