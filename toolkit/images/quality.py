"""Measure what of a photograph decides how well its face can be told from others, in terms of ISO/IEC 29794-5.

No measure is a score of its own here: each has a unit, and whether it helps on the photographs at hand is shown by
``pkd-evaluate --protocol reject``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Rgb = NDArray[np.uint8]
Grey = NDArray[np.uint8]
DARK, BRIGHT = 25, 247
"""Grey levels up to and from which a pixel counts as under- and overexposed (ISO/IEC 29794-5)."""
MODEL = np.array([[-31.5, 0, 0], [31.5, 0, 0], [0, 39, -25], [-26, 70, -2], [26, 70, -2]], np.float64)
"""Five points of a usual adult face, mm: x to the right, y down, z away from the camera; order of the landmarks.

The nose's height puts a pitch of 0 where the median of LFW's photographs is, with YuNet's landmarks."""
_INVERSE = np.linalg.pinv(MODEL - MODEL.mean(0))
"""Least squares of points whose mean may be anything: its rows add up to 0."""


@dataclass(frozen=True)
class Measure:
    """Describe one measure of a face."""

    name: str
    unit: str
    says: str
    standard: str
    """Term of ISO/IEC 29794-5, the part on face images of the standard on biometric sample quality."""
    better: Literal["high", "low"]
    """``low``: the value is best at 0, on either side of it."""
    needs: Literal["crop", "photograph", "detector"]
    """Input that it can be measured on; ``detector``: only one that reports it."""


MEASURES = (
    Measure(
        "sharpness", "squared grey levels", "variance of the Laplacian of the grey crop", "sharpness", "high", "crop"
    ),
    Measure(
        "exposure",
        "share",
        "share of the face's pixels that are neither under- nor overexposed",
        "under-exposure and over-exposure prevention",
        "high",
        "crop",
    ),
    Measure("inter_eye", "pixels", "distance between the eyes", "inter-eye distance", "high", "photograph"),
    Measure(
        "yaw", "degrees", "turn to the side, positive towards the image's right", "head pose yaw", "low", "photograph"
    ),
    Measure("pitch", "degrees", "nod, positive upwards", "head pose pitch", "low", "photograph"),
    Measure("roll", "degrees", "tilt in the image, positive clockwise", "head pose roll", "low", "photograph"),
    Measure(
        "occlusion",
        "share",
        "share of the face that is covered, as the detector reports",
        "face occlusion prevention",
        "low",
        "detector",
    ),
)
"""Everything that is measured of a face beside the detector's score and the size of its box."""


def sharpness(grey: Grey) -> float:
    """Measure the variance of the Laplacian of a grey crop (uint8 H×W), squared grey levels; higher is sharper."""
    laplacian = cv2.Laplacian(grey, cv2.CV_16S)
    mean = cv2.sumElems(laplacian)[0] / laplacian.size
    return cv2.norm(laplacian) ** 2 / laplacian.size - mean**2  # sums of whole numbers: little cancels


def exposure(grey: Grey) -> float:
    """Measure the share of pixels within the face of an aligned crop whose grey level lies between DARK and BRIGHT.

    ``grey``: uint8 S×S. The face is its middle, without hair, background and what lay beyond the photograph.
    """
    size = len(grey)
    face = grey[round(size * 0.3) : round(size * 0.95), round(size * 0.25) : round(size * 0.75)]
    return cv2.countNonZero(cv2.inRange(face, DARK + 1, BRIGHT - 1)) / face.size


def inter_eye(landmarks: NDArray[Any]) -> float:
    """Measure the distance between the eyes, pixels of the photograph. ``landmarks``: 5×2, eyes first."""
    return math.dist(landmarks[0].tolist(), landmarks[1].tolist())


def pose(landmarks: NDArray[Any]) -> tuple[float, float, float]:
    """Estimate yaw, pitch and roll, degrees, from five landmarks (5×2 pixels, as the detectors give them).

    The points of a usual face are laid on the landmarks by a scaled orthographic projection: least squares, then the
    nearest rotation (DeMenthon and Davis 1995, first step of POSIT). Roll is exact where yaw and pitch are small; yaw
    and pitch err by some degrees, since a nose may be longer and a chin lower than the usual one's.

    The rotation has (A Aᵀ)^−½ A, of the 2×3 affine map A, as its first two rows. A square root of 2×2 numbers is known
    in closed form, and its factors cancel from the angles: numpy's SVD and cross product would cost far more.
    """
    (ax, ay, az), (bx, by, bz) = (_INVERSE @ landmarks.astype(np.float64)).T.tolist()
    x, y, z = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx  # along the rotation's third row
    aa, bb, ab = ax * ax + ay * ay + az * az, bx * bx + by * by + bz * bz, ax * bx + ay * by + az * bz
    root = math.sqrt(x * x + y * y + z * z)  # of A Aᵀ's determinant
    yaw, pitch = math.atan2(x, math.hypot(y, z)), -math.atan2(y, z)
    roll = math.atan2((aa + root) * bx - ab * ax, (bb + root) * ax - ab * bx)
    return math.degrees(yaw), math.degrees(pitch), math.degrees(roll)


@dataclass(frozen=True)
class FaceQuality:
    """Hold the measures of one face by the names of MEASURES; None where there is nothing to measure them on."""

    sharpness: float
    exposure: float
    inter_eye: float | None = None
    yaw: float | None = None
    pitch: float | None = None
    roll: float | None = None
    occlusion: float | None = None


def measure_face(crop: Rgb, landmarks: NDArray[Any] | None = None, occlusion: float | None = None) -> FaceQuality:
    """Measure a face. ``crop``: uint8 S×S×3 RGB, aligned; ``landmarks``: 5×2 in pixels of the photograph, if known."""
    grey: Grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY).astype(np.uint8, copy=False)
    sharp, exposed = round(sharpness(grey), 2), round(exposure(grey), 4)
    if landmarks is None:
        return FaceQuality(sharp, exposed)
    yaw, pitch, roll = (round(angle, 1) for angle in pose(landmarks))
    return FaceQuality(sharp, exposed, round(inter_eye(landmarks), 1), yaw, pitch, roll, occlusion)
