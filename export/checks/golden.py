"""The crops that parity is checked on and that bundles carry: drawings of people who do not exist."""

from __future__ import annotations

import cv2
import numpy as np

from pkd.toolkit.images.codec import Rgb
from pkd.toolkit.synthetic.faces import SIZE, face

COUNT = 8
"""Golden crops in a bundle: enough to notice a wrong channel order or scale, few enough for a phone."""
TOLERANCE = 1e-5
"""1 − cosine of golden embeddings in fp32. Runtimes differ by 1e-7; bf16, another scale or channel order by 1e-4 in
trained networks."""


def synthetic_crops(count: int, size: int) -> Rgb:
    """uint8 count×size×size×3 RGB, the same on every call."""
    crops = [face(seed=20151, person=i, image=0) for i in range(count)]
    if size != SIZE:
        crops = [cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA).astype(np.uint8) for crop in crops]
    return np.stack(crops)
