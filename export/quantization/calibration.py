"""The real crops that INT8 is calibrated and judged on: two samples of a face set that share no image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pkd.export.quantization.ranges import Method
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.images.codec import Rgb

CALIBRATION = 256
"""Crops that ranges are measured on. More change them little: TensorRT's and OpenVINO's tools take 300 to 500."""
HELD_OUT = 64
"""Crops that errors are measured on: 2,016 pairs."""


@dataclass(frozen=True)
class Calibration:
    """uint8 N×S×S×3 each."""

    crops: Rgb
    held_out: Rgb
    method: Method
    name: str
    """The list or folder, without its path."""


def read_calibration(source: Path, size: int, method: Method) -> Calibration:
    """Sample ``source`` (as FaceSet.read) evenly; of a small set every fifth crop is held out. Raises InputError."""
    faces = FaceSet.read(source, labelled=False) if source.is_dir() else FaceSet.read(source)
    if len(faces) < 40:
        raise InputError(
            f"--calib {source}: {len(faces)} crops are too few to see typical values. Give 40, better 400."
        )
    taken = np.unique(np.linspace(0, len(faces) - 1, CALIBRATION + HELD_OUT).astype(np.int64))
    held = np.arange(len(taken)) % 5 == 4
    return Calibration(faces.load(taken[~held], size), faces.load(taken[held], size), method, source.name)
